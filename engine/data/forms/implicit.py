"""Sides that begin with their prompt: where the prompt ends.

Turns: the prompt is the turns that both sides share. Strings, in this order:

1. Transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...", "USER: ... ASSISTANT: ..."): behind the assistant's last marker.
2. Behind the last line break, label ("A:") or question mark in what both sides share.
3. Behind the last whole word that both sides share, as in "The sky is| blue." and "The sky is| green."

So the prompt never ends inside a word. It ends inside an answer only if nothing in the text says where the answer
begins; how many rows that concerns is logged.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

from prefuse.engine.data.records import BadRow, Message

BEHIND_END = r"(?<=</s>)|(?<=<\|endoftext\|>)"
ROLE_NAMES = r"(?:Assistant|ASSISTANT|assistant|AI|Bot|GPT|Model|Response|RESPONSE|Answer|ANSWER)"
MARKER = re.compile(
    rf"(?:^|\n)[ \t]*(?:\#+ *)?{ROLE_NAMES} *:"  # "Assistant:", "### Response:"
    r"|<\|im_start\|>assistant\n|<\|assistant\|>\n?|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<start_of_turn>model\n|\[/INST\]"
)
LABEL = re.compile(r"(?:^|\n)[ \t]*(?:\#+ *)?\w[\w ]{0,20}:(?=\s|$)")
SPOKEN = re.compile(  # the marks of turns, for `turns_of_transcript`
    rf"(?:(?:^|\n|{BEHIND_END})[ \t]*(?:\#+ *)?|\#{{2,}} *)(?P<name>{ROLE_NAMES}|Human|HUMAN|User|USER|user"
    r"|Instruction|Question|System|SYSTEM|FUNCTION RESPONSE) *:"
    r"|<\|im_start\|>(?P<chatml>\w+)\n|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\n*"
    r"|<\|(?P<zephyr>system|user|assistant|tool)\|>\n?|<start_of_turn>(?P<gemma>user|model)\n|(?P<inst>\[/?INST\]|\[(?:USER|ASSISTANT|SYSTEM)\])"
)
# Vicuna's "USER: hi ASSISTANT: hello</s>USER: ...": marks anywhere in a line, for `spoken_marks`.
INLINE = re.compile(rf"(?:^|(?<=\s)|{BEHIND_END})(?P<name>USER|ASSISTANT|SYSTEM|Human|User|Assistant):(?=\s|$)")
LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>\s*", re.DOTALL)
SAID_BY = {"system": "system", "[system]": "system", "function response": "tool", "tool": "tool", "ipython": "tool"}
SAID_BY |= dict.fromkeys(("human", "user", "instruction", "question", "[inst]", "[user]"), "user")
ENDS = re.compile(
    r"\s*(?:<\|im_end\|>|<\|eot_id\|>|<\|end\|>|<\|endoftext\|>|<end_of_turn>|</s>|<s>|<bos>|<\|begin_of_text\|>)\s*"
)
GUESSED = "prompts are what both sides share up to a whole word, for no mark says where the answer begins"


def is_transcripts(chosen: list[object], rejected: list[object]) -> bool:
    """Whether (nearly) all values of both columns have an assistant's marker."""
    texts = [text for text in [*chosen, *rejected] if isinstance(text, str)]
    marked = sum(bool(_answer_marks(text)) for text in texts)
    return bool(texts) and marked >= 0.9 * len(texts)


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected), cut behind the last marker."""
    ends = []
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        markers = _answer_marks(text)
        if not markers:
            raise BadRow(f'"{side}" has no assistant\'s turn, as the transcripts of other rows have')
        markers = [marker for marker in markers if marker[0].strip() == markers[0][0].strip()]  # no "Answer:" in one
        ends.append(markers[-1].end())
    if chosen[: ends[0]] != rejected[: ends[1]]:
        raise BadRow("chosen and rejected differ before the last turn")
    return chosen[: ends[0]], chosen[ends[0] :], rejected[ends[1] :]


def split_strings(chosen: str, rejected: str, notes: Counter[str]) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of strings without markers."""
    shorter = min(len(chosen), len(rejected))
    differing = (i for i in range(shorter) if chosen[i] != rejected[i])
    shared = next(differing, max(0, shorter - 1))  # where one is the start of the other, both keep its end
    cut = _structural_end(chosen[:shared])
    if cut is None:
        cut = _last_word_end(chosen, rejected, shared)
        notes[GUESSED] += cut > 0
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _structural_end(shared: str) -> int | None:
    """Behind the last line break, label or question mark, white space left to the answer (line breaks aside)."""
    ends = [match.end() for match in LABEL.finditer(shared)]
    ends += [match.end() for match in re.finditer(r"\n+|\?(?=\s)", shared)]
    return max(ends, default=None)


def _last_word_end(chosen: str, rejected: str, shared: int) -> int:
    """The end of the last word that both sides have whole, before the blank behind it."""
    while shared and not all(text[shared : shared + 1].isspace() for text in (chosen, rejected)):
        shared -= 1
    return shared


def split_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns that both share, as in TRL's `extract_prompt`, and what follows them on each side."""
    shorter = min(len(chosen), len(rejected))
    differing = (i for i in range(shorter) if chosen[i] != rejected[i])
    shared = next(differing, max(0, shorter - 1))
    return chosen[:shared], chosen[shared:], rejected[shared:]


def turns_of_transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant:"; what stands before the first mark is the system's.

    A text without marks is one user turn. Of marks that mean one speaker the first kind counts: "Answer:" within an
    answer of "Assistant:" is a part of it.
    """
    marks = spoken_marks(text)
    kinds: dict[str, str] = {}  # the speaker -> the mark that counts
    marks = [mark for mark in marks if kinds.setdefault(speaker_of(mark), _kind(mark)) == _kind(mark)]
    if not marks:
        return [{"role": "user", "content": text}]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    before = _content(text[: marks[0].start()])
    turns = [{"role": "system", "content": before}] if before else []
    for mark, end in zip(marks, ends, strict=True):
        said = _content(text[mark.end() : end])
        if system := LLAMA_SYSTEM.match(said):
            turns.append({"role": "system", "content": system[1].strip()})
            said = said[system.end() :]
        turns.append({"role": speaker_of(mark), "content": said})
    return turns if turns[-1]["content"] else turns[:-1]  # the open turn of the assistant


def are_spoken(values: Iterable[object]) -> bool:
    """Whether (nearly) all are texts in which a user and an assistant speak, by their marks."""
    texts = list(itertools.islice(values, 100))
    spoken = sum(
        isinstance(text, str) and {"user", "assistant"} <= set(map(speaker_of, spoken_marks(text))) for text in texts
    )
    return bool(texts) and spoken >= 0.9 * len(texts)


def spoken_marks(text: str) -> list[re.Match[str]]:
    """The marks of the turns: at the beginnings of lines, or anywhere in them where nothing else is left.

    That is: no line begins with an assistant's mark, one name of each speaker is used, and user and assistant take
    turns from the user's first word on, which begins the text (or, in capitals, stands behind the system's words).
    """
    marks = list(SPOKEN.finditer(text))
    if any(speaker_of(mark) == "assistant" for mark in marks):
        return marks
    inline = list(INLINE.finditer(text))
    turns = inline[1:] if inline and speaker_of(inline[0]) == "system" else inline
    names = [mark["name"] for mark in turns]
    first = inline[0].start() if inline else 0
    take_turns = len(names) > 1 and all(name == names[i % 2] for i, name in enumerate(names))
    in_order = take_turns and [speaker_of(mark) for mark in turns[:2]] == ["user", "assistant"]
    begins = not text[:first].strip() or names[:1] == ["USER"]
    return inline if in_order and begins else marks


def _answer_marks(text: str) -> list[re.Match[str]]:
    """Where an assistant begins to speak."""
    return list(MARKER.finditer(text)) or [mark for mark in spoken_marks(text) if speaker_of(mark) == "assistant"]


def speaker_of(mark: re.Match[str]) -> str:
    return SAID_BY.get(_kind(mark), "assistant")


def _kind(mark: re.Match[str]) -> str:
    return next(filter(None, mark.groups())).lower()


def _content(text: str) -> str:
    return ENDS.sub("", text).strip()
