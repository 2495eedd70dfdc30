"""`max_length` bounds prompt + completion.

A prompt too long is cut at its start (behind its BOS) and counted; a completion is never cut: where it leaves no room
for a prompt, the row is skipped.
"""

from dataclasses import replace

from prefuse.engine.data.forms import BadRow, Record, Skipped


def fit(record: Record, max_length: int, bos: int | None) -> Record:
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


def count_cut(before: list[Record | Skipped], after: list[Record | Skipped]) -> int:
    both = zip(before, after, strict=True)
    return sum(isinstance(new, Record) and len(new.prompt) < len(old.prompt) for old, new in both)
