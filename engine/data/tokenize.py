"""Records -> token ids.

The prompt is tokenized as a whole, as it is when the model answers it, and each completion as it stands behind the
prompt (encode.py); their ids are concatenated, so the prompt is a true prefix of both sides of a pair, and
decode(prompt + completion) is the text of the row. Two kinds of text:

* Strings: the prompt gets the tokens this tokenizer puts before a text (BOS, where it has that habit), once;
  the completion gets an EOS behind it, once.
* Messages: the chat template has rendered them (templates.py) and has written its special tokens itself.
"""

from dataclasses import replace
from typing import Any

from prefuse.engine.data.encode import Encoder
from prefuse.engine.data.outcomes import each
from prefuse.engine.data.records import BadRow, Record, Skipped
from prefuse.engine.data.templates import Piece

LONGEST_TAIL = 500  # characters before a piece that its encoding may look at


def tokenize(texts: list[Record | Skipped], tokenizer: Any) -> list[Record | Skipped]:
    """Every text as token ids, special tokens included."""
    bare = _encode(texts, Encoder(tokenizer))
    before = _tokens_before_text(texts, bare, tokenizer)
    eos = tokenizer.eos_token_id  # once: transformers looks it up anew every time
    return each(bare, lambda record: _finish(record, tokenizer, before, eos))


def _encode(records: list[Record | Skipped], encoder: Encoder) -> list[Record | Skipped]:
    """Every text as its bare token ids, in few calls of the tokenizer."""
    read = [record for record in records if isinstance(record, Record)]
    prompts = iter(encoder.encode([record.prompt for record in read]))
    pieces = [piece for record in read for side in record.sides.values() for piece in _behind_each_other(record, side)]
    before, texts, written = zip(*pieces, strict=True) if pieces else ((), (), ())
    completions = iter(encoder.encode_after(before, texts, written))

    def encode(record: Record) -> Record:
        if all(isinstance(text, str) for text in record.sides.values()):  # most rows
            return replace(record, prompt=next(prompts), sides={side: next(completions) for side in record.sides})
        sides: dict[str, list[int]] = {}
        learned: list[bool] = []
        for side, text in record.sides.items():
            sides[side] = []
            for _, _, is_learned in _behind_each_other(record, text):
                sides[side] += (ids := next(completions))
                learned += [is_learned] * len(ids)
        return replace(record, prompt=next(prompts), sides=sides, learned=None if all(learned) else learned)

    return each(records, encode)


def _behind_each_other(record: Record, side: str | list[Piece]) -> list[tuple[str, str, bool]]:
    """The pieces of a completion: what stands before each, its text, whether it is learned."""
    if isinstance(side, str):
        return [(record.prompt, side, True)]
    found, before = [], record.prompt
    for text, is_learned in side:
        found.append((before, text, is_learned))
        before = before[-LONGEST_TAIL:] + text
    return found


def _tokens_before_text(texts: list[Record | Skipped], bare: list[Record | Skipped], tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before a text, usually [BOS] or [], found by trying one string."""
    for record, ids in zip(texts, bare, strict=True):
        if isinstance(record, Skipped) or isinstance(ids, Skipped) or record.rendered:
            continue
        # Behind a prompt a completion may have other ids than alone.
        sides = zip(record.sides.values(), ids.sides.values(), strict=True)
        for text, alone in [(record.prompt, ids.prompt)] if record.prompt else sides:
            if alone:
                whole = tokenizer(text, verbose=False)["input_ids"]
                starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
                assert starts, "special tokens change how this tokenizer reads the text between them"
                return whole[: starts[0]]
    return []


def _finish(record: Record, tokenizer: Any, before: list[int], eos: int | None) -> Record:
    """Adds the special tokens that strings lack and checks that nothing is empty."""
    prompt, sides = record.prompt, record.sides
    if not record.rendered:
        if prompt[: len(before)] != before:  # a text may begin with them itself
            prompt = before + prompt
        if not record.prompt:  # the first token of a completion needs one before it
            prompt = before or _start_of_text(tokenizer)
            sides = {side: _without_start(ids, prompt) for side, ids in sides.items()}
    for side, ids in sides.items():
        if not ids:
            raise BadRow(f'"{side}" is empty: it has no token')
    if not prompt:
        raise BadRow("the prompt is empty: it has no token")
    if not record.rendered and eos is not None:
        sides = {side: ids if ids[-1] == eos else [*ids, eos] for side, ids in sides.items()}
    return replace(record, prompt=prompt, sides=sides)


def _start_of_text(tokenizer: Any) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise BadRow("the prompt is empty, and the tokenizer has neither BOS nor EOS to start from")


def _without_start(ids: list[int], start: list[int]) -> list[int]:
    return ids[len(start) :] if ids[: len(start)] == start else ids
