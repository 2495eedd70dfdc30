"""Which answers of a conversation are learned: all, in the form in which the template writes them where they are
trained, but for those whose weight is 0."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefuse.engine.data import load_examples
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
    assert skipped.reason == "no turn to learn: each of its answers has weight 0"


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
