"""Judges: both orders, disagreement is a tie, odd replies are counted, the cache goes on where a server failed."""

import http.server
import json
import math
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.engine.errors import UserError
from prefuse.engine.score.cache import Cache
from prefuse.engine.score.contract import NoScore
from prefuse.engine.score.judge import Judge, Reply, both_orders
from prefuse.engine.score.rubric import Rubric, read_verdict
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.server import Server
from tiny_run import SHAPE, save_model, settings
from tiny_tokenizer import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "A"), (" b.", "B"), ("[[B]]", "B"), ("I prefer it. [[A]]", "A"), ("both fine [[C]]", "C"), ("tie", "C"),
        ("Answer: B", "B"), ("A is better", "A"), ("The verdict: A, since B is short", "A"), ("(A)", "A"),
        ("[[A]] or [[B]]", "both options"), ("Answer A or Answer B", "both options"),
        ("A and B", "both options"), ("(B) / (A): equal", "both options"), ("A, and B is worse", "A"),
        ("банан лучше", "another language"),
        ("回答", "another language"), ("a question of taste", "nonsense"), ("", "nothing said"), ("hello", "nonsense"),
    ],
)  # fmt: skip
def test_verdicts_are_read(text, verdict):
    said = read_verdict(text)
    assert (said.kind if isinstance(said, NoScore) else said) == verdict


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ((0.9, 0.2), (1.0, 0.85, "first")), ((0.2, 0.6), (0.0, 0.3, "second")),
        ((0.9, 0.8), (0.5, 0.55, "tie, the orders disagree")), ((0.5, 0.5), (0.5, 0.5, "tie")),
        ((1.0, 0.5), (0.5, 0.75, "tie, the orders disagree")),
    ],
)  # fmt: skip
def test_both_orders(orders, expected):
    assert both_orders(*orders) == pytest.approx(expected)


def sides_of(messages):
    """The two answers in a question."""
    return [part.split("\n\n[End]")[0][3:].strip() for part in messages[0]["content"].split("[Answer ")[1:]]


class Scripted:
    """A backend that says what a function of (answer A, answer B) says."""

    name = key = "scripted"

    def __init__(self, say):
        self.say, self.asked = say, 0

    def ask(self, questions, keep, cache):
        replies = {}
        for key, question in zip(keep, questions, strict=True):
            self.asked += 1
            said = self.say(*sides_of(question))
            replies[key] = said if isinstance(said, NoScore) else Reply(said)
        return replies


def test_a_judge_compares_and_scores():
    longer = Scripted(lambda a, b: "A" if len(a) > len(b) else "B")
    judge = Judge(longer)
    found = judge.compare(["q"] * 3, ["long answer", "x", "same"], ["short", "yes", " same"])
    assert found.values.tolist() == [1, 0, 0.5]
    assert longer.asked == 4
    assert found.first_shown == 0.5
    scores = judge.score(["q", "q"], [["a", "bbb", "cc"], ["a"]])
    assert scores.values[0].tolist() == [0, 1, 0.5]
    assert scores.reasons[1][0].kind == "judge"
    always_a = Judge(Scripted(lambda a, b: "A")).compare(["q"] * 2, ["a", "b"], ["c", "d"])
    assert always_a.values.tolist() == [0.5, 0.5]
    assert always_a.outcomes == {"tie, the orders disagree": 2}
    assert always_a.first_shown == 1.0


def test_replies_that_are_no_verdict_are_counted_and_cost_their_pair():
    odd = {"one": "hm", "two": "[[A]] [[B]]", "three": "ответ первый"}
    judge = Judge(Scripted(lambda a, b: odd.get(a, "A" if len(a) > len(b) else "B")), Rubric(mode="reason"))
    found = judge.compare(["q"] * 4, ["one", "two", "three", "fourth"], ["x"] * 4)
    assert found.outcomes == {"nonsense": 1, "both options": 1, "another language": 1, "first": 1}
    assert found.values.isnan().tolist() == [True, True, True, False]
    scores = judge.score(["q"], [["one", "x", "fourth"]])
    assert scores.values.isnan().tolist() == [[True, True, True]]  # one of two comparisons has no verdict


def test_letters_with_too_little_probability_are_nonsense():
    judge = Judge(Scripted(None))
    assert judge.verdict(Reply("", {"A": 0.3, "B": 0.1})) == pytest.approx(0.75)
    assert judge.verdict(Reply("", {"A": 0.003, "B": 0.001})).kind == "nonsense"
    assert judge.verdict(Reply("B", {"A": 0.003, "B": 0.001})) == 0.0


# ---------------------------------------------------------------------------------------------------------
# In this process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A judge that says one of the two letters, depending on what it reads."""
    path = tmp_path_factory.mktemp("judge") / "model"
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, tie_word_embeddings=False, **SHAPE))
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "AB")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
        direction = torch.randn(32)
        model.lm_head.weight[a], model.lm_head.weight[b] = direction, -direction
    return save_model(path, model=model)


def judge_settings(**changes):
    return settings("eval", model_name_or_path="-", dataset_name="-", eval_fraction=1.0, loss_type="sft", **changes)


def test_a_model_in_this_process_judges_by_its_probabilities(folder):
    judge = scorer_of([f"judge={folder}"], judge_settings(score_cache="none", per_device_eval_batch_size=3), CPU)
    judge.least_mass = 0.0  # of its random weights not every prompt leads to a letter
    prompts, first, second = ["sky?"] * 4, ["blue", "green", "no", "the sea"], ["red", "it is", "hello", "a very old"]
    found = judge.compare(prompts, first, second)
    lm, tokenizer = judge.backend.lm.model, judge.backend.tokenizer
    for p in range(4):
        shares = []
        for both in ((first[p], second[p]), (second[p], first[p])):
            question = judge.rubric.messages(prompts[p], *both)
            ids = tokenizer.apply_chat_template(
                question, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                row = lm(**ids).logits[0, -1].double().softmax(-1)
            texts = [tokenizer.decode([t]).strip() for t in range(300)]
            a, b = (sum(float(row[t]) for t in range(300) if texts[t] == letter) for letter in "AB")
            shares.append(a / (a + b))
        assert found.soft[p].item() == pytest.approx((shares[0] + 1 - shares[1]) / 2, abs=1e-5)
        assert found.values[p].item() == both_orders(*shares)[0]


def test_a_model_in_this_process_with_reasons_and_its_cache(folder, tmp_path):
    config = judge_settings(judge_mode="reason", judge_max_tokens=4, score_cache=str(tmp_path))
    judge = scorer_of([f"judge={folder}"], config, CPU)
    found = judge.compare(["sky?", "sea?"], ["blue", "a"], ["red", "b"])
    again = scorer_of([f"judge={folder}"], config, CPU)
    again.backend.ask = None  # everything is in the cache
    assert torch.equal(again.compare(["sky?", "sea?"], ["blue", "a"], ["red", "b"]).values.nan_to_num(9),
                       found.values.nan_to_num(9))  # fmt: skip
    with pytest.raises(TypeError):
        again.compare(["sky?"], ["blue"], ["green"])


# ---------------------------------------------------------------------------------------------------------
# Behind a server


@contextmanager
def serving(answer):
    """A server on loopback. `answer(number, body, headers)` -> (status, headers, bytes), or None to hang up."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body, dict(self.headers)))
            said = answer(len(seen), body, self.headers)
            if said is None:
                self.connection.close()
                return
            status, headers, content = said
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text, shares=None):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if shares:
        top = [{"token": token, "logprob": math.log(p)} for token, p in shares.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    body = {"choices": [choice], "usage": {"prompt_tokens": 40, "completion_tokens": 1}}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def longer(body):
    a, b = sides_of(body["messages"])
    return ("A", {"A": 0.8, " B": 0.1, "x": 0.1}) if len(a) > len(b) else ("B", {"A": 0.2, "B": 0.7})


def judge_at(url, cache=None, **changes):
    options = {"secret": KEY, "retries": 2, "first_pause": 0.0, "workers": 1, "timeout": 5.0} | changes
    return Judge(Server(url, "tiny", **options), cache=Cache(None, "") if cache is None else cache)


SIDES = (["q1", "q2", "q3"], ["a long one", "x", "some"], ["short", "longer", "b"])


def test_a_server_judges_by_its_probabilities():
    with serving(lambda number, body, headers: completion(*longer(body))) as (url, seen):
        judge = judge_at(url, prices=(2.0, 10.0), workers=3)
        found = judge.compare(*SIDES)
    assert found.values.tolist() == [1, 0, 1]
    assert found.soft[0].item() == pytest.approx((0.8 / 0.9 + 1 - 0.2 / 0.9) / 2)
    assert len(seen) == 6
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers in seen)
    assert judge.spent() == {"judge_tokens_read": 240, "judge_tokens_written": 6, "judge_cost": judge.backend.cost()}
    assert judge.backend.cost() == pytest.approx(240 * 2e-6 + 6 * 10e-6)


@pytest.mark.parametrize("fault", [(500, {}, b""), (429, {"Retry-After": "0"}, b""), None, (200, {}, b"no JSON"),
                                   (200, {}, b'{"choices": []}')])  # fmt: skip
def test_what_fails_for_a_while_is_tried_again(fault):
    def answer(number, body, headers):
        return fault if number % 2 else completion(*longer(body))

    with serving(answer) as (url, seen):
        found = judge_at(url).compare(*SIDES)
    assert found.values.tolist() == [1, 0, 1]
    assert len(seen) == 12


def test_a_late_reply_is_a_time_out():
    late = threading.Event()

    def answer(number, body, headers):
        if number == 1:
            late.wait(5)
        return completion(*longer(body))

    with serving(answer) as (url, seen):
        found = judge_at(url, timeout=0.2).compare(["q"], ["a long one"], ["b"])
        late.set()
    assert found.values.tolist() == [1]
    assert len(seen) == 3


def test_a_server_without_probabilities_is_read_by_its_words():
    def answer(number, body, headers):
        if "logprobs" in body:
            return 400, {}, b'{"error": "logprobs is not supported"}'
        return completion(longer(body)[0])

    with serving(answer) as (url, seen):
        found = judge_at(url).compare(*SIDES)
    assert found.values.tolist() == [1, 0, 1]
    assert len(seen) == 7  # it is told once


def test_a_server_that_dies_half_way_is_met_again_by_the_cache(tmp_path):
    alive = 4

    def answer(number, body, headers):
        return completion(*longer(body)) if number <= alive else (503, {}, b"gone")

    prompts, first, second = [f"q{i}" for i in range(8)], [f"a long {i}" for i in range(8)], ["b"] * 8
    with serving(answer) as (url, seen):
        cut = judge_at(url, Cache(tmp_path, "judge")).compare(prompts, first, second)
        assert cut.outcomes == {"first": 2, "server": 2, "not asked": 4}
        assert cut.values[:2].tolist() == [1, 1]
        assert cut.values[2:].isnan().all()
        assert len(seen) == alive + 3 * 3  # three questions in all their tries, and then it is left alone
        seen.clear()
        alive = 100
        whole = judge_at(url, Cache(tmp_path, "judge")).compare(prompts, first, second)
        assert whole.outcomes == {"first": 8}
        assert len(seen) == 12


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the key"), (404, "up to /v1"), (302, "up to /v1")])
def test_what_no_other_try_helps_ends_at_once(status, said):
    seen_elsewhere = []
    with serving(lambda *args: seen_elsewhere.append(args) or completion("A")) as (elsewhere, _):
        headers = {"Location": f"{elsewhere}/chat/completions"}
        with serving(lambda number, body, h: (status, headers, f"bad {KEY}".encode())) as (url, _):
            with pytest.raises(UserError, match=said) as error:
                judge_at(url).compare(["q"], ["a"], ["b"])
    assert KEY not in str(error.value)
    assert not seen_elsewhere


def test_a_question_that_the_server_refuses_costs_its_pair():
    def answer(number, body, headers):
        if "q2" in body["messages"][0]["content"]:
            return 400, {}, f"maximum context length, key {KEY}".encode()
        return completion(*longer(body))

    with serving(answer) as (url, _):
        found = judge_at(url).compare(*SIDES)
    assert found.outcomes == {"first": 2, "refused": 1}
    assert KEY not in str(found.reasons[1])
    assert "maximum context length" in str(found.reasons[1])


def test_the_key_is_written_nowhere(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("OWN_KEY", KEY)

    def answer(number, body, headers):
        return completion(f"A {headers['Authorization']}") if number % 3 else (500, {}, KEY.encode())

    with serving(answer) as (url, seen):
        config = judge_settings(judge_api_key_env="OWN_KEY", score_cache=str(tmp_path / "cache"), judge_retries=1)
        judge = scorer_of([f"judge={url}#tiny"], config, CPU)
        judge.backend.first_pause = 0.0
        judge.compare(*SIDES)
        assert all(headers["Authorization"].endswith(KEY) for _, headers in seen)
    shown = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for text in (shown.out, shown.err, caplog.text, written, repr(judge), judge.key, judge.name):
        assert KEY not in text
    assert written.count('"text": "A Bearer ***"') >= 4


def test_urls_that_cannot_be():
    for argument, said in (
        ("http://localhost:1/v1", "URL#MODEL"),
        ("http://me:pw@h/v1#m", "no user or password"),
        ("ftp://h/v1#m", "begins with http"),
    ):
        with pytest.raises(UserError, match=said):
            scorer_of([f"judge={argument}"], judge_settings(), CPU)
    with pytest.raises(UserError, match="two numbers"):
        scorer_of(["judge=http://h/v1#m"], judge_settings(judge_price="1"), CPU)
    with pytest.raises(UserError, match="no member of an ensemble"):
        scorer_of(["judge=http://h/v1#m", "length"], judge_settings(), CPU)


def test_a_rubric_of_ones_own(tmp_path):
    (tmp_path / "rules.md").write_text("Prefer answers in verse.")
    config = judge_settings(judge_rubric=str(tmp_path / "rules.md"))
    judge = scorer_of(["judge=http://h/v1#m"], config, CPU)
    (turn,) = judge.rubric.messages([{"role": "user", "content": "the sky?"}], "one", "two")
    assert turn["content"].startswith("Prefer answers in verse.\n\n[Prompt]\nthe sky?\n\n[Answer A]\none")
    assert judge.key != scorer_of(["judge=http://h/v1#m"], judge_settings(), CPU).key
    with pytest.raises(UserError, match="cannot read judge_rubric"):
        scorer_of(["judge=http://h/v1#m"], judge_settings(judge_rubric="absent"), CPU)
