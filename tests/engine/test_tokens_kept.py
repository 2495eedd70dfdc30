"""Templates of many sorts, none of them shipped anywhere: what each keeps of a row trains, with texts written by hand,
and what it drops, doubles or rewrites refuses the row, also where the text stands elsewhere by chance."""

import json
import logging

import pytest

from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.templates import TextOptions, _say_once
from tiny_tokenizer import tiny_tokenizer

USER = {"role": "user", "content": "Q1"}
ASKED = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
ADD = {"type": "function", "function": {"name": "add", "description": "Sums 4.", "parameters": {"type": "object"}}}
MUL = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}


def answer(content="A1", **more):
    return {"role": "assistant", "content": content, **more}


def calling(arguments, content=""):
    return answer(content, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": arguments}}])


def template(body="{{ m.content }}", opening="", tools=True):
    """Turns in ChatML's frame: `body` writes one, `opening` begins the answer."""
    return (
        ("{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" if tools else "")
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )  # fmt: skip


def only(role, body="{{ m.content }}"):
    """A template that drops the contents of `role`."""
    return template("{% if m.role != '" + role + "' %}" + body + "{% endif %}")


CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments }}</call>{% endfor %}"
NAMES = "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
REASONS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
SYSTEM = {"role": "system", "content": "a"}
RESULT = {"role": "tool", "content": "4"}

# (template, messages, tools): what the reason of the refusal says.
REFUSED = {
    "a result of one character": (only("tool"), [USER, answer("Q?"), RESULT, answer()], 'text of a "tool" turn'),
    "a system turn of one character": (only("system"), [SYSTEM, USER, answer()], 'text of a "system" turn'),
    "a short developer turn": (
        only("developer"), [{"role": "developer", "content": "sta"}, USER, answer()],
        'Fix: name the role "developer" "system"',
    ),
    "a call without arguments, whose name stands among the tools": (
        template(), [USER, calling({}), RESULT, answer()], 'drops or rewrites the tool call "add"',
    ),
    "the arguments of an earlier call": (template(NAMES), [USER, calling({"a": 1}), RESULT, answer()], 'call "add"'),
    "the arguments of an answer's call": (template(NAMES), [USER, calling({"a": 1})], 'text of "completion": the tool'),
    "the same as JSON text": (template(NAMES), [USER, calling('{"a":1}')], 'text of "completion": the tool call "add"'),
    "what is said beside a call": (
        template("{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}"),
        [USER, calling({"b": "c"}, content="add")], "assistant",
    ),
    "lines of an answer": (
        template("{{ m.content | replace('\n', ' ') }}"), [USER, answer("def f():\n    return 1")], "its text",
    ),
    "blanks within an answer": (
        template("{{ m.content.split() | join(' ') }}"), [USER, answer("a  b\n\nc")], "its text",
    ),
    "a tag in brackets that the template writes too": (
        template("{{ '[THINK]' if m.role == 'assistant' }}{{ m.content }}", "[THINK]"),
        [USER, answer("[THINK]six[/THINK]A1")], "writes [THINK] for",
    ),
    "reasoning_content with tags of its own": (
        template(REASONS), [USER, answer(reasoning_content="<think>\nsix\n</think>")], "Fix: leave its tags out",
    ),
    "reasoning_content that ends its thought itself": (
        template(REASONS), [USER, answer(reasoning_content="six\n</think>")], "writes </think> for",
    ),
    "a thought behind the empty one of the generation prompt": (
        template("{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}", "<think>\n\n</think>\n\n"),
        [USER, answer("<think>\nsix\n</think>\n\nA1")], "it would stand twice",
    ),
    "two user turns in a row": (
        "{% if messages[0].role == messages[1].role %}{{ raise_exception('roles must alternate') }}{% endif %}"
        + template(),
        [USER, USER, answer()], "the chat template refuses it: roles must alternate",
    ),
}  # fmt: skip

# (template, messages): the prompt, and the completion.
KEPT = {
    "a tag in brackets that stands in the generation prompt": (
        template(opening="[THINK]"), [USER, answer("[THINK]six[/THINK]A1")],
        ASKED + "[THINK]", "six[/THINK]A1<|im_end|>",
    ),
    "<seed:think> in the generation prompt": (
        template(opening="<seed:think>"), [USER, answer("<seed:think>six</seed:think>A1")],
        ASKED + "<seed:think>", "six</seed:think>A1<|im_end|>",
    ),
    "tags that are no reasoning": (
        template(REASONS), [USER, answer("<b>A1</b>", reasoning_content="<b>six</b> <b>sevens</b>")],
        ASKED, "<think>\n<b>six</b> <b>sevens</b>\n</think>\n\n<b>A1</b><|im_end|>",
    ),
    "a thought whose blanks the template writes anew": (
        template("{{ m.content | replace('<think>', '<think>\n') | replace('</think>', '\n</think>\n\n') }}"),
        [USER, answer("<think>six</think>A1")], ASKED, "<think>\nsix\n</think>\n\nA1<|im_end|>",
    ),
    "blanks at the ends": (template("{{ m.content | trim }}"), [USER, answer("\n A1 \n")], ASKED, "A1<|im_end|>"),
    "arguments as Python writes them": (
        template("{{ m.content }}" + CALLS), [USER, calling({"a": True})], ASKED,
        "<call>add{'a': True}</call><|im_end|>",
    ),
    "a call without arguments": (
        template("{{ m.content }}" + CALLS), [USER, calling({})], ASKED, "<call>add{}</call><|im_end|>",
    ),
    "a call whose content is null, by a template that asks for one": (
        template("{{ '' + m.content }}" + CALLS), [USER, calling({"a": 1}, content=None)], ASKED,
        "<call>add{'a': 1}</call><|im_end|>",
    ),
    "two starts of the text": (
        "{{ bos_token }}{{ bos_token }}" + template(), [USER, answer()], "<s><s>" + ASKED, "A1<|im_end|>",
    ),
    "the system turn at the end": (
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}"
        "{{ '[system]' + messages[0].content if loop.first }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt }}",
        [{"role": "system", "content": "S1"}, USER, answer()], "[user]Q1[system]S1[assistant]", "A1</s>",
    ),
}  # fmt: skip


def load(tmp_path, chat_template, messages, tools=None):
    path = tmp_path / "rows.json"
    row = {"prompt": messages[:-1], "completion": messages[-1:]} | ({"tools": tools} if tools else {})
    path.write_text(json.dumps([row]), encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    return tokenizer, load_examples(str(path), "sft", tokenizer, 4096, text=TextOptions(turns="last")).examples


@pytest.mark.parametrize(("chat_template", "messages", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_template_drops_doubles_or_rewrites_refuses_the_row(tmp_path, chat_template, messages, said):
    with pytest.raises(DataError) as error:
        load(tmp_path, chat_template, messages, [ADD])
    assert said in str(error.value).splitlines()[-1]


@pytest.mark.parametrize(("chat_template", "messages", "prompt", "completion"), KEPT.values(), ids=KEPT)
def test_what_a_template_keeps_trains(tmp_path, chat_template, messages, prompt, completion):
    tokenizer, (example,) = load(tmp_path, chat_template, messages)
    assert (tokenizer.decode(example.prompt), tokenizer.decode(example.completion)) == (prompt, completion)


@pytest.mark.parametrize(
    ("chat_template", "tools", "unseen"),
    [
        (template(tools=False), [ADD], "add"),
        (template(tools=False), [{"type": "function", "function": {"name": "user"}}], "user"),  # a word of the text
        (template().replace("tools | tojson", "tools[0] | tojson"), [ADD, MUL], "multiply"),
        (template(), [ADD, MUL], None),
        ("{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + template(tools=False), [ADD], None),
    ],
    ids=["none is printed", "a name that stands elsewhere", "the first alone", "all", "it asks for tools"],
)
def test_tools_that_the_template_does_not_print_are_said(tmp_path, caplog, chat_template, tools, unseen):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        load(tmp_path, chat_template, [USER, answer()], tools)
    said = [r.getMessage() for r in caplog.records if '"tools"' in r.getMessage()]
    expected = f'the chat template does not print all "tools" of the rows ({unseen}): the model will not see them'
    assert said == ([] if unseen is None else [expected])


HEADER = "<|im_start|>assistant\n"
HEADERS = {  # the template, and the header that answers are learned with
    "ignored": (template().partition("{% if add_generation_prompt")[0], HEADER),
    "honoured": (template(), None),
    "none that is needed, as Mistral's": (
        "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
        "{% endfor %}",
        None,
    ),
}


@pytest.mark.parametrize(("chat_template", "header"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_learned_is_said_once_with_the_fix(tmp_path, caplog, chat_template, header):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for text in ("A1", "A2"):
            load(tmp_path, chat_template, [USER, answer(text)])
    said = [r.getMessage() for r in caplog.records if "add_generation_prompt" in r.getMessage()]
    assert len(said) == (header is not None)
    if header is not None:
        fix = said[0].partition("or end this one with ")[2]
        assert fix.endswith("{% endif %}")
        _say_once.cache_clear()
        caplog.clear()
        load(tmp_path, chat_template + fix, [USER, answer()])
        assert not caplog.records  # the fix that it names is one


def test_blanks_that_a_template_trims_are_said_once(tmp_path, caplog):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for text in ("A1", "\nA1", " A1"):
            load(tmp_path, template("{{ m.content | trim }}"), [USER, answer(text)])
    assert [r.getMessage() for r in caplog.records] == [
        "the chat template trims white space at the ends of answers: they are learned as it writes them"
    ]


def test_marked_answers_that_lose_their_reasoning_when_others_follow_are_examples_of_their_own(
    tmp_path,
):
    marked = template(
        "{% if m.role == 'assistant' %}{% generation %}{% if loop.last and m.reasoning_content %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    ).replace("{% endif %}<|im_end|>\n{% endfor %}", "{% endif %}{{ '\n' }}{% endfor %}")
    turns = [USER, answer(reasoning_content="six"), USER | {"content": "Q2"}, answer("A2", reasoning_content="two")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": turns}]), encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=marked)
    first, second = load_examples(str(path), "sft", tokenizer, 4096).examples
    assert (tokenizer.decode(first.prompt), tokenizer.decode(first.completion)) == (
        ASKED,
        "<think>six</think>A1<|im_end|>",
    )
    assert tokenizer.decode(second.prompt) == ASKED + "A1<|im_end|>\n" + ASKED.replace("Q1", "Q2")
    assert tokenizer.decode(second.completion) == "<think>two</think>A2<|im_end|>"
