"""Data: every source and form, what is tokenized, and the properties of every example."""

import copy
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefuse.engine.data import (
    DEFAULT_CHAT_TEMPLATE,
    Demonstration,
    Labelled,
    Pair,
    fingerprint,
    load_examples,
    load_prompts,
    summarize_skipped,
    unpair,
)
from prefuse.engine.data.sources import open_source
from tiny_tokenizer import CHATML, tiny_tokenizer

PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer(chat_template=CHATML)
BOS, EOS = PLAIN.bos_token_id, PLAIN.eos_token_id

# Every way of adding special tokens seen in the wild: Llama, GPT-2, Qwen (no BOS), BERT-like, none at all.
TOKENIZERS = {
    "adds bos": PLAIN,
    "has bos, adds none": tiny_tokenizer(adds=()),
    "no bos": tiny_tokenizer(bos=False, adds=()),
    "adds bos and eos": tiny_tokenizer(adds=("bos", "eos")),
    "adds eos": tiny_tokenizer(bos=False, adds=("eos",)),
    "no bos, no eos": tiny_tokenizer(bos=False, eos=False, adds=()),
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def load(tmp_path, rows, kind, tokenizer=PLAIN, max_length=512):
    return load_examples(write(tmp_path / "rows.json", rows), kind, tokenizer, max_length, max_skipped=1)


def text(ids, tokenizer=PLAIN):
    return tokenizer.decode(ids)


# What one row of each form must become, as text. "Q", "A" and "B" are the question and two answers.
CHAT_PROMPT = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
A, B = "A<|im_end|>", "B<|im_end|>"  # up to the stop token: the newline behind it is not learned
PAIR_FORMS = {
    "strings": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ("<s>Q", "A</s>", "B</s>")),
    "messages": (
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        (CHAT_PROMPT, A, B),
    ),
    "implicit strings": ({"chosen": "Q: A", "rejected": "Q: B"}, ("<s>Q:", " A</s>", " B</s>")),
    "implicit, one side ends in the other": (
        {"chosen": "Q A", "rejected": "Q A B"},
        ("<s>Q", " A</s>", " A B</s>"),
    ),
    "implicit messages": (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        (CHAT_PROMPT, A, B),
    ),
    "a string prompt, repeated in messages": (
        {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        (CHAT_PROMPT, A, B),
    ),
    "sharegpt": ({"conversations": [human("Q")], "chosen": gpt("A"), "rejected": gpt("B")}, (CHAT_PROMPT, A, B)),
    "sharegpt lists": (
        {"conversations": [human("Q")], "chosen": [gpt("A")], "rejected": [gpt("B")]},
        (CHAT_PROMPT, A, B),
    ),
}
COMPLETION_FORMS = {
    "strings": ({"prompt": "Q", "completion": "A"}, ("<s>Q", "A</s>")),
    "messages of two columns": ({"prompt": [user("Q")], "completion": [assistant("A")]}, (CHAT_PROMPT, A)),
    "messages": ({"messages": [user("Q"), assistant("A")]}, (CHAT_PROMPT, A)),
    "conversations": ({"conversations": [human("Q"), gpt("A")]}, (CHAT_PROMPT, A)),
}
DEMONSTRATION_FORMS = COMPLETION_FORMS | {
    "alpaca": ({"instruction": "Q", "output": "A"}, (CHAT_PROMPT, A)),
    "alpaca, empty input": ({"instruction": "Q", "input": "", "output": "A"}, (CHAT_PROMPT, A)),
    "alpaca, input": (
        {"instruction": "Q", "input": "I", "output": "A"},
        (CHAT_PROMPT.replace("Q", "Q\n\nI"), A),
    ),
    "text": ({"text": "A"}, ("<s>", "A</s>")),
}


@pytest.mark.parametrize(("row", "expected"), PAIR_FORMS.values(), ids=PAIR_FORMS)
def test_pair_forms(tmp_path, row, expected):
    (pair,) = load(tmp_path, [row | {"id": 7}], "pair", CHAT).examples
    assert isinstance(pair, Pair)
    assert (text(pair.prompt), text(pair.chosen), text(pair.rejected)) == expected
    assert pair.row == "rows.json:0"


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(("row", "expected"), COMPLETION_FORMS.values(), ids=COMPLETION_FORMS)
def test_labelled_forms(tmp_path, row, expected, label):
    (example,) = load(tmp_path, [row | {"label": label}], "labelled", CHAT).examples
    assert isinstance(example, Labelled)
    assert (text(example.prompt), text(example.completion)) == expected
    assert example.label is label


@pytest.mark.parametrize(("row", "expected"), DEMONSTRATION_FORMS.values(), ids=DEMONSTRATION_FORMS)
def test_demonstration_forms(tmp_path, row, expected):
    (example,) = load(tmp_path, [row], "sft", CHAT).examples
    assert isinstance(example, Demonstration)
    assert (text(example.prompt), text(example.completion)) == expected


@pytest.mark.parametrize(("row", "expected"), PAIR_FORMS.values(), ids=PAIR_FORMS)
def test_pairs_can_be_read_as_demonstrations_and_as_labelled_completions(tmp_path, row, expected):
    prompt, chosen, rejected = expected
    (demonstration,) = load(tmp_path, [row], "sft", CHAT).examples
    assert (text(demonstration.prompt), text(demonstration.completion)) == (prompt, chosen)
    both = load(tmp_path, [row], "labelled", CHAT).examples
    assert [(text(e.prompt), text(e.completion), e.label) for e in both] == [
        (prompt, chosen, True),
        (prompt, rejected, False),
    ]


def test_demonstrations_from_labelled_rows_are_the_good_ones_and_the_others_are_named(tmp_path):
    rows = [{"prompt": "Q", "completion": str(i), "label": i % 2 == 0} for i in range(4)]
    dataset = load(tmp_path, rows, "sft")
    assert [text(e.completion) for e in dataset.examples] == ["0</s>", "2</s>"]
    assert [skipped.row for skipped in dataset.skipped] == ["rows.json:1", "rows.json:3"]
    assert "label is false" in dataset.skipped[0].reason


def test_other_keys_of_a_message_reach_the_template(tmp_path):
    template = "{% for m in messages %}[{{ m.name }}]{{ m.content }}{% endfor %}"
    row = {"messages": [user("Q") | {"name": "Ann"}, assistant("A") | {"name": "Bot"}]}
    (example,) = load(tmp_path, [row], "sft", tiny_tokenizer(chat_template=template)).examples
    assert (text(example.prompt), text(example.completion)) == ("[Ann]Q", "[Bot]A")


def test_columns_no_form_needs_are_ignored_and_reported(tmp_path):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", "id": 3, "score": None}]
    dataset = load(tmp_path, rows, "pair")
    assert dataset.ignored_columns == ["id", "score"]
    assert summarize_skipped(dataset).splitlines() == [
        f"{tmp_path}/rows.json: 1 rows as prompt/chosen/rejected, 0 skipped",
        "  columns not used: id, score",
    ]


# ---------------------------------------------------------------------------------------------------------
# Properties

words = st.text(st.sampled_from("aes ?é字\n🙂"), min_size=1, max_size=12)
quick = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bare(tokenizer, string):
    return tokenizer(string, add_special_tokens=False).input_ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@quick
@given(rows=st.lists(st.tuples(words, words, words), max_size=5), max_length=st.integers(4, 60))
def test_string_pairs(tmp_path, tokenizer, rows, max_length):
    """One outcome per row; one BOS; EOS last and only there; only the prompt's start is ever cut."""
    always_fits = ("the", "a", "b")
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in [always_fits, *rows]]
    dataset = load(tmp_path, rows, "pair", tokenizer, max_length)
    assert len(dataset.examples) + len(dataset.skipped) == dataset.rows == len(rows)

    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    cut = 0
    for pair in dataset.examples:
        row = rows[int(pair.row.removeprefix("rows.json:"))]
        assert pair.chosen == bare(tokenizer, row["chosen"]) + eos
        assert pair.rejected == bare(tokenizer, row["rejected"]) + eos
        whole = bos + bare(tokenizer, row["prompt"])
        room = max_length - max(len(pair.chosen), len(pair.rejected))
        if len(whole) <= room:
            assert pair.prompt == whole
            continue
        cut += 1
        head = bos if room > 1 else []
        end = whole[len(whole) - room + len(head) :]
        left_out = len(head) + len(end) - len(pair.prompt)  # the rest of a character that was cut
        assert pair.prompt == head + end[left_out:]
        assert left_out <= 3
        assert left_out == 0 or tokenizer.decode(end[: left_out + 1]).startswith("\ufffd")
    assert dataset.prompts_cut == cut


turns = st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=4)


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN, TOKENIZERS["no bos, no eos"]], ids=["ChatML", "built-in", "bare"])
@quick
@given(roles=turns, prompt=words, chosen=words, rejected=words)
def test_the_ids_of_a_conversation_are_its_rendered_text(tmp_path, tokenizer, roles, prompt, chosen, rejected):
    prompt = [{"role": role, "content": prompt} for role in roles]
    always = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    row = {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    dataset = load(tmp_path, [always, row], "pair", tokenizer)
    if chosen == rejected or not (chosen.strip() and rejected.strip()):
        return  # skipped rows
    template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    pair = dataset.examples[1]
    for completion, ids in ((chosen, pair.chosen), (rejected, pair.rejected)):
        whole = [*prompt, assistant(completion)]
        rendered = tokenizer.apply_chat_template(whole, chat_template=template, tokenize=False)
        assert text(pair.prompt + ids, tokenizer) == rendered.removesuffix("\n")  # behind the stop token


def test_the_built_in_template_is_announced_starts_with_bos_and_ends_turns_with_eos(tmp_path, caplog):
    row = {"messages": [user("Q"), assistant("A"), user("R"), assistant("B")]}
    tokenizer = copy.deepcopy(PLAIN)
    tokenizer.chat_template = None
    (example,) = load(tmp_path, [row], "sft", tokenizer).examples
    assert "no chat template" in caplog.text
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE  # so that it is saved with the model
    assert text(example.prompt) == ("<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert text(example.completion) == "A</s>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB</s>"


def test_special_tokens_already_in_the_text_are_not_doubled(tmp_path):
    (example,) = load(tmp_path, [{"prompt": "<s>Q", "completion": "A</s>"}], "sft").examples
    assert (text(example.prompt), text(example.completion)) == ("<s>Q", "A</s>")
    (example,) = load(tmp_path, [{"text": "<s>Q A</s>"}], "sft").examples
    assert (text(example.prompt), text(example.completion)) == ("<s>", "Q A</s>")


@pytest.mark.parametrize(("name", "start"), [("has bos, adds none", "<s>"), ("no bos", "</s>")])
def test_an_empty_prompt_becomes_one_token_to_predict_from(tmp_path, name, start):
    (example,) = load(tmp_path, [{"text": "A"}], "sft", TOKENIZERS[name]).examples
    assert text(example.prompt, TOKENIZERS[name]) == start


def test_a_prompt_is_cut_at_its_start_behind_its_bos_and_counted(tmp_path):
    rows = [{"prompt": "0123456789", "completion": "abc"}, {"prompt": "01", "completion": "abc"}]
    dataset = load(tmp_path, rows, "sft", max_length=8)
    assert [text(e.prompt) for e in dataset.examples] == ["<s>789", "<s>01"]
    assert [text(e.completion) for e in dataset.examples] == ["abc</s>"] * 2
    assert dataset.prompts_cut == 1
    assert "prompts cut to fit max_length (by truncation_mode): 1" in summarize_skipped(dataset)


def test_the_longer_side_decides_how_much_prompt_a_pair_keeps(tmp_path):
    dataset = load(tmp_path, [{"prompt": "0123456789", "chosen": "a", "rejected": "abc"}], "pair", max_length=8)
    assert text(dataset.examples[0].prompt) == "<s>789"


def test_unpair_keeps_everything():
    pairs = [Pair([1, 2], [3], [4, 5], "f:0"), Pair([1], [6], [7], "f:1")]
    assert unpair(pairs) == [
        Labelled([1, 2], [3], True, "f:0"),
        Labelled([1, 2], [4, 5], False, "f:0"),
        Labelled([1], [6], True, "f:1"),
        Labelled([1], [7], False, "f:1"),
    ]


def test_the_fingerprint_depends_on_ids_boundaries_labels_and_order_not_on_names():
    base = [Labelled([1, 2], [3], True, "f:0"), Labelled([4], [5], False, "f:1")]
    renamed = [Labelled([1, 2], [3], True, "g:0"), Labelled([4], [5], False, "g:1")]
    assert fingerprint(base) == fingerprint(renamed)
    others = [
        base[::-1],
        base[:1],
        [],
        [Labelled([1], [2, 3], True, "f:0"), base[1]],
        [Labelled([1, 2], [3], False, "f:0"), base[1]],
        [Labelled([1, 9], [3], True, "f:0"), base[1]],
    ]
    assert len({fingerprint(examples) for examples in [base, *others]}) == len(others) + 1


# ---------------------------------------------------------------------------------------------------------
# Sources

ROWS = [{"prompt": f"question {i}", "chosen": "good", "rejected": "bad"} for i in range(3)]


def ids_of(dataset):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in dataset.examples]


def test_all_sources_give_the_same_examples(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(ROWS)
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": saved.select([0]), "train": saved}).save_to_disk(tmp_path / "many")
    names = {
        write(tmp_path / "rows.json", ROWS): ["rows.json:0", "rows.json:1", "rows.json:2"],
        str(tmp_path / "rows.jsonl"): ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"],
        str(tmp_path / "rows.parquet"): ["rows.parquet:0", "rows.parquet:1", "rows.parquet:2"],
        str(tmp_path / "one"): ["one:0", "one:1", "one:2"],
        str(tmp_path / "many"): ["many/train:0", "many/train:1", "many/train:2"],
    }
    loaded = {source: load_examples(source, "pair", PLAIN, 64) for source in names}
    assert {source: [pair.row for pair in dataset.examples] for source, dataset in loaded.items()} == names
    assert len({dataset.fingerprint for dataset in loaded.values()}) == 1
    assert len(load_examples(str(tmp_path / "many"), "pair", PLAIN, 64, split="test").examples) == 1


def test_the_hub_reader_reads_what_datasets_loads(tmp_path, monkeypatch):
    """No network here: `datasets.load_dataset` is given a local folder by the same call."""
    import datasets

    from prefuse.engine.data.sources.source import _of_hub

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "hub" / "train.parquet")
    source = _of_hub(str(tmp_path / "hub"), "train", None)
    assert all(file.is_relative_to(tmp_path / "cache") for file in source.files)
    assert list(source.rows()) == [(f"{tmp_path}/hub:{i}", row) for i, row in enumerate(ROWS)]


def test_missing_keys_of_nested_columns_do_not_matter_in_parquet(tmp_path):
    """Arrow fills what one message has and another lacks with nulls; templates must not see them."""
    import datasets

    datasets.disable_progress_bars()
    rows = [
        {"messages": [user("Q") | {"name": "Ann"}, assistant("A")], "label": True},
        {"messages": [user("R"), assistant("B")], "label": False},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    from_json = load(tmp_path, rows, "labelled", CHAT)
    from_parquet = load_examples(str(tmp_path / "rows.parquet"), "labelled", CHAT, 512)
    assert from_json.fingerprint == from_parquet.fingerprint


def test_a_folder_of_files_is_split_by_their_names(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("a.json", "train-0.json", "more/validation_1.json", "test.json"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "train.json", {"not": "rows"})

    def rows(split):
        return [name for name, _ in open_source(str(tmp_path), split).rows()]

    assert rows("train") == ["a.json:0", "train-0.json:0"]
    assert rows("validation") == rows("val") == ["more/validation_1.json:0"]
    assert rows("test") == ["test.json:0"]


def test_a_source_without_splits_is_read_whole(tmp_path):
    source = write(tmp_path / "rows.json", ROWS)
    assert list(open_source(source, "test").rows()) == list(open_source(source, "train").rows())
    assert len(list(open_source(str(tmp_path), "test").rows())) == len(ROWS)


def test_unicode_line_separators_and_byte_order_marks_are_text(tmp_path):
    line = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{line}\r\n{line}\r\n", encoding="utf-8")
    dataset = load_examples(str(tmp_path / "rows.jsonl"), "sft", PLAIN, 64)
    assert [text(e.completion) for e in dataset.examples] == ["one\u2028two\x85three</s>"] * 2


# ---------------------------------------------------------------------------------------------------------
# Prompts to generate from

PROMPT_FORMS = {
    "alone": ({"prompt": "Q"}, "<s>Q"),
    "alone, messages": ({"prompt": [user("Q")]}, CHAT_PROMPT),
    **{f"pair, {name}": (row, expected[0]) for name, (row, expected) in PAIR_FORMS.items()},
    **{f"sft, {name}": (row, expected[0]) for name, (row, expected) in DEMONSTRATION_FORMS.items()},
}


@pytest.mark.parametrize(("row", "expected"), PROMPT_FORMS.values(), ids=PROMPT_FORMS)
def test_prompts_come_from_every_form(tmp_path, row, expected):
    (prompt,) = load_prompts(write(tmp_path / "rows.json", [row]), CHAT, 64)
    assert (text(prompt.ids), prompt.row) == (expected, "rows.json:0")
    assert prompt.text in expected


def test_prompts_are_cut_to_max_length_and_bad_rows_are_logged(tmp_path, caplog):
    source = write(tmp_path / "rows.json", [{"prompt": "0123456789"}, {"prompt": 7}])
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(source, PLAIN, 4)
    assert (text(prompt.ids), prompt.text) == ("<s>789", "0123456789")
    assert "rows.json:1" in caplog.text
    assert "cut to fit max_length (by truncation_mode): 1" in caplog.text
