"""`prefuse report`: what a page says of a run, what it never lets through, and that a browser draws all of it."""

import json
import re
import shutil
import subprocess

import pytest

from prefuse.engine.cli import main
from prefuse.engine.report.page.series import MOST_POINTS, charts_of, shortened
from report_runs import CLOSING, MARKUP, Tags, page_of, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_a_page_answers_the_questions_of_a_newcomer(tmp_path):
    text = Tags(page_of(write_run(tmp_path / "dpo"))).text
    for said in (
        "What was it trained on?", "19 rows", "Why rows were skipped", "a plain text",
        "Did it learn?", "0.6931", "0.25", "reward accuracy (a tie counts half)", "0.5", "0.8",
        "Is it better?", "answers.jsonl", "eval.json", "win_rate", "0.625",
        "scores over sqrt(KL), curve.json", "What went wrong?", "warning", "finished, 30 steps",
        "With which settings?", "beta", "0.3",
    ):  # fmt: skip
        assert said in text, said


def test_runs_stand_side_by_side_and_what_differs_is_marked(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", **{"config.yaml": "loss_type: dpo\nbeta: 0.7\n"})
    page = page_of(one, two)
    rows = re.findall(r'<tr class="differs">.*?</tr>', page, re.DOTALL)
    assert any("beta" in row and "0.3" in row and "0.7" in row for row in rows)
    assert not any("loss_type" in row for row in rows)
    data = json.loads(re.search(r'id="chart-data">(.*?)</script>', page, re.DOTALL)[1])
    assert {line["run"] for line in data["charts"][0]["lines"]} == {0, 1}


@pytest.mark.parametrize("text", [MARKUP, CLOSING, "{{ 7 * 7 }}", 'x" onmouseover="alert(1)'])
def test_no_text_of_a_run_is_markup(text, tmp_path):
    tags = Tags(page_of(write_run(tmp_path / "dpo", text=text)))
    plain = Tags(page_of(write_run(tmp_path / "plain")))
    both = [[(tag, sorted(attrs)) for tag, attrs in x.found if tag != "wbr"] for x in (tags, plain)]
    assert both[0] == both[1]
    assert not [attrs for tag, attrs in tags.found if tag == "wbr" and attrs]  # a path may break behind its slashes
    assert text in tags.text  # shown as it is


def test_nothing_is_fetched(tmp_path):
    page = page_of(write_run(tmp_path / "dpo"))
    assert not [attrs for tag, attrs in Tags(page).found if {"src"} & set(attrs) or tag in ("link", "iframe", "img")]
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "about.json", "skipped.jsonl", "messages.jsonl"])
@pytest.mark.parametrize(
    "content", ["", "[1, 2", "[]", "null", "7", '{"a": ' * 3000, '{"rows": 3, "example": {"sides": [1]}}']
)
def test_a_strange_file_costs_its_own_part_of_the_page_alone(name, content, tmp_path):
    assert "Did it learn?" in page_of(write_run(tmp_path / "dpo", **{name: content}))


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} has no metrics.jsonl" in capsys.readouterr().err
    runs = [write_run(tmp_path / name) for name in ("a run", "b")]
    assert main(["report", str(tmp_path)]) == 2
    assert f"there are runs in it: prefuse report '{runs[0]}' {runs[1]}" in capsys.readouterr().err


def test_a_long_curve_keeps_its_mean_and_its_spikes():
    values = [0.0] * 100_000
    values[54_321] = 9.0
    line = shortened("loss", list(enumerate(values)), held_out=False)
    assert len(line.values) == MOST_POINTS
    assert max(line.high) == 9.0
    assert min(line.low) == 0.0
    assert sum(line.values) / len(line.values) == pytest.approx(9.0 / 100_000, rel=0.05)


def test_lines_of_the_log_that_are_strange_are_left_out():
    rows = [{"step": 1, "loss": 0.5}, {"step": "2", "loss": 0.5}, {"step": 3, "loss": None}, {"loss": 1.0}, {"step": 4}]
    (line,) = charts_of(rows)["loss"]
    assert (line.steps, line.values) == ([1.0], [0.5])


def test_a_run_of_100_000_steps_makes_a_small_page(tmp_path):
    page = page_of(write_run(tmp_path / "long", steps=100_000))
    assert len(page) < 2_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_figure_without_an_error(width, tmp_path):
    long, hostile = write_run(tmp_path / "long", steps=20_000), write_run(tmp_path / "hostile", text=MARKUP + CLOSING)
    page_of(long, hostile)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
         "--dump-dom",
         (long / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.findall(r".*:CONSOLE.*", done.stderr)
    figures = re.findall(r'<figure class="chart"[^>]*>.*?</figure>', done.stdout, re.DOTALL)
    assert figures
    for figure in figures:
        assert 'data-drawn="yes"' in figure
        assert "<polyline" in figure
    assert "<title>long, hostile" in done.stdout  # no script of a run has changed it
