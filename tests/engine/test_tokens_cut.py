"""Rows that are too long: which end of a prompt stays, whether a completion is cut, and never half a character."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from prefuse.engine.data import load_examples, load_prompts, summarize_skipped
from prefuse.engine.data.fit import character_parts, without_half_end, without_half_start
from prefuse.engine.data.templates import TextOptions
from tiny_tokenizer import CHATML, tiny_tokenizer
from tokenizer_kinds import MADE, REAL, made, real

KINDS = [kind for kind in MADE if kind not in ("WordPiece", "unigram")] + [*REAL, "tekken"]
SCRIPTS = {
    "Thai": "ท้องฟ้าสีอะไร", "Amharic": "ሰማዩ ምን አይነት ቀለም", "Hindi": "आकाश का रंग", "emoji": "🙂🙃🙂",
    "Chinese": "天空是什么颜色", "French": "naïve café",
}  # fmt: skip


def load(tmp_path, rows, kind, max_length, tokenizer=None, **options):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = tokenizer or tiny_tokenizer()
    return load_examples(str(path), kind, tokenizer, max_length, text=TextOptions(**options), max_skipped=1.0)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return lambda kind: made(kind) if kind in MADE else real(kind, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_cut_at_any_token_leaves_whole_characters(tokenizers, kind, text):
    tokenizer = tokenizers(kind)
    parts, ids = character_parts(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
    for at in range(len(ids) + 1):
        start, end = without_half_end(ids[:at], parts), without_half_start(ids[at:], parts)
        assert len(start) >= at - 3
        assert len(end) >= len(ids) - at - 3
        for kept, text_has in ((start, str.startswith), (end, str.endswith)):
            said = tokenizer.decode(kept)
            assert "\ufffd" not in said
            assert text_has(text.replace(" ", ""), said.replace(" ", ""))


def test_a_real_replacement_character_and_whole_ids_stay():
    tokenizer = tiny_tokenizer()
    parts, ids = character_parts(tokenizer), tokenizer("a\ufffd", add_special_tokens=False).input_ids
    assert without_half_end(ids, parts) == ids
    assert without_half_start([tokenizer.eos_token_id, *ids], parts) == [tokenizer.eos_token_id, *ids]


def test_tokenizers_of_words_and_of_single_bytes():
    """Of words alone, with no token for others; ByT5's, whose tokens are Latin-1 letters for bytes."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"sky": 0, "sea": 1})))
    assert character_parts(words)(0) == b"sky"
    parts, ids = character_parts(ByT5Tokenizer()), list(range(3, 259))
    assert [parts(token) for token in ids] == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(("mode", "kept"), [("keep_end", "<s>789"), ("keep_start", "<s>012")])
def test_which_end_of_a_prompt_stays(tmp_path, mode, kept):
    rows = [{"prompt": "0123456789", "completion": "abc"}]
    tokenizer = tiny_tokenizer()
    dataset = load(tmp_path, rows, "sft", 8, truncation_mode=mode)
    assert tokenizer.decode(dataset.examples[0].prompt) == kept
    assert dataset.prompts_cut == 1
    (prompt,) = load_prompts(str(tmp_path / "rows.json"), tokenizer, 4, text=TextOptions(truncation_mode=mode))
    assert tokenizer.decode(prompt.ids) == kept


def test_a_long_completion_is_skipped_or_cut_and_counted(tmp_path):
    rows = [{"prompt": "0123456789", "completion": "abcdefghij"}, {"prompt": "0", "completion": "x"}]
    skipped = load(tmp_path, rows, "sft", 10)
    assert [s.row for s in skipped.skipped] == ["rows.json:0"]
    tokenizer = tiny_tokenizer()
    cut = load(tmp_path, rows, "sft", 10, long_completions="cut")
    assert (cut.skipped, cut.completions_cut, cut.prompts_cut) == ([], 1, 1)
    assert (tokenizer.decode(cut.examples[0].prompt), tokenizer.decode(cut.examples[0].completion)) == (
        "<s>6789",
        "abcde",
    )
    assert "completions cut at their end to fit max_length: 1" in summarize_skipped(cut)
    assert tokenizer.decode(cut.examples[1].completion) == "x</s>"


def test_sides_that_differ_behind_the_cut_alone_are_no_preference(tmp_path):
    rows = [
        {"prompt": "0", "chosen": "abcdefghij", "rejected": "abcdefghik"},
        {"prompt": "0", "chosen": "a", "rejected": "b"},
    ]
    (skipped,) = load(tmp_path, rows, "pair", 6, long_completions="cut").skipped
    assert skipped.reason == '"chosen" equals "rejected" within max_length=6'


@pytest.mark.parametrize("long_completions", ["skip", "cut"])
def test_a_conversation_that_is_too_long_keeps_the_answers_that_fit_whole(tmp_path, long_completions):
    turns = [{"role": role, "content": "abc"} for role in ("user", "assistant") * 3]
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    whole = load(tmp_path, [{"messages": turns}], "sft", 4096, tokenizer).examples[0]
    length = len(whole.prompt) + len(whole.completion) - 1
    dataset = load(tmp_path, [{"messages": turns}], "sft", length, tokenizer, long_completions=long_completions)
    (cut,), two = dataset.examples, load(tmp_path, [{"messages": turns[:4]}], "sft", 4096, tokenizer).examples[0]
    assert (cut.prompt, cut.completion, cut.learned) == (two.prompt, two.completion, two.learned)
    assert dataset.completions_cut == 1


def test_the_mask_of_a_conversation_is_cut_with_it(tmp_path):
    turns = [{"role": role, "content": "abcdefghij"} for role in ("user", "assistant") * 2]
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    whole = load(tmp_path, [{"messages": turns}], "sft", 4096, tokenizer).examples[0]
    length = len(whole.prompt) + 5  # within the first answer
    cut = load(tmp_path, [{"messages": turns}], "sft", length, tokenizer, long_completions="cut").examples[0]
    assert len(cut.prompt) + len(cut.completion) <= length
    assert cut.completion == whole.completion[: len(cut.completion)]
    assert (cut.learned or [True] * len(cut.completion)) == whole.learned[: len(cut.completion)]


def test_a_prompt_with_another_rows_completion_is_cut_between_characters(tmp_path):
    import numpy as np

    from prefuse.engine.data.batches import examples_of, mismatched

    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "สีอะไร", "completion": "x", "label": True},
        {"prompt": "q", "completion": "abcdefgh", "label": False},
    ]
    examples = load(tmp_path, rows, "labelled", 20, tokenizer).examples
    examples = examples_of(examples, tokenizer.bos_token_id, character_parts(tokenizer))
    for length in range(11, 20):
        prompt = mismatched(examples, np.array([1, 0]), length).prompts[0]
        assert "\ufffd" not in tokenizer.decode(prompt)
