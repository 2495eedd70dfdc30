"""Pages of runs, rows and results: what stands where, that colours can be told apart, and that a keyboard is enough."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from prefuse.engine.cli import main
from prefuse.engine.report.page import render
from prefuse.engine.report.page.data import notes_of
from prefuse.engine.report.page.series import in_order
from report_runs import CLOSING, MARKUP, Tags, page_of, write_run
from tiny_run import PAIRS, save_model, write_rows

CSS = (Path(render.__file__).parent / "page.css").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROLES = ("prompt", "learned", "chosen", "rejected", "ignored", "read")
RUNS = [f"run-{number}" for number in range(8)]


# ---------------------------------------------------------------------------------------------------------
# What stands where


def glance_of(page):
    return Tags(page[page.index('class="glance"') : page.index('id="data"')]).text


def test_a_glance_has_the_first_answer_to_each_question(tmp_path):
    glance = glance_of(page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two")))
    answers = {
        "What was it trained on?": "19 rows of a plain text, 3 skipped",
        "Did it learn?": "0.6931 → 0.25",
        "Is it better?": "62.5% (50.0% to 70.0%): not decided",
        "What went wrong?": "1, the last: a plain text",
        "With which settings?": "2 settings",  # loss_type is the default
    }
    places = [glance.index(text) for pair in answers.items() for text in pair]
    assert places == sorted(places)  # each answer behind its question, before the next one
    for said in ("1 rows: too few for a reliable number", "held-out loss lower is better",
                 "held-out reward accuracy a tie counts half, higher is better"):  # fmt: skip
        assert said in glance, said


def test_a_glance_says_what_is_not_known_and_what_broke_off(tmp_path):
    files = dict.fromkeys(("eval.json", "wins.json", "curve.json", "answers.jsonl", "messages.jsonl"), "")
    mark = json.dumps({"command": "train", "state": "training", "total_steps": 90})
    losses = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2))
    glance = glance_of(page_of(write_run(tmp_path / "one", **files | {"run.json": mark, "metrics.jsonl": losses})))
    for said in ("training loss", "1 → 0.5", "not measured yet", "not finished: step 2 of 90", "none"):
        assert said in glance, said


def test_many_runs_do_not_fill_the_first_screen_with_their_names(tmp_path):
    page = page_of(*(write_run(tmp_path / f"run{number}") for number in range(4)))
    assert "<h1>4 runs side by side</h1>" in page
    assert "<title>run0, run1, run2, run3" in page


def test_answers_of_several_runs_stand_beside_each_other(tmp_path):
    rows = [{"prompt": "who?", "model": "me"}, {"prompt": "why?", "model": "so"}]
    one = write_run(tmp_path / "one", **{"answers.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    two = write_run(tmp_path / "two", **{"answers.jsonl": json.dumps({"prompt": "why?", "model": "no idea"}) + "\n"})
    page = page_of(one, two)
    table = page[page.index("Answers in answers.jsonl") :]
    cells = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    assert re.findall(r">([^<]+)</t", cells[0]) == ["prompt", "one", "two"]
    assert re.findall(r"<td>(.*?)</td>", cells[1]) == ["who?", "me", "–"]
    assert re.findall(r"<td>(.*?)</td>", cells[2]) == ["why?", "so", "no idea"]


def test_one_run_shows_its_answers_before_and_after(tmp_path):
    row = {"prompt": "who?", "model": "now", "reference": "then"}
    page = page_of(write_run(tmp_path / "one", **{"answers.jsonl": json.dumps(row) + "\n"}))
    table = page[page.index("Answers in answers.jsonl") :]
    assert re.findall(r">([^<]+)</t[hd]", table[: table.index("</table>")]) == [
        "prompt", "before", "after", "who?", "then", "now",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.55, 0.7, "better than"), (0.3, 0.45, "worse than"), (0.4, 0.6, "not decided")]
)
def test_a_win_rate_has_its_interval_and_what_it_decides(low, high, said, tmp_path):
    value = (low + high) / 2
    wins = json.dumps({"win_rate": value, "win_rate_low": low, "win_rate_high": high, "comparisons": 80})
    page = page_of(write_run(tmp_path / "one", **{"wins.json": wins}))
    told = re.search(r'<p class="win">(.*?)</p>', page, re.DOTALL)[1]
    assert f"{100 * value:.1f}%, interval {100 * low:.1f}% to {100 * high:.1f}%" in told
    assert '<svg class="interval"' in told
    assert said in told
    assert f"{value:.4g} ({low:.4g} to {high:.4g})" in page
    assert "win_rate_low" not in page


def test_the_curve_over_kl_says_where_it_turns(tmp_path):
    points = [{"step": i, "sqrt_kl": x, "score": x, "gold_score": x - x * x} for i, x in enumerate((0.0, 0.5, 1.0))]
    curve = {"checkpoints": points, "turn": {"alpha": 1.0, "beta": 1.0, "turns_at": 0.5, "best": 1, "best_step": 1}}
    page = page_of(write_run(tmp_path / "one", **{"curve.json": json.dumps(curve)}))
    assert "The best checkpoint by what was measured is step 1." in page
    assert "turns at sqrt(KL) 0.5" in page
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["charts"][-1]["mark"] == 0.5


def test_an_online_run_shows_samples_of_its_first_and_its_last_round(tmp_path):
    run = write_run(tmp_path / "grpo", **{"run.json": json.dumps({"command": "online", "state": "finished"})})
    (run / "samples").mkdir()
    for number, answers in enumerate((["early", "poor"], ["between"], ["late", "fine"])):
        scores = [0.25 * number + 0.5 * place for place in range(len(answers))]
        lines = [{"round": number}, {"row": "p:1", "prompt": 0, "answers": answers, "scores": scores}]
        (run / "samples" / f"round-{number:05}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Tags(page_of(run)).text
    for said in ("early", "poor", "late", "fine", "mean score 0.25 of 2 answers", "mean score 0.75", "19 prompts"):
        assert said in text, said
    assert "between" not in text


def test_a_reward_run_names_the_rows_that_it_has_the_wrong_way_round(tmp_path):
    rows = [("a", [1.0, 0.5]), ("b", [0.0, 2.0]), ("c", [0.0, 1.0, 3.0]), ("d", [1.0, 1.0])]
    lines = "".join(json.dumps({"row": name, "scores": scores, "lengths": [1, 2]}) + "\n" for name, scores in rows)
    mark = json.dumps({"command": "reward", "state": "finished"})
    page = page_of(write_run(tmp_path / "rm", **{"held_out_scores.jsonl": lines, "run.json": mark}))
    assert "2 of 4 rows" in page
    found = re.findall(r"<tr><td>(\w)</td><td", page[page.index("2 of 4 rows") :])
    assert found == ["c", "b"]


@pytest.mark.parametrize(
    ("command", "said"), [("reward", "--scorer"), ("train", "prefuse generate"), ("sft", "--loss_type sft")]
)
def test_a_run_without_evaluations_names_the_commands_that_make_them(command, said, tmp_path):
    empty = dict.fromkeys(("eval.json", "wins.json", "curve.json", "answers.jsonl"), "{}")
    run = write_run(tmp_path / "bare", **empty, **{"run.json": json.dumps({"command": command, "state": "finished"})})
    page = page_of(run)
    assert said in page[page.index("Nothing is known yet") :]


def test_a_run_that_has_stopped_says_how_it_goes_on(tmp_path):
    mark = json.dumps({"command": "train", "state": "training", "total_steps": 90})
    page = page_of(write_run(tmp_path / "cut", **{"run.json": mark}))
    assert "Not finished: step 30 of 90" in page
    assert "--resume" in page


def test_charts_stand_by_what_is_asked_first():
    assert in_order(["mfu", "zeta", "learning rate", "reward margin", "loss"]) == [
        "loss", "reward margin", "learning rate", "zeta", "mfu",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Rows and results


def inspected(tmp_path, rows, *words):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["data", "inspect", file, "--html", str(tmp_path / "rows.html"), *words]) == 0
    return (tmp_path / "rows.html").read_text(encoding="utf-8")


def test_the_page_of_rows_answers_what_is_in_them(tmp_path):
    pair = {"prompt": "Q", "chosen": "a longer answer", "rejected": "BB"}
    rows = [pair, pair, pair | {"chosen": "BB", "rejected": "a longer answer"}, pair | {"chosen": ""}]
    text = Tags(inspected(tmp_path, rows)).text
    for said in (
        "4 rows of prompt/chosen/rejected, read as pair", "usable",
        "2 (66.7%)", "Length bias: the chosen side is longer",
        "3 rows contradict another", "--drop_contradictions", "1 rows equal an earlier one", '"chosen" is empty',
        "characters", "a longer answer", "Rows that cannot be used: 1",
    ):  # fmt: skip
        assert said in text, said


def test_histograms_of_a_page_count_every_row(tmp_path):
    page = inspected(tmp_path, PAIRS)
    for figure in re.findall(r'<figure class="histogram">.*?</figure>', page, re.DOTALL):
        counts = [int(count) for count in re.findall(r"<title>(\d+) rows</title>", figure)]
        assert sum(counts) == len(PAIRS)
        assert f": {len(PAIRS)} rows from" in figure
    assert page.count('<figure class="histogram">') == 4


def test_with_a_tokenizer_rows_are_tokens_and_what_is_cut_is_said(tmp_path):
    model = save_model(tmp_path / "model")
    page = inspected(tmp_path, PAIRS, "--tokenizer", model, "--max_length", "30")
    assert page.count('<p class="tokens">') == 6
    assert 'class="token rejected"' in page
    assert "prompts cut to fit 30 tokens" in page
    assert '<th scope="col">tokens</th>' in page


def test_uneven_labels_are_named():
    from collections import Counter

    from prefuse.engine.data.stats import Stats

    assert "8 good, 2 bad" in notes_of(Stats(records=10, labels=Counter({True: 8, False: 2})))[0]
    assert notes_of(Stats(records=10, labels=Counter({True: 5, False: 5}))) == []


def test_results_of_benchmarks_make_a_page(tmp_path):
    assert main(["bench", "show", "--html", str(tmp_path / "bench.html"), "--verb", "accuracy"]) == 0
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert '<span class="bar"><i style="--share:1.0000"></i>' in page
    assert Tags(page).text.count("prefuse") > 3


def test_on_the_page_of_results_every_link_leads_somewhere_and_every_bar_has_its_own_name(tmp_path):
    assert main(["bench", "show", "--html", str(tmp_path / "bench.html")]) == 0
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    places = re.findall(r'\bid="([^"]+)"', page)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) > 30
    assert len(set(places)) == len(places)
    assert set(links) <= set(places)
    names = re.findall(r'<a href="#result-\d+">(.*?)</a>', page)
    assert len(set(names)) == len(names)
    assert not re.search(r"\b1 threads|\dthreads|\drows", page[: page.index("<main")])
    figures = re.findall(r'<figure class="bars">.*?</figure>', page, re.DOTALL)
    assert len(figures) > 20
    for figure in figures:
        labels = re.findall(r'<span class="name">(.*?)</span>', figure)
        assert len(set(labels)) == len(labels) > 1, labels


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [390, 768, 1400])
def test_in_a_browser_the_page_of_results_is_no_wider_than_the_window(width, tmp_path):
    """Wide tables scroll in their own boxes; nothing is said on the console."""
    assert main(["bench", "show", "--html", str(tmp_path / "bench.html")]) == 0
    check = """<script>addEventListener("load", () => {
      const outside = [...document.querySelectorAll("main *")].filter(
        (x) => !x.closest(".scroll") && x.getBoundingClientRect().right > innerWidth + 1).length;
      document.body.dataset.found = [document.documentElement.scrollWidth <= innerWidth, outside].join(" ");
    });</script>"""
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    (tmp_path / "looked.html").write_text(page.replace("</body>", check + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
         (tmp_path / "looked.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.findall(r".*:CONSOLE.*", done.stderr)
    assert re.search(r'data-found="(.*?)"', done.stdout)[1] == "true 0"


def test_no_text_of_rows_is_markup(tmp_path):
    text = MARKUP + CLOSING
    rows = [
        {"prompt": text, "chosen": text + "a", "rejected": text, text: 1},
        {"prompt": text, "chosen": "", "rejected": text},
    ]
    model = save_model(tmp_path / "model")
    for words in ([], ["--tokenizer", model]):
        page = inspected(tmp_path, rows, *words)
        tags = Tags(page).found
        assert [tag for tag, _ in tags].count("script") == 2
        assert not [tag for tag, _ in tags if tag == "img"]
        assert "default-src 'none'" in page


# ---------------------------------------------------------------------------------------------------------
# Colours and keys


def colours(theme):
    """{variable: (r, g, b) in 0..1} of the light or the dark theme."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    found = {}
    for block in blocks[: 1 if theme == "light" else 2]:
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    return {name: [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for name, code in found.items()}


def contrast(a, b):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_have_the_contrast_of_wcag_aa(theme):
    known = colours(theme)
    pairs = [(text, ground) for text in ("ink", "soft", "link") for ground in ("ground", "panel")]
    pairs += [("ink", role) for role in ROLES]
    low = {pair: round(contrast(known[pair[0]], known[pair[1]]), 2) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}
    share = int(re.search(r"tr\.differs.*var\(--run-1\) (\d+)%", CSS)[1]) / 100
    mixed = [share * a + (1 - share) * b for a, b in zip(known["run-1"], known["ground"], strict=True)]
    assert contrast(known["ink"], mixed) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_have_the_contrast_of_graphics(theme):
    known = colours(theme)
    low = {run: contrast(known[run], known["panel"]) for run in RUNS}
    assert {run: ratio for run, ratio in low.items() if ratio < 3} == {}


def test_a_path_may_break_behind_a_slash_and_is_no_markup():
    assert render.in_lines("runs/demo/<b>") == "runs/<wbr>demo/<wbr>&lt;b&gt;"
    assert render.in_lines(["a/b", 0.25]) == "a/<wbr>b, 0.25"


def test_every_role_and_every_run_has_its_colour():
    for role in render.ROLES:
        assert re.search(rf"\.token\.{role}\b", CSS), role
    assert contrast([0, 0, 0], [1, 1, 1]) == pytest.approx(21)
    assert not re.search(r"opacity: 0?\.[0-6]", CSS.replace("opacity: .18", "").replace("opacity: .15", ""))


def test_what_scrolls_or_acts_can_be_reached_by_keys(tmp_path):
    page = page_of(write_run(tmp_path / "one"), write_run(tmp_path / "two"))
    tags = Tags(page).found
    for tag, attributes in tags:
        if attributes.get("class") == "scroll":
            assert attributes.get("tabindex") == "0", attributes
            assert attributes.get("aria-label"), attributes
        if tag == "a":
            assert attributes["href"].startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    targets = {attributes.get("id") for _, attributes in tags}
    assert {attributes["href"][1:] for tag, attributes in tags if tag == "a"} <= targets
    headings = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert headings.count(1) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_in_a_browser_charts_take_the_focus_and_runs_of_unequal_length_share_the_width(tmp_path):
    page_of(write_run(tmp_path / "long", steps=300), write_run(tmp_path / "short", steps=20))
    page = tmp_path / "long" / "report.html"
    check = """<script>addEventListener("load", () => {
      const out = [], svg = document.querySelector("figure.chart svg"), button = document.querySelector(".axis");
      svg.focus();
      out.push(document.activeElement === svg);
      svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      out.push(document.querySelector(".readout").textContent.includes("at step"));
      out.push(svg.textContent.includes("% of the run"));
      button.click();
      out.push(svg.textContent.includes("% of the run"));
      out.push(document.querySelector("figure.chart .keys button") !== null);
      document.body.dataset.found = out.join(" ");
    });</script>"""
    looked = tmp_path / "looked.html"
    looked.write_text(page.read_text(encoding="utf-8").replace("</body>", check + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=3000", "--dump-dom", looked.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.search(r'data-found="(.*?)"', done.stdout)[1] == "true true true false true"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_on_paper_nothing_is_cut_off_and_dark_colours_stay_on_the_screen(tmp_path):
    """The rules for print, put in force on a window as wide as a page: no table is wider than what holds it."""
    text = {"config.yaml": "loss_type: dpo\nbeta: 0.3\ndataset_name: " + "a_long_name_of_a_file/" * 6 + "\n"}
    page_of(*(write_run(tmp_path / f"run-{n}", **text if n % 2 else {}) for n in range(4)))
    check = """<script>addEventListener("load", () => {
      const dark = [];
      for (const rule of document.styleSheets[0].cssRules) {
        if (rule.media && rule.media.mediaText.includes("dark")) dark.push(rule.media.mediaText.startsWith("screen"));
        if (rule.media && rule.media.mediaText === "print") rule.media.mediaText = "all";
      }
      dispatchEvent(new Event("beforeprint"));
      const opened = document.querySelectorAll("details:not([open])").length === 0;
      const wide = [...document.querySelectorAll(".scroll table, pre, figure, article")].filter(
        (x) => x.getBoundingClientRect().right > innerWidth + 1 || x.scrollWidth > x.clientWidth + 1).length;
      const nav = getComputedStyle(document.querySelector("nav")).display;
      dispatchEvent(new Event("afterprint"));
      const closed = document.querySelectorAll("details:not([open])").length > 0;
      document.body.dataset.found = [dark.join(), opened, wide, nav, closed].join(" ");
    });</script>"""
    page = (tmp_path / "run-0" / "report.html").read_text(encoding="utf-8")
    looked = tmp_path / "looked.html"
    looked.write_text(page.replace("</body>", check + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=690,2000", "--virtual-time-budget=3000", "--dump-dom", looked.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.search(r'data-found="(.*?)"', done.stdout)[1] == "true true 0 none true"
