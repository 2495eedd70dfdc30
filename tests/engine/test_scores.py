"""Scorers: one number for each answer, or NaN and a reason; what one does wrong is named, counted, costs itself."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from prefuse.engine.errors import UserError
from prefuse.engine.score import classifier
from prefuse.engine.score.cache import Cache
from prefuse.engine.score.classifier import load_classifier
from prefuse.engine.score.contract import NoScore, Scores, by_answer, preferences
from prefuse.engine.score.ensemble import Ensemble, combined
from prefuse.engine.score.function import Function, load_function
from prefuse.engine.score.rules import TextRule
from prefuse.engine.score.scorers import scorer_of
from tiny_run import SHAPE, save_model, settings
from tiny_tokenizer import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["what is grass?", [{"role": "user", "content": "the sky?"}], "tell me"]
ANSWERS = [["green", "it is blue and green"], ["blue"], ["hello there", "no", "the sea"]]


def kinds(scores):
    return [[None if reason is None else reason.kind for reason in row] for row in scores.reasons]


def file_of(tmp_path, text):
    (tmp_path / "rewards.py").write_text(text)
    return f"{tmp_path / 'rewards.py'}:f"


# ---------------------------------------------------------------------------------------------------------
# Rules and the shape of scores


@pytest.mark.parametrize(
    ("rule", "answer", "truth", "expected"),
    [
        (TextRule("exact", "a"), " 42\n", "42", 1), (TextRule("exact", "a"), "42.", "42", 0),
        (TextRule("exact", "a"), "four", ["4", "four"], 1), (TextRule("contains", "a"), "it is 42!", "42", 1),
        (TextRule("number", "a"), "so 7 + 1,001 = 1,008.", "7 apples ... #### 1008", 1),
        (TextRule("number", "a"), "no idea", "#### 8", 0), (TextRule("number", "a"), "it is -8", "8", 0),
        (TextRule("regex", r"\bblue\b"), "the blue\nsky", None, 1), (TextRule("regex", "^blue"), "a blue", None, 0),
        (TextRule("format", "<think>.*</think>.+"), "<think>a\nb</think>c", None, 1),
        (TextRule("format", "<think>.*</think>"), "x<think></think>", None, 0),
        (TextRule("length"), "one two  three", None, 3), (TextRule("length", "2:3"), "one two three", None, 1),
        (TextRule("length", "2:3"), "one", None, 0),
    ],
)  # fmt: skip
def test_rules(rule, answer, truth, expected):
    scores = rule.score(["q"], [[answer]], {"a": [truth]})
    assert scores.values.tolist() == [[expected]]
    assert scores.reasons == [[None]]


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_math_verify_judges_answers_in_any_form_and_any_thread(in_a_thread):
    answers = [[r"It is $\frac{1}{2}$.", "0.5", "0.51"], [r"\boxed{9}", "8"], ["4"]]
    ask = partial(TextRule("math", "a").score, ["p", "q", "r"], answers, {"a": ["0.5", "9", "no number"]})
    if in_a_thread:
        with ThreadPoolExecutor(1) as pool:
            scores = pool.submit(ask).result()
    else:
        scores = ask()
    assert scores.values[:2].nan_to_num(-1).tolist() == [[1, 1, 0], [1, 0, -1]]
    assert scores.reasons[2][0].kind == "no truth"


def test_a_row_without_the_truth_has_no_score_and_the_others_have():
    scores = TextRule("number", "a").score(["p", "q", "r"], [["4"], ["5"], ["6"]], {"a": ["4", None, "none"]})
    assert scores.values[0] == 1
    assert scores.values[1:].isnan().all()
    assert kinds(scores) == [[None], ["no truth"], ["no truth"]]
    assert scores.counts() == {"no truth": 2}


@pytest.mark.parametrize(
    ("rule", "said"), [(("regex", "("), "no regular"), (("regex", ""), "pattern"), (("length", "9:2"), "LOW:HIGH")]
)
def test_rules_that_cannot_be(rule, said):
    with pytest.raises(UserError, match=said):
        TextRule(*rule)


def test_prompts_have_different_numbers_of_answers():
    scores = TextRule("length").score(PROMPTS, ANSWERS)
    expected = torch.tensor([[1, 5, math.nan], [1, math.nan, math.nan], [2, 1, 2]], dtype=torch.float64)
    assert torch.equal(scores.values.nan_to_num(-1), expected.nan_to_num(-1))
    assert kinds(scores) == [[None, None, "no answer"], [None, "no answer", "no answer"], [None] * 3]
    assert not scores.counts()
    with pytest.raises(ValueError, match="each of the 2 prompts, got 1"):
        TextRule("length").score(["a", "b"], [["c"]])


def test_preferences_by_scores():
    found = preferences(
        TextRule("number", "a"), ["p"] * 4, ["1", "2", "1", "1"], ["2", "1", "1", "2"], {"a": [1, 1, 1, None]}
    )
    assert found.values[:3].tolist() == [1, 0, 0.5]
    assert found.values[3].isnan()
    assert found.outcomes == {"first": 1, "second": 1, "tie": 1, "no truth": 1}


# ---------------------------------------------------------------------------------------------------------
# Python functions, with TRL's signature


def test_a_function_gets_what_trl_gives(tmp_path):
    spec = file_of(tmp_path, """
seen = []
def f(prompts, completions, color, **kwargs):
    seen.append((prompts, completions, color, sorted(kwargs)))
    return [None if c == "red" else len(str(x)) for x, c in zip(completions, color)]
""")  # fmt: skip
    function = load_function(spec, 5)
    assert function.columns == ("color",)
    columns = {"color": ["red", "blue", "green"], "other": [1, 2, 3]}
    scores = function.score(PROMPTS, ANSWERS, columns)
    (prompts, completions, color, others), *rest = function.call.__globals__["seen"]
    assert not rest
    assert prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] + [PROMPTS[2]] * 3
    assert completions[0] == "green"
    assert completions[2] == [{"role": "assistant", "content": "blue"}]
    assert color == ["red"] * 2 + ["blue"] + ["green"] * 3
    assert others == ["other"]
    assert kinds(scores)[0][:2] == ["none given"] * 2
    assert scores.values[2].tolist() == [11, 2, 7]


BAD = """
import asyncio
def f(prompts, completions):
    out = []
    for text in completions:
        if text == "raise": raise KeyError("here")
        if text == "exit": raise SystemExit(3)
        out.append({"nan": float("nan"), "inf": float("-inf"), "none": None, "text": "x"}.get(text, 1.0))
    return out[1:] if "short" in completions else out
"""


def test_what_a_function_does_wrong_costs_the_row_alone(tmp_path):
    texts = ["fine", "raise", "nan", "none", "text", "short", "exit", "fine", "inf"]
    scores = load_function(file_of(tmp_path, BAD), 5).score(["q"] * 9, [[text] for text in texts])
    named = [None, "raised", "NaN", "none given", "no number", "wrong length", "raised", None, "infinite"]
    assert kinds(scores) == [[kind] for kind in named]
    assert "KeyError: 'here'" in str(scores.reasons[1][0])
    assert scores.values[[0, 7]].tolist() == [[1], [1]]
    assert scores.values[1:7].isnan().all()
    assert scores.counts()["raised"] == 2


def test_a_function_that_hangs_is_left_after_a_while():
    hang = threading.Event()

    def f(prompts, completions):
        hang.wait(5 if "slow" in completions[0] else 0)
        return [1.0] * len(completions)

    texts = ["slow"] * 5
    scores = Function("f", f, (), "f", timeout=0.03).score(["q"] * 5, [[text] for text in texts])
    assert kinds(scores) == [["timed out"], ["timed out"], ["not asked"], ["not asked"], ["not asked"]]
    scores = Function("f", f, (), "f", timeout=0.03).score(["q"] * 3, [["slow"], ["a"], ["b"]])
    assert kinds(scores) == [["timed out"], [None], [None]]
    hang.set()


def test_asynchronous_functions_and_files_that_are_none(tmp_path):
    spec = file_of(tmp_path, "async def f(completions, **kwargs): return [2.0] * len(completions)")
    assert load_function(spec, 5).score(["q"], [["a"]]).values.item() == 2
    with pytest.raises(UserError, match="no function g; its functions are f"):
        load_function(spec[:-1] + "g", 5)
    with pytest.raises(UserError, match="is no file"):
        load_function("absent.py:f", 5)
    with pytest.raises(UserError, match="cannot be imported: SyntaxError"):
        load_function(file_of(tmp_path, "def f("), 5)
    with pytest.raises(UserError, match="expected a function of"):
        load_function(file_of(tmp_path, "def f(x): return x"), 5)


# ---------------------------------------------------------------------------------------------------------
# Ensembles


def fixed(values, name="fixed"):
    table = iter(values)

    class Fixed:
        columns, key = (), name

        def score(self, prompts, answers, columns=None):
            return by_answer(lambda p, a, c: [next(table) for _ in a], prompts, answers)

    Fixed.name = name
    return Fixed()


def test_ensembles():
    values = torch.tensor([[[1.0, 2.0]], [[3.0, -2.0]], [[5.0, 0.0]]], dtype=torch.float64)
    std = (8 / 3) ** 0.5
    assert combined(values, "mean", 1).tolist() == [[3, 0]]
    assert combined(values, "min", 1).tolist() == [[1, -2]]
    assert combined(values, "mean_minus_std", 0.5).tolist() == [pytest.approx([3 - std / 2, -std / 2])]
    members = fixed([1.0, 2.0], "one"), fixed([3.0, NoScore("raised", "x")], "two")
    scores = Ensemble(members, "min").score(["q"], [["a", "b"]])
    assert scores.values[0, 0] == 1
    assert scores.values[0, 1].isnan()
    assert str(scores.reasons[0][1]) == "raised: two, x"


# ---------------------------------------------------------------------------------------------------------
# Reward models


def reward_model(folder, *, template=CHATML, pad=None, **options):
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer(chat_template=template)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, **SHAPE | options)
    config.pad_token_id = pad
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad", [None, 1])
def test_a_reward_model_scores_as_transformers_does_alone(tmp_path, pad):
    scorer = load_classifier(reward_model(tmp_path, pad=pad), CPU, 2, None)
    scores = scorer.score(PROMPTS, ANSWERS)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    for p, prompt in enumerate(PROMPTS):
        for k, answer in enumerate(ANSWERS[p]):
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            turns = [*turns, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                alone = model(**ids).logits.item()
            assert scores.values[p, k].item() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert scores.values[2].unique().numel() == 3


@pytest.mark.parametrize("pad", [None, 1])  # 1 is the EOS too: transformers then reads the token before it
def test_without_a_template_the_answer_stands_behind_the_prompt(tmp_path, pad):
    scorer = load_classifier(reward_model(tmp_path, template=None, pad=pad), CPU, 2, None)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    scores = scorer.score(PROMPTS[:2], ANSWERS[:2])
    assert kinds(scores)[1] == ["template", "no answer"]
    ids = scorer.tokenizer(PROMPTS[0] + "green")["input_ids"] + [scorer.tokenizer.eos_token_id]
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([ids])).logits.item()
    assert scores.values[0, 0].item() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_prompt_runs_once_for_all_its_answers(tmp_path, monkeypatch, template):
    """Eight answers to a prompt four times as long: 12 parts of tokens where eight rows have 40."""
    scorer = load_classifier(reward_model(tmp_path, template=template), CPU, 16, None)
    ran = []
    real = classifier.pack
    monkeypatch.setattr(classifier, "pack", lambda groups: ran.append(real(groups)) or ran[-1])
    prompts = ["what colour is the sky? " * 12, "and the sea? " * 24]
    answers = [[f"{word} {i} it is " * 3 for i in range(8)] for word in ("blue", "green")]
    together = scorer.score(prompts, answers).values
    tokens = sum(one.input_ids.numel() for one in ran)
    ran.clear()
    alone = [[scorer.score([p], [[a]]).values.item() for a in own] for p, own in zip(prompts, answers, strict=True)]
    assert tokens <= 0.35 * sum(one.input_ids.numel() for one in ran)
    assert torch.allclose(together, torch.tensor(alone, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert scorer.shares


def test_a_model_that_takes_no_flat_batch_is_padded(tmp_path, monkeypatch):
    path = reward_model(tmp_path)
    flat = load_classifier(path, CPU, 3, None).score(PROMPTS, ANSWERS)
    monkeypatch.setattr(classifier, "can_share", lambda model: False)
    padded = load_classifier(path, CPU, 3, None)
    assert not padded.shares
    assert torch.allclose(padded.score(PROMPTS, ANSWERS).values, flat.values, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_adapters_of_a_reward_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    path = reward_model(tmp_path / "base")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(LlamaForSequenceClassification.from_pretrained(path), lora).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapters")
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "adapters")
    scores = load_classifier(str(tmp_path / "adapters"), CPU, 2, None).score(PROMPTS[:1], ANSWERS[:1])
    turns = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": ANSWERS[0][0]}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert scores.values[0, 0].item() == pytest.approx(model(**ids).logits.item(), rel=1e-4, abs=1e-5)


def test_what_a_reward_model_cannot_read_is_named(tmp_path):
    path = reward_model(tmp_path, max_position_embeddings=24)
    scorer = load_classifier(path, CPU, 4, None)
    assert kinds(scorer.score(["the sky?"] * 2, [["blue"], ["green " * 40]])) == [[None], ["too long"]]
    scorer.tokenizer.add_tokens(["zebra"])
    assert kinds(scorer.score(["the sky?"] * 2, [["blue"], ["zebra"]])) == [[None], ["vocabulary"]]
    scorer.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert kinds(scorer.score(["the sky?"], [["blue"]])) == [["template"]]


def test_folders_that_are_no_reward_model(tmp_path):
    config = LlamaConfig(vocab_size=300, num_labels=2, **SHAPE)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has 2 labels"):
        load_classifier(str(tmp_path / "two"), CPU, 2, None)
    config = settings("eval", model_name_or_path="-", dataset_name="-", eval_fraction=1.0, loss_type="sft")
    for spec in ("absent", "exac=answer", str(tmp_path)):
        with pytest.raises(UserError, match=r"scorer|reward model"):
            scorer_of([spec], config, CPU)


def test_scores_are_kept_by_content(tmp_path, monkeypatch):
    path = reward_model(tmp_path / "model")
    first = load_classifier(path, CPU, 2, tmp_path / "cache").score(PROMPTS, ANSWERS)
    (file,) = (tmp_path / "cache").iterdir()
    asked = []
    real = classifier.Classifier.shared

    def counted(self, groups):
        asked.extend(ids for own in groups for ids in own)
        return real(self, groups)

    monkeypatch.setattr(classifier.Classifier, "shared", counted)
    again = load_classifier(path, CPU, 2, tmp_path / "cache").score(PROMPTS, ANSWERS)
    assert not asked
    assert torch.equal(again.values.nan_to_num(9), first.values.nan_to_num(9))
    # A crash cuts the last line off, and something damages one: those two are asked for again, alone.
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([b"{]\n", *lines[1:-1], lines[-1][:30]]))
    again = load_classifier(path, CPU, 2, tmp_path / "cache").score(PROMPTS, ANSWERS)
    assert len(asked) == 2
    assert torch.allclose(again.values, first.values, equal_nan=True)  # in another batch
    load_classifier(path, CPU, 2, tmp_path / "cache").score(PROMPTS, ANSWERS)
    assert len(asked) == 2
    # Other weights are another scorer.
    model = LlamaForSequenceClassification.from_pretrained(path)
    model.score.weight.data.neg_()
    model.save_pretrained(path)
    other = load_classifier(path, CPU, 2, tmp_path / "cache").score(PROMPTS, ANSWERS)
    assert len(asked) == 8
    assert torch.allclose(other.values.nan_to_num(0), -first.values.nan_to_num(0))


def test_a_cache_in_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="score_cache: cannot use"):
        Cache(tmp_path / "file", "x")


def test_scores_are_a_type(tmp_path):
    config = settings(
        "eval", model_name_or_path="-", dataset_name="-", eval_fraction=1.0, loss_type="sft", scorer_combine="min"
    )
    ones = file_of(tmp_path, "def f(completions, **k): return [1] * len(completions)")
    scorer = scorer_of([ones, "length"], config, CPU)
    scores = scorer.score(PROMPTS, ANSWERS)
    assert isinstance(scores, Scores)
    assert scores.values[0].nan_to_num(9).tolist() == [1, 1, 9]


def test_a_causal_lm_is_refused_without_a_table(tmp_path, monkeypatch):
    """transformers would print one of all that the weights lack."""
    from transformers.utils import logging

    said = []
    logging.set_verbosity_warning()
    monkeypatch.setattr(logging.get_logger(), "handle", said.append)
    monkeypatch.setattr(logging.get_logger("transformers.modeling_utils"), "handle", said.append)
    with pytest.raises(UserError, match=r"is no reward model: its weights lack score\.weight"):
        load_classifier(save_model(tmp_path / "model"), torch.device("cpu"), 4, None)
    assert not said
    assert logging.get_verbosity() == logging.WARNING
