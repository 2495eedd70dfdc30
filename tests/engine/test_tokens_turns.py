"""Which answers of a conversation are learned: all, in the form in which the template writes them where they are
trained, but for those whose weight is 0."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefuse.engine.data import DataError, Demonstration, load_examples
from prefuse.engine.data.templates import TextOptions
from tiny_tokenizer import CHATML, tiny_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3: a thought, empty here, stands before the last answer alone.
LAST_THINKS = CHATML.replace(
    "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content }}"
)


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


TURNS = [user("u1"), answer("a1"), user("u2"), answer("a2")]


def load(tmp_path, rows, template=CHATML, kind="sft", **options):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=template)
    return tokenizer, load_examples(str(path), kind, tokenizer, 4096, text=TextOptions(**options)).examples


def learned(tokenizer, example):
    """The learned spans of a completion, as texts."""
    flags = example.learned or [True] * len(example.completion)
    spans, last = [], False
    for token, is_learned in zip(example.completion, flags, strict=True):
        if is_learned:
            spans = [*spans[:-1], [*spans[-1], token]] if last else [*spans, [token]]
        last = is_learned
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["ChatML", "{% generation %}"])
def test_all_answers_are_learned_and_nothing_between_them(tmp_path, template):
    tokenizer, (example,) = load(tmp_path, [{"messages": TURNS}], template)
    assert tokenizer.decode(example.prompt) == "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.prompt + example.completion) == whole.removesuffix("\n")
    assert learned(tokenizer, example) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_the_last_answer_alone_by_a_setting_and_in_preferences(tmp_path):
    tokenizer, (example,) = load(tmp_path, [{"messages": TURNS}], turns="last")
    assert (tokenizer.decode(example.completion), example.learned) == ("a2<|im_end|>", None)
    _, (labelled,) = load(tmp_path, [{"messages": TURNS, "label": True}], kind="labelled")
    assert (labelled.prompt, labelled.completion) == (example.prompt, example.completion)
    _, (good,) = load(tmp_path, [{"messages": TURNS, "label": True}])
    assert good == example.__class__(example.prompt, example.completion, good.row)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["ChatML", "{% generation %}"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}])
def test_turns_without_weight_are_not_learned(tmp_path, template, mark):
    first = [user("u1"), answer("a1", **mark), user("u2"), answer("a2", weight=1)]
    last = [user("u1"), answer("a1"), user("u2"), answer("a2", **mark)]
    tokenizer, (one, two) = load(tmp_path, [{"messages": first}, {"messages": last}], template)
    assert learned(tokenizer, one) == ["a2<|im_end|>"]
    assert tokenizer.decode(one.prompt).endswith(
        "a1<|im_end|>\n<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert learned(tokenizer, two) == ["a1<|im_end|>"]
    assert tokenizer.decode(two.completion) == "a1<|im_end|>"


def test_a_row_without_a_turn_to_learn_is_named(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"messages": TURNS}, {"messages": [user("u1"), answer("a1", weight=0)]}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    (skipped,) = load_examples(str(path), "sft", tiny_tokenizer(chat_template=CHATML), 4096).skipped
    assert skipped.reason == 'no turn to learn: each answer of "completion" has weight 0'


UNLEARNED = answer("a1", weight=0)
SIDES = {"prompt": [user("u1")], "chosen": [answer("a")], "rejected": [answer("b")]}


@pytest.mark.parametrize(
    ("kind", "row", "options"),
    [
        ("sft", {"messages": [user("u1"), UNLEARNED]}, {"turns": "last"}),
        ("sft", {"prompt": [user("u1")], "completion": [UNLEARNED]}, {}),
        ("labelled", {"prompt": [user("u1")], "completion": [UNLEARNED], "label": True}, {}),
        ("pair", {**SIDES, "chosen": [UNLEARNED]}, {}),
        ("pair", {**SIDES, "rejected": [UNLEARNED, user("u2"), answer("a2")]}, {"multi_turn": "first"}),
    ],
    ids=["the last alone", "prompt and completion", "labelled", "a pair", "the first of several"],
)
def test_an_answer_without_weight_is_never_learned(tmp_path, kind, row, options):
    with pytest.raises(DataError, match=r'no turn to learn: each answer of "\w+" has weight 0'):
        load(tmp_path, [row], kind=kind, **options)


def test_answers_without_weight_within_a_completion_of_several_turns_are_not_learned(tmp_path):
    row = {"prompt": [user("u1")], "completion": [UNLEARNED, user("u2"), answer("a2")]}
    tokenizer, (example,) = load(tmp_path, [row])
    assert learned(tokenizer, example) == ["a2<|im_end|>"]
    whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    assert tokenizer.decode(example.prompt + example.completion) == whole.removesuffix("\n")


def test_answers_that_the_template_writes_otherwise_when_they_are_last_are_examples_of_their_own(tmp_path):
    """Each is trained as the model gives it: behind its own prompt, in the form of a last answer."""
    tokenizer, examples = load(tmp_path, [{"messages": TURNS}], LAST_THINKS)
    assert [example.row for example in examples] == ["rows.json:0"] * 2
    for example, turns in zip(examples, (TURNS[:2], TURNS), strict=True):
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        assert example.prompt == tokenizer(prompt, add_special_tokens=False).input_ids
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokenizer.decode(example.prompt + example.completion) == whole.removesuffix("\n")
        assert example.learned is None


def test_a_calling_turn_its_result_and_the_answer_are_one_example(tmp_path):
    template = CHATML.replace(
        "<|im_end|>", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [user("u1"), answer("", tool_calls=[call]), {"role": "tool", "content": "t"}, answer("a1")]
    tokenizer, (example,) = load(tmp_path, [{"messages": turns}], template)
    assert learned(tokenizer, example) == ["look<|im_end|>", "a1<|im_end|>"]


roles = st.lists(
    st.tuples(st.booleans(), st.text("ab é字", min_size=1, max_size=5).filter(str.strip)), min_size=1, max_size=5
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges=roles)
def test_the_learned_ids_are_those_of_the_answers_with_weight(tmp_path, exchanges):
    turns = []
    for keep, text in [*exchanges, (True, "end")]:
        turns += [user("q" + text), answer(text, weight=int(keep))]
    tokenizer, (example,) = load(tmp_path, [{"messages": turns}])
    assert learned(tokenizer, example) == [f"{t}<|im_end|>" for keep, t in [*exchanges, (True, "end")] if keep]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(example.prompt + example.completion) == whole.removesuffix("\n")


def test_trl_s_way_learns_what_stands_behind_the_stop_token(tmp_path):
    tokenizer, (example,) = load(tmp_path, [{"messages": TURNS[:2]}], learn_after_stop=True)
    assert tokenizer.decode(example.completion) == "a1<|im_end|>\n"


def test_an_unlearned_token_has_no_part_in_the_loss(tmp_path):
    from prefuse.engine.data.batches import collate, examples_of

    _, examples = load(tmp_path, [{"messages": TURNS}])
    batch = collate(examples_of(examples), [0])
    assert batch.targets.ge(0).tolist() == examples[0].learned
    assert batch.num_learned == sum(examples[0].learned)


# ---------------------------------------------------------------------------------------------------------
# Pairs that differ before the last turn

PAIR = {
    "prompt": [user("u1")],
    "chosen": [answer("a1"), user("u2"), answer("a2")],
    "rejected": [answer("b1"), user("u2"), answer("b2")],
}


def test_a_pair_that_differs_before_the_last_turn_is_refused_with_the_fix(tmp_path):
    with pytest.raises(DataError, match=r"a turn from .user., expected assistant turns only. Fix: --multi_turn"):
        load(tmp_path, [PAIR], kind="pair")


def test_such_pairs_in_their_first_answers_or_in_all(tmp_path):
    tokenizer, (first,) = load(tmp_path, [PAIR], kind="pair", multi_turn="first")
    assert (tokenizer.decode(first.chosen), tokenizer.decode(first.rejected)) == ("a1<|im_end|>", "b1<|im_end|>")
    _, examples = load(tmp_path, [PAIR], kind="pair", multi_turn="all")
    (pair,), flags = examples, examples.learned_of(0).tolist()
    for ids, own, words in (
        (pair.chosen, flags[: len(pair.chosen)], ("a1", "a2")),
        (pair.rejected, flags[len(pair.chosen) :], ("b1", "b2")),
    ):
        turns = [user("u1"), answer(words[0]), user("u2"), answer(words[1])]
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        assert tokenizer.decode(pair.prompt + ids) == whole
        assert learned(tokenizer, Demonstration(pair.prompt, ids, "", own)) == [f"{word}<|im_end|>" for word in words]


def test_the_loss_of_such_a_pair_is_that_of_its_answers_alone(tmp_path):
    """ln 2 at the start, and no gradient from the turns between the answers: the targets say so."""
    from prefuse.engine.train import train
    from tiny_run import read_log, save_model, settings, write_rows

    rows = write_rows(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": [user("other")]}])
    changes = {"model_name_or_path": save_model(tmp_path / "model"), "dataset_name": rows, "max_length": 256}
    train(settings(**changes, output_dir=str(tmp_path / "run"), multi_turn="all", max_steps=2), "train")
    first, second = (line["loss"] for line in read_log(tmp_path / "run") if "loss" in line)
    assert first == pytest.approx(0.6931472, abs=1e-5)
    assert second < first


@pytest.mark.parametrize("name", ["weight", "train", "loss_weight"])
def test_a_turn_is_learned_or_not_and_other_weights_are_refused(tmp_path, name):
    def rows(value):
        return [
            {"messages": [user("u1"), answer("a1", **{name: value}), user("u2"), answer("a2")]},
            {"messages": TURNS},
        ]

    for value, expected in ((0, ["a2"]), (False, ["a2"]), ("0", ["a2"]), ("False", ["a2"]), (1.0, ["a1", "a2"])):
        tokenizer, examples = load(tmp_path, rows(value))
        assert learned(tokenizer, examples[0]) == [f"{text}<|im_end|>" for text in expected], value
    for value in (0.5, 2, -1, "half", [1]):
        with pytest.raises(DataError, match=rf'"{name}" of a "assistant" turn .* is .*; expected 1 or true'):
            load(tmp_path, rows(value)[:1])
