"""Rows -> tokenized examples: pairs, labelled completions, demonstrations, prompts.

Every row has one outcome, an example or a `Skipped` with its name and reason; none is dropped silently.

A prompt and its completion are tokenized apart and their ids are concatenated, so the prompt is a true prefix
of both sides of a pair. Two kinds of text:

* Strings: the prompt gets the tokens this tokenizer puts before a text (BOS, where it has that habit), once;
  the completion gets an EOS behind it, once.
* Messages: the chat template is rendered up to the assistant's turn and to the end; the first text must be a
  prefix of the second, and what follows it is the completion. The template writes its special tokens itself.

`max_length` bounds prompt + completion. A prompt too long is cut at its start (behind its BOS) and counted;
a completion is never cut: where it leaves no room for a prompt, the row is skipped.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jinja2

from prefuse.engine.rows import BadRow, DataError, Message, Record, Skipped, read_records

logger = logging.getLogger(__name__)

Kind = Literal["pair", "labelled", "sft"]

# For a tokenizer without a chat template: ChatML, assistant turns ended by EOS so that generation stops.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '<|im_end|>' }}"
    "{% endfor %}"
    "{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
TEXTS_PER_CALL = 2048  # bounds what the tokenizer's own encodings hold in memory


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: str  # "pairs.json:17", for messages


@dataclass(frozen=True)
class Labelled:
    prompt: list[int]
    completion: list[int]
    label: bool
    row: str


@dataclass(frozen=True)
class Demonstration:
    prompt: list[int]
    completion: list[int]
    row: str


class Prompt(NamedTuple):
    ids: list[int]
    text: str  # what to show: a string prompt, or the last turn of a conversation
    row: str


Example = Pair | Labelled | Demonstration


@dataclass(frozen=True)
class Dataset:
    examples: list[Any]  # of one of the types above
    skipped: list[Skipped]
    source: str
    fingerprint: str
    rows: int  # rows read; a pair row may have become two labelled examples
    prompts_cut: int  # rows whose prompt lost its start to max_length
    form: str  # the columns it was read from: "prompt/chosen/rejected"
    ignored_columns: list[str]


def load_examples(source: str, kind: Kind, tokenizer: Any, max_length: int, *, split: str = "train") -> Dataset:
    """Reads `source` (see `rows`) as "pair", "labelled" or "sft" examples.

    Pairs may be read as "labelled" (see `unpair`) or as "sft" (their chosen side), labelled rows as "sft"
    (those whose label is true). Raises DataError for a source that cannot be read, lacks a column or has no
    usable row.
    """
    if kind not in ("pair", "labelled", "sft"):
        raise ValueError(f'kind must be "pair", "labelled" or "sft", got {kind!r}')
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, a prompt token and a completion token; got {max_length}")
    records, form, ignored = read_records(source, kind, split)
    if kind == "sft":
        records = _each(records, _demonstrated)
    records = _tokenize(records, tokenizer)
    if form.kind == "pair" and kind != "sft":
        records = _each(records, _with_a_preference)
    fitted = _each(records, lambda record: _fit(record, max_length, tokenizer.bos_token_id))
    usable, skipped = _usable(fitted, source)

    examples: list[Any] = [_example(record) for record in usable]
    if form.kind == "pair" and kind == "labelled":
        examples = unpair(examples)
    return Dataset(
        examples=examples,
        skipped=skipped,
        source=source,
        fingerprint=fingerprint(examples),
        rows=len(records),
        prompts_cut=_count_cut(records, fitted),
        form=str(form),
        ignored_columns=ignored,
    )


def load_prompts(source: str, tokenizer: Any, max_length: int, *, split: str = "train") -> list[Prompt]:
    """The prompts of `source`, in any form or with a `prompt` column alone, of at most `max_length` tokens.

    Rows that cannot be used are named in the log.
    """
    rows, form, ignored = read_records(source, "prompt", split)
    records = _tokenize(_each(rows, lambda record: replace(record, sides={})), tokenizer)
    fitted = _each(records, lambda record: _fit(record, max_length, tokenizer.bos_token_id))
    usable, skipped = _usable(fitted, source)
    shown = {row.row: _shown_text(row.prompt) for row in rows if isinstance(row, Record)}
    prompts = [Prompt(record.prompt, shown[record.row], record.row) for record in usable]
    cut = _count_cut(records, fitted)
    if skipped or cut:
        report = Dataset(prompts, skipped, source, "", len(rows), cut, str(form), ignored)
        logger.warning("%s", summarize_skipped(report))
    return prompts


def unpair(pairs: Iterable[Pair]) -> list[Labelled]:
    """Each pair as two labelled completions: chosen (true), then rejected (false)."""
    return [
        Labelled(pair.prompt, completion, label, pair.row)
        for pair in pairs
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    ]


def summarize_skipped(dataset: Dataset, limit: int = 10) -> str:
    """What happened to the rows, as lines to print: the form, what was ignored, cut and skipped, and why.

    At most `limit` reasons, and `limit` rows of each; `dataset.skipped` has them all.
    """
    count = len(dataset.skipped)
    lines = [f"{dataset.source}: {dataset.rows} rows as {dataset.form}, {count} skipped"]
    if dataset.ignored_columns:
        lines.append(f"  columns not used: {', '.join(dataset.ignored_columns)}")
    if dataset.prompts_cut:
        lines.append(f"  prompts cut at their start to fit max_length: {dataset.prompts_cut}")
    rows_by_reason: dict[str, list[str]] = {}
    for skipped in dataset.skipped:
        # Rows that are too long have one reason, however long each is.
        reason = re.sub(r"has \d+ tokens", "has too many tokens", skipped.reason)
        rows_by_reason.setdefault(reason, []).append(skipped.row)
    for reason, rows in list(rows_by_reason.items())[:limit]:
        lines.append(f"  skipped {_listed(rows, limit)}: {reason}")
    if len(rows_by_reason) > limit:
        lines.append(f"  ... and {len(rows_by_reason) - limit} more reasons")
    return "\n".join(lines)


def _listed(rows: list[str], limit: int) -> str:
    return ", ".join(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the token ids, lengths and labels of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        match example:
            case Pair(prompt, chosen, rejected):
                parts = (prompt, chosen, rejected)
            case Labelled(prompt, completion, label):
                parts = (prompt, completion, [int(label)])
            case Demonstration(prompt, completion):
                parts = (prompt, completion)
        for ids in parts:
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Steps: each maps a list of outcomes to one of the same length


def _each(outcomes: list[Record | Skipped], step: Callable[[Record], Record]) -> list[Record | Skipped]:
    """Applies `step` to every record; a BadRow it raises turns that record into a Skipped."""

    def outcome(record: Record | Skipped) -> Record | Skipped:
        if isinstance(record, Skipped):
            return record
        try:
            return step(record)
        except BadRow as problem:
            return Skipped(record.row, str(problem))

    return [outcome(record) for record in outcomes]


def _usable(outcomes: list[Record | Skipped], source: str) -> tuple[list[Record], list[Skipped]]:
    records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
    if not records:
        reasons = "\n".join(f"  {skip.row}: {skip.reason}" for skip in skipped[:5])
        more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise DataError(f"{source}: no usable row among {len(skipped)}:\n{reasons}{more}")
    return records, skipped


def _demonstrated(record: Record) -> Record:
    """What a row shows to imitate: its completion, unless that is labelled bad, or its chosen side."""
    if record.label is False:
        raise BadRow("its label is false, and sft learns from true ones only")
    side = "chosen" if "chosen" in record.sides else "completion"
    return replace(record, sides={side: record.sides[side]}, label=None)


def _with_a_preference(record: Record) -> Record:
    if record.sides["chosen"] == record.sides["rejected"]:
        raise BadRow('"chosen" equals "rejected", token by token: no preference to learn')
    return record


def _fit(record: Record, max_length: int, bos: int | None) -> Record:
    tokens, side = max(((len(ids), side) for side, ids in record.sides.items()), default=(0, ""))
    room = max_length - tokens
    if room < 1:
        raise BadRow(f'"{side}" has {tokens} tokens: max_length={max_length} leaves no room for the prompt')
    return replace(record, prompt=cut_prompt(record.prompt, room, bos))


def cut_prompt(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The prompt's end, as much as there is room for. The BOS stays: models lean on it."""
    if len(prompt) <= room:
        return prompt
    kept = prompt[:1] if prompt[0] == bos and room > 1 else []
    return kept + prompt[len(prompt) - room + len(kept) :]


def _count_cut(before: list[Record | Skipped], after: list[Record | Skipped]) -> int:
    both = zip(before, after, strict=True)
    return sum(isinstance(new, Record) and len(new.prompt) < len(old.prompt) for old, new in both)


def _example(record: Record) -> Example:
    match record:
        case Record(row, prompt, {"chosen": chosen, "rejected": rejected}):
            return Pair(prompt, chosen, rejected, row)
        case Record(row, prompt, {"completion": completion}, bool(label)):
            return Labelled(prompt, completion, label, row)
        case Record(row, prompt, sides):
            (completion,) = sides.values()
            return Demonstration(prompt, completion, row)


def _shown_text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


# ---------------------------------------------------------------------------------------------------------
# Tokenization: messages -> text -> ids


def _tokenize(records: list[Record | Skipped], tokenizer: Any) -> list[Record | Skipped]:
    conversational = any(isinstance(record.prompt, list) for record in records if isinstance(record, Record))
    if conversational and not tokenizer.chat_template:
        logger.warning("the tokenizer has no chat template: messages are rendered with a built-in ChatML")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # and saved with the model, which learns this format
    texts = _each(records, lambda record: _render(record, tokenizer))
    bare = _encode(texts, tokenizer)
    before = _tokens_before_text(texts, bare, tokenizer)
    return _each(bare, lambda record: _finish(record, tokenizer, before))


def _render(record: Record, tokenizer: Any) -> Record:
    """Messages as text; strings stay as they are."""
    if isinstance(record.prompt, str):
        return record

    def render(messages: list[Message], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # how templates refuse a conversation
            raise BadRow(f"the chat template refuses it: {error}") from None

    prompt = render(record.prompt, add_generation_prompt=True)
    sides = {}
    for side, turns in record.sides.items():
        whole = render(record.prompt + turns)
        if not whole.startswith(prompt):
            raise BadRow(f'the chat template renders the prompt otherwise when "{side}" follows: no true prefix')
        sides[side] = whole[len(prompt) :]
        if not all(_contains(sides[side], turn["content"]) for turn in turns):
            raise BadRow(f'the chat template drops or rewrites text of "{side}"')
    return replace(record, prompt=prompt, sides=sides, rendered=True)


def _contains(text: str, content: str) -> bool:
    """Whether `content` is in `text`, but for white space: templates trim it."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _encode(records: list[Record | Skipped], tokenizer: Any) -> list[Record | Skipped]:
    """Every text as its bare token ids, in few calls of the tokenizer."""
    texts = [text for record in records if isinstance(record, Record) for text in _texts(record)]
    ids = _token_ids(texts, tokenizer)

    def encode(record: Record) -> Record:
        return replace(record, prompt=next(ids), sides={side: next(ids) for side in record.sides})

    return _each(records, encode)


def _texts(record: Record) -> list[str]:
    return [record.prompt, *record.sides.values()]


def _token_ids(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    one: dict[int, int] = {}  # one int object per token id, not per token: a quarter of the memory
    for start in range(0, len(texts), TEXTS_PER_CALL):
        batch = texts[start : start + TEXTS_PER_CALL]
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [one.setdefault(token, token) for token in ids]


def _tokens_before_text(texts: list[Record | Skipped], bare: list[Record | Skipped], tokenizer: Any) -> list[int]:
    """The tokens this tokenizer puts before a text, usually [BOS] or [], found by trying one string."""
    for record, ids in zip(texts, bare, strict=True):
        if isinstance(record, Skipped) or record.rendered:
            continue
        for text, alone in zip(_texts(record), _texts(ids), strict=True):
            if alone:
                whole = tokenizer(text, verbose=False)["input_ids"]
                starts = [i for i in range(len(whole)) if whole[i : i + len(alone)] == alone]
                assert starts, "special tokens change how this tokenizer reads the text between them"
                return whole[: starts[0]]
    return []


def _finish(record: Record, tokenizer: Any, before: list[int]) -> Record:
    """Adds the special tokens that strings lack and checks that nothing is empty."""
    prompt, sides, eos = record.prompt, record.sides, tokenizer.eos_token_id
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
