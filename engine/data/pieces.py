"""Token ids as the pieces of text that they stand for, and each token's part in training.

decode(ids) is what the pieces make when they are joined. Bytes of one character that stand in several tokens go to the
last of them; the others have an empty piece.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prefuse.engine.data.batches import Examples

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character
MOST_WAITING = 8  # tokens without text in a row; more are no character, but wrong bytes
ROLES = {
    "prompt": "prompt: read, not learned",
    "learned": "learned",
    "chosen": "learned: made more likely",
    "rejected": "learned: made less likely",
    "ignored": "in the completion, not learned",
    "read": "answer: read by the reward model",
    "scored": "where its score stands",
}


@dataclass(frozen=True)
class Side:
    """One sequence of an example: a name, its token ids, the text of each, and the role of each."""

    name: str
    ids: list[int]
    pieces: list[str]
    roles: list[str]


def pieces_of(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the text of those before it."""

    def decode(begin: int, end: int) -> str:
        return tokenizer.decode(list(ids[begin:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces: list[str] = []
    begin, first, before = 0, 0, ""  # `first`: of the tokens whose text is still to come; `before`: of begin to first
    for end in range(1, len(ids) + 1):
        text = decode(begin, end)
        if text.endswith(UNFINISHED) and end < len(ids) and end - first <= MOST_WAITING:
            pieces.append("")
            continue
        pieces.append(text.removeprefix(before))
        # The next token is decoded behind these: decoders treat the first token of a text in a way of its own.
        begin, first, before = first, end, decode(first, end)
    return pieces


def sides_of(examples: Examples, index: int, tokenizer, command: str = "train") -> list[Side]:
    """The sequences of one example, a pair's chosen one first; of a ranking the best one.

    `command`: what is done with them. `reward` reads answers and gives them scores; `online` has prompts alone.
    """
    sequences = examples.sequences_of(index)
    if command == "online":
        prompt = sequences[0][0]
        return [Side("prompt", list(prompt), pieces_of(tokenizer, prompt), ["prompt"] * len(prompt))]
    names = ["completion"]
    if examples.sides > 1:
        names = ["chosen", "rejected", *(f"rejected, {place}." for place in range(3, len(sequences) + 1))]
    sides = []
    for name, (prompt, completion) in zip(names, sequences, strict=True):
        role = name.split(",")[0] if examples.sides > 1 else _role(examples, index)
        learned = [True] * len(completion)
        if examples.learned is not None:
            learned = examples.learned_of(index).tolist()
        elif command == "reward":  # one score, at the end
            learned[:-1] = [False] * len(learned[:-1])
        yes, no = ("scored", "read") if command == "reward" else (role, "ignored")
        roles = ["prompt"] * len(prompt) + [yes if counts else no for counts in learned]
        ids = [*prompt, *completion]
        sides.append(Side(name, ids, pieces_of(tokenizer, ids), roles))
    return sides


def _role(examples: Examples, index: int) -> str:
    if examples.labels is None:
        return "learned"
    return "chosen" if examples.labels[index] else "rejected"


def sides_as_json(sides: Sequence[Side]) -> list[dict]:
    """For JSON."""
    return [asdict(side) for side in sides]
