"""`max_length` bounds prompt + completion.

A prompt that is too long is cut, at its start (behind its BOS) or at its end, and counted. A conversation that is too
long keeps the answers that fit. Any other row whose completion leaves no room for a prompt is skipped. With
`long_completions: cut` it stays: the completion loses its end, stop token included, and the prompt gets at most half of
max_length. A cut never leaves half a character: byte-level and byte-fallback tokens hold parts of one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from prefuse.engine.data.records import BadRow, Record, Skipped

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
CharacterParts = Callable[[int], bytes]  # the bytes of a token, for tokens that may hold part of a character


@dataclass(frozen=True)
class Room:
    """How rows are made to fit."""

    max_length: int
    bos: int | None = None  # the token that a prompt keeps where it loses its start
    parts: CharacterParts | None = None  # None: every token holds whole characters
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    long_completions: Literal["skip", "cut"] = "skip"

    def fit(self, record: Record) -> Record:
        record = self._with_whole_answers(record)
        tokens, side = max(((len(ids), side) for side, ids in record.sides.items()), default=(0, ""))
        room = self.max_length - tokens
        if room < 1:
            if self.long_completions == "skip":
                raise BadRow(
                    f'"{side}" has {tokens} tokens: max_length={self.max_length} leaves no room for the prompt'
                )
            room = min(len(record.prompt), self.max_length // 2)
            record = self._with_shorter_sides(record, self.max_length - room)
        prompt = self.cut_prompt(record.prompt, room)
        return record if prompt is record.prompt else replace(record, prompt=prompt)

    def _with_whole_answers(self, record: Record) -> Record:
        """Cuts a conversation that is too long behind the last answer that fits. If none fits, it stays as it is."""
        learned = record.learned
        if learned is None or len(record.sides) > 1 or len(learned) <= self.max_length - len(record.prompt):
            return record
        fitting = range(1, self.max_length - len(record.prompt) + 1)
        end = max((i for i in fitting if learned[i - 1] and not learned[i]), default=0)
        if end == 0:
            return record
        ((side, ids),) = record.sides.items()
        return replace(record, sides={side: ids[:end]}, learned=learned[:end])

    def cut_prompt(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) <= room:
            return prompt
        if self.truncation_mode == "keep_end":
            return cut_prompt(prompt, room, self.bos, self.parts)
        return without_half_end(prompt[:room], self.parts) or prompt[:room]

    def _with_shorter_sides(self, record: Record, room: int) -> Record:
        sides, learned, at = {}, [], 0
        for side, ids in record.sides.items():
            sides[side] = ids if len(ids) <= room else without_half_end(ids[:room], self.parts) or ids[:room]
            if record.learned is not None:
                learned += record.learned[at : at + len(sides[side])]
            at += len(ids)
        if record.learned is not None and not any(learned):
            raise BadRow(f"no answer begins within max_length={self.max_length}")
        if len(sides) == 2 and sides["chosen"] == sides["rejected"]:
            raise BadRow(f'"chosen" equals "rejected" within max_length={self.max_length}')
        return replace(record, sides=sides, learned=None if record.learned is None else learned)


def cut_prompt(prompt: list[int], room: int, bos: int | None, parts: CharacterParts | None = None) -> list[int]:
    """The prompt's end, as much as there is room for. The BOS stays: models lean on it."""
    if len(prompt) <= room:
        return prompt
    kept = prompt[:1] if prompt[0] == bos and room > 1 else []
    end = prompt[len(prompt) - room + len(kept) :]
    return (kept + without_half_start(end, parts)) or end  # the completion needs a token before it


def without_half_start(ids: list[int], parts: CharacterParts | None) -> list[int]:
    """`ids` without the tokens at the start that continue a character of an earlier token."""
    at = 0
    while parts and at < len(ids) and 0x80 <= (parts(ids[at])[:1] or b"a")[0] < 0xC0:
        at += 1
    return ids[at:]


def without_half_end(ids: list[int], parts: CharacterParts | None) -> list[int]:
    """`ids` without the tokens at the end that begin a character and do not finish it."""
    end = len(ids)
    while parts and end and _is_cut(b"".join(parts(token) for token in ids[max(0, end - 4) : end])):
        end -= 1
    return ids[:end]


def _is_cut(text: bytes) -> bool:
    """Whether the last character of UTF-8 lacks bytes."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:  # the first byte of a character says how many it has
            return (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) > back
        if byte < 0x80:
            return False
    return False


PROBE = "é字"  # whose bytes show how a tokenizer writes bytes


def character_parts(tokenizer: Any) -> CharacterParts:
    """The bytes of each token of a byte-level tokenizer, or of one that falls back on bytes; others are whole."""
    bytes_of = _spelling_of_bytes(tokenizer)
    added = set(tokenizer.get_added_vocab().values())

    @cache
    def parts(token: int) -> bytes:
        text = tokenizer.convert_ids_to_tokens(token)
        if text is None or token in added:
            return b"a"
        if isinstance(text, bytes):
            return text
        if bytes_of is not None:
            return bytes(bytes_of.get(letter, ord("a")) for letter in text)
        fallback = BYTE_TOKEN.fullmatch(text)
        return bytes([int(fallback[1], 16)]) if fallback else text.encode()

    return parts


def _spelling_of_bytes(tokenizer: Any) -> dict[str, int] | None:
    """{letter: byte} of a byte-level tokenizer: the letters of GPT-2's (each fast one has these), or those of Latin-1
    (ByT5's). None for other tokenizers, and where tokens are bytes themselves."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        return letters
    try:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    except Exception:  # tokenizers has no class of its own for a text that it cannot read
        return None
    if not all(isinstance(token, str) for token in tokens):
        return None
    for spelling in (letters, {chr(byte): byte for byte in range(256)}):
        if bytes(spelling.get(letter, 0) for letter in "".join(tokens)).endswith(PROBE.encode()):
            return spelling
    return None


def count_cut(before: Sequence[Record | Skipped], after: Sequence[Record | Skipped]) -> int:
    """Rows whose prompt was cut."""
    return sum(len(new.prompt) < len(old.prompt) for old, new in _fitted(before, after))


def count_cut_completions(before: Sequence[Record | Skipped], after: Sequence[Record | Skipped]) -> int:
    """Rows of which a completion was cut."""
    pairs = _fitted(before, after)
    return sum(any(len(new.sides[side]) < len(ids) for side, ids in old.sides.items()) for old, new in pairs)


def _fitted(before: Sequence[Record | Skipped], after: Sequence[Record | Skipped]) -> list[tuple[Record, Record]]:
    return [(old, new) for old, new in zip(before, after, strict=True) if isinstance(new, Record)]
