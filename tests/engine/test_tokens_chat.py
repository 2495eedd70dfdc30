"""Conversations -> text: what a chat template does to a row is used, or refuses the row by name with the fix."""

import dataclasses
import datetime
import json

import pytest

from prefuse.engine.config.yaml_file import write_yaml
from prefuse.engine.data import DataError, load_examples, load_prompts
from prefuse.engine.data.dataset import day_of_run, text_options
from prefuse.engine.data.templates import TextOptions
from tiny_run import settings
from tiny_tokenizer import CHATML, tiny_tokenizer

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = "<think>\nsix sevens\n</think>\n\nThe answer is 42."
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
# The generation prompt opens <think>, as that of QwQ, and closes it where thinking is off, as that of Nemotron 3.
THINKING = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{{ '\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)
CURABLE = THINKING.replace(
    TURN,
    "<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and "
    "(enable_thinking is defined and not enable_thinking) }}{{ m.content }}<|im_end|>\n",
)
APART = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}",
)
ALWAYS_OPENS = CHATML.replace(
    "{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def answer(content="A", **more):
    return {"role": "assistant", "content": content, **more}


def load(tmp_path, rows, template, kind="sft", options=None, bos=True):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=template, bos=bos)
    dataset = load_examples(str(path), kind, tokenizer, 4096, text=options)
    return tokenizer, dataset


def texts(tmp_path, row, template, options=None):
    tokenizer, dataset = load(tmp_path, [row], template, options=options)
    (example,) = dataset.examples
    return tokenizer.decode(example.prompt), tokenizer.decode(example.completion)


def refusal(tmp_path, row, template, options=None):
    with pytest.raises(DataError) as error:
        load(tmp_path, [row], template, options=options)
    return str(error.value)


def test_an_answer_whose_opening_think_stands_in_the_generation_prompt_trains(tmp_path):
    prompt, completion = texts(tmp_path, {"messages": [USER, answer(THOUGHT)]}, THINKING)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert completion == "six sevens\n</think>\n\nThe answer is 42.<|im_end|>"


def test_a_plain_answer_behind_an_opened_think_names_the_argument_that_helps(tmp_path):
    row = {"messages": [USER, answer()]}
    assert """Fix: --chat_template_kwargs '{"enable_thinking": false}'""" in refusal(tmp_path, row, CURABLE)
    options = TextOptions(arguments={"enable_thinking": False})
    prompt, completion = texts(tmp_path, row, CURABLE, options)
    assert (prompt[-19:], completion) == ("<think>\n\n</think>\n\n", "A<|im_end|>")
    by_row = texts(tmp_path, row | {"chat_template_kwargs": {"enable_thinking": False}}, CURABLE)
    assert by_row == (prompt, completion)


@pytest.mark.parametrize("name", ["reasoning", "use_thoughts_thinking"])
def test_an_argument_of_any_name_that_the_template_reads_is_tried(tmp_path, name):
    template = CURABLE.replace("enable_thinking", name)
    said = refusal(tmp_path, {"messages": [USER, answer()]}, template)
    assert f"""Fix: --chat_template_kwargs '{{"{name}": false}}'""" in said


def test_where_no_argument_helps_the_refusal_says_so(tmp_path):
    assert "No argument of the template helps" in refusal(tmp_path, {"messages": [USER, answer()]}, THINKING)


def test_reasoning_content_is_used_where_the_template_prints_it_and_refused_where_it_vanishes(tmp_path):
    row = {"messages": [USER, answer(reasoning_content="six sevens")]}
    assert texts(tmp_path, row, APART)[1] == "<think>\nsix sevens\n</think>\n\nA<|im_end|>"
    said = refusal(tmp_path, row, CHATML)
    assert 'its "reasoning_content"' in said
    assert "Fix: put the reasoning into the content, between <think> and </think>" in said


def test_reasoning_that_vanishes_from_the_content_is_refused_with_the_fix(tmp_path):
    said = refusal(tmp_path, {"messages": [USER, answer(THOUGHT)]}, APART)
    assert "its reasoning" in said
    assert 'Fix: put the reasoning into "reasoning_content"' in said


def test_a_think_that_would_stand_twice_is_refused(tmp_path):
    assert "it would stand twice" in refusal(tmp_path, {"messages": [USER, answer(THOUGHT)]}, ALWAYS_OPENS)
    assert texts(tmp_path, {"messages": [USER, answer()]}, ALWAYS_OPENS)[1].count("<think>") == 1


def test_system_text_that_only_the_last_user_turn_prints_is_kept_there(tmp_path):
    """The prompt is what the template writes at inference; the answer follows it."""
    prompt, completion = texts(tmp_path, {"messages": [SYSTEM, USER, answer()]}, MISTRAL)
    assert (prompt, completion) == ("<s>[INST] Be brief.\n\nQ[/INST]", " A</s>")


@pytest.mark.parametrize("role", ["system", "developer", "user", "tool"])
def test_a_turn_of_the_prompt_that_vanishes_refuses_the_row(tmp_path, role):
    template = CHATML.replace("for m in messages", f"for m in messages if m.content != 'gone' or m.role != '{role}'")
    row = {"messages": [{"role": role, "content": "gone"}, USER, answer()]}
    said = refusal(tmp_path, row, template)
    assert f'the text of a "{role}" turn' in said
    assert ('Fix: name the role "developer" "system"' in said) == (role == "developer")


def test_a_default_system_prompt_is_the_first_turn_of_conversations_without_one(tmp_path):
    options = TextOptions(system_prompt="Be kind.")
    with_own, without = ([SYSTEM, USER, answer()], [USER, answer()])
    assert "Be kind." not in texts(tmp_path, {"messages": with_own}, CHATML, options)[0]
    assert texts(tmp_path, {"messages": without}, CHATML, options)[0].startswith(
        "<|im_start|>system\nBe kind.<|im_end|>"
    )


# ---------------------------------------------------------------------------------------------------------
# Tools

TOOL_ROWS = {
    "tools in the prompt": {"prompt": [USER], "completion": [answer()], "tools": [ADD]},
    "a call, content null": {"prompt": [USER], "completion": [answer(None, tool_calls=[CALL])], "tools": [ADD]},
    "a call, content empty": {"prompt": [USER], "completion": [answer("", tool_calls=[CALL])], "tools": [ADD]},
    "a call in the history": {
        "prompt": [USER, answer(None, tool_calls=[CALL]), {"role": "tool", "content": "1"}],
        "completion": [answer()],
        "tools": [ADD],
    },
}


@pytest.mark.parametrize("row", TOOL_ROWS.values(), ids=TOOL_ROWS)
@pytest.mark.parametrize("as_text", [False, True], ids=["a list", "JSON text"])
def test_rows_with_tools_have_the_ids_that_trl_gives_them(tmp_path, row, as_text):
    """But for the newline behind the stop token, which TRL trains."""
    from trl.data_utils import apply_chat_template

    given = row | {"tools": json.dumps(row["tools"])} if as_text else row
    tokenizer, dataset = load(tmp_path, [given], TOOLS_TEMPLATE)
    (example,) = dataset.examples
    theirs = apply_chat_template({k: row[k] for k in ("prompt", "completion")}, tokenizer, tools=row["tools"])
    assert example.prompt == tokenizer(theirs["prompt"], add_special_tokens=False).input_ids
    assert [*example.completion, *tokenizer("\n", add_special_tokens=False).input_ids] == tokenizer(
        theirs["completion"], add_special_tokens=False
    ).input_ids
    assert "add" in tokenizer.decode(example.prompt)


def test_a_call_without_a_trace_in_the_text_refuses_the_row(tmp_path):
    said = refusal(tmp_path, TOOL_ROWS["a call, content empty"], CHATML)
    assert 'the tool call "add"' in said
    assert 'the tool call "add"' in refusal(tmp_path, TOOL_ROWS["a call in the history"], CHATML)


def test_nulls_that_arrow_adds_to_arguments_are_removed(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    other = {"type": "function", "function": {"name": "mul", "arguments": {"b": 2}}}
    rows = [{"prompt": [USER], "completion": [answer("", tool_calls=[call])], "tools": [ADD]} for call in (CALL, other)]
    _, from_json = load(tmp_path, rows, TOOLS_TEMPLATE)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    tokenizer = tiny_tokenizer(chat_template=TOOLS_TEMPLATE)
    from_parquet = load_examples(str(tmp_path / "rows.parquet"), "sft", tokenizer, 4096)
    assert from_parquet.fingerprint == from_json.fingerprint
    assert "null" not in tokenizer.decode(from_parquet.examples[0].completion)


def test_sharegpt_names_of_calls_and_results(tmp_path):
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "A"},
    ]
    row = {"conversations": turns, "tools": json.dumps([ADD])}
    same = [USER, answer("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, answer()]
    assert texts(tmp_path, row, TOOLS_TEMPLATE) == texts(tmp_path, {"messages": same, "tools": [ADD]}, TOOLS_TEMPLATE)


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'], ids=["an object", "JSON text"])
@pytest.mark.parametrize(
    ("printed", "expected"),
    [("{{ c.function.arguments | tojson }}", '{"a": 1}'), ("{{ '' + c.function.arguments }}", '{"a": 1}')],
    ids=["for objects", "for text"],
)
def test_arguments_come_in_the_shape_that_the_template_prints(tmp_path, arguments, printed, expected):
    template = TOOLS_TEMPLATE.replace("{{ c.function | tojson }}", "{{ c.function.name }}:" + printed)
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"prompt": [USER], "completion": [answer("", tool_calls=[call])]}
    assert f"<tool_call>add:{expected}</tool_call>" in texts(tmp_path, row, template)[1]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ('{"city":"Oslo","days":2}', '{"city": "Oslo", "days": 2}'),  # as OpenAI writes them, without blanks
        (r'{"city": "M\u00fcnchen", "note": "a \"b\""}', r'{"city": "München", "note": "a \"b\""}'),
        ('{ "deep" : [ {"x":1.50} ] }', '{"deep": [{"x": 1.5}]}'),
        ("{}", "{}"),
    ],
    ids=["no blanks", "escapes", "nested", "none"],
)
def test_arguments_as_json_text_may_be_spelled_otherwise_than_the_template_does(tmp_path, arguments, printed):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"prompt": [USER], "completion": [answer("", tool_calls=[call])], "tools": [ADD]}
    assert f'"arguments": {printed}' in texts(tmp_path, row, TOOLS_TEMPLATE)[1]
    silent = TOOLS_TEMPLATE.replace("{{ c.function | tojson }}", "{{ c.function.name }}")
    if arguments != "{}":
        assert 'drops or rewrites text of "completion": the tool call "add"' in refusal(tmp_path, row, silent)


@pytest.mark.parametrize("result", ['{"temperature":21, "unit": "C"}', 'He said "hi"\nin München', "21"])
@pytest.mark.parametrize("printed", ["m.content", "m.content | tojson"])
def test_results_of_tools_may_be_printed_as_json_text(tmp_path, result, printed):
    """As GPT-OSS and Llama 3.1 print them."""
    template = CHATML.replace("m.content", f"({printed}) if m.role == 'tool' else m.content")
    row = {"messages": [USER, answer("wait"), {"role": "tool", "content": result}, answer()]}
    prompt, completion = texts(tmp_path, row, template)
    said = json.dumps(result, ensure_ascii=False) if "tojson" in printed else result
    assert f"<|im_start|>tool\n{said}<|im_end|>" in prompt + completion
    silent = CHATML.replace("m.content", "'' if m.role == 'tool' else m.content")
    assert 'drops or rewrites the text of a "tool" turn' in refusal(tmp_path, row, silent)


# ---------------------------------------------------------------------------------------------------------
# Contents


def test_text_parts_are_joined_and_media_are_refused_by_name(tmp_path):
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    row = {"messages": [USER | {"content": parts}, answer()]}
    assert texts(tmp_path, row, CHATML) == texts(
        tmp_path, {"messages": [USER | {"content": "One two"}, answer()]}, CHATML
    )
    for part in ({"type": "image"}, {"type": "input_audio", "input_audio": {}}, {"video": "a.mp4", "type": "video"}):
        said = refusal(tmp_path, {"messages": [USER | {"content": [*parts, part]}, answer()]}, CHATML)
        assert f'a part of type "{part["type"]}"' in said


def test_a_template_that_reads_parts_gets_them(tmp_path):
    template = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    row = {"messages": [SYSTEM, USER, answer()]}
    assert texts(tmp_path, row, template) == texts(tmp_path, row, CHATML)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_used_or_missed_under_each_of_its_names(tmp_path, name):
    row = {"messages": [USER, answer() | {name: "six sevens"}]}
    assert texts(tmp_path, row, APART)[1].startswith("<think>\nsix sevens\n</think>\n\n")
    assert f'drops or rewrites text of "completion": its "{name}". Fix:' in refusal(tmp_path, row, CHATML)
    odd = {"messages": [USER, answer() | {name: ["six", "sevens"]}]}
    assert f'"{name}" of a "assistant" turn in "messages" is a list, expected a string' in refusal(tmp_path, odd, APART)


def test_a_null_content_is_an_empty_turn_where_the_template_takes_it_so(tmp_path):
    row = {"messages": [SYSTEM | {"content": None}, USER, answer()]}
    assert texts(tmp_path, row, CHATML)[0].startswith("<|im_start|>system\n<|im_end|>\n")
    assert "the chat template refuses it" in refusal(tmp_path, row, CHATML.replace("m.content", "'' + m.content"))


# ---------------------------------------------------------------------------------------------------------
# Dates and limits


def test_a_template_that_prints_the_date_is_told_the_day_of_the_run(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    row = {"messages": [USER, answer()]}
    assert texts(tmp_path, row, template, TextOptions(date="2024-02-29"))[0].startswith("29 Feb 2024\n")
    assert texts(tmp_path, row, template)[0].startswith(f"{datetime.date.today():%d %b %Y}\n")


def test_a_run_keeps_its_first_day_and_so_does_what_looks_at_it_later(tmp_path):
    """On another day a resumed run, `eval` and `generate` tell the template the day that the run began."""
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    run.mkdir()
    began = settings(model_name_or_path="m", dataset_name="d", output_dir=str(run), template_date="2024-02-29")
    write_yaml(began, run / "config.yaml", "train")
    again = dataclasses.replace(began, template_date=None, resume=True)
    assert day_of_run(again) == "2024-02-29"
    assert day_of_run(dataclasses.replace(again, output_dir=str(fresh))) == datetime.date.today().isoformat()
    assert text_options(dataclasses.replace(again, model_name_or_path=str(run))).date == "2024-02-29"
    assert text_options(again).date == datetime.date.today().isoformat()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "it calls itself without end"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for %}", "the chat template cannot be read: TemplateSyntaxError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the limit may fall into a destructor
def test_templates_that_recurse_never_end_or_divide_by_zero(tmp_path, monkeypatch, template, said):
    from prefuse.engine.data import rendering

    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    lines = refusal(tmp_path, {"messages": [USER, answer()]}, template).splitlines()
    assert said in lines[-1]
    assert len(lines) <= 2


def test_prompts_to_answer_are_what_training_saw(tmp_path):
    row = {"prompt": [SYSTEM, USER], "completion": [answer()]}
    tokenizer, dataset = load(tmp_path, [row], MISTRAL)
    (prompt,) = load_prompts(str(tmp_path / "rows.json"), tokenizer, 4096)
    assert prompt.ids == dataset.examples[0].prompt
