"""Pairs whose better side is named: prompt/chosen/rejected and its many spellings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefuse.engine.data.forms.demonstrations import NO_CHANCE
from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally, make_record
from prefuse.engine.data.forms.implicit import is_transcripts, split_strings, split_transcripts, split_turns
from prefuse.engine.data.forms.listed import find_listed
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import ANSWERS, CONVERSATIONS, PROMPTS, SYSTEMS, answer_names, side_names
from prefuse.engine.data.forms.prompts import PromptColumns, find_prompt, with_turns_before
from prefuse.engine.data.forms.turns import read_text, turn_of
from prefuse.engine.data.records import BadRow, Message, Record, Text

REPEATED = "rows whose prompt stood at the start of both sides, and is cut off there"
ANSWERED = "rows whose prompt ended with one of the two answers, and loses it"
REPEATED_ONCE = "rows whose prompt stands at the start of one side alone, and stays there"
NAMES = answer_names()
FIRST_OF_SEVERAL = "rows with several answers on one side: the first counts"


def find_pair(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    sides = _sides(look, named)
    if sides is None:
        return None
    look.used |= set(sides)
    duplicate = _copy_of_chosen(look, sides[0])
    if duplicate:
        look.used.add(duplicate)
    prompt = find_prompt(look, named)
    became = [*(prompt.became if prompt else ()), (sides[0], "chosen"), (sides[1], "rejected")]
    if duplicate:
        became.append((duplicate, "not used: it repeats chosen"))
    notes: Counter[str] = Counter()
    if _are_lists_of_answers(look, sides):
        return _lists_form(look, named, sides, became, prompt, notes)
    if prompt:
        ends_answered = _ends_answered(look, prompt, sides)

        def read(name: str, row: Row) -> Iterable[Record]:
            text = prompt.read(row)
            chosen, rejected = (_side(row, column, notes) for column in sides)
            if ends_answered and _is_answered(text, chosen, rejected):
                notes[ANSWERED] += 1
                text = text[:-1]
            yield pair(name, text, chosen, rejected, notes)

        return Form(
            "pair", "/".join([prompt.text, *sides]), (prompt.text, *sides), tuple(became), read,
            as_turns=prompt.as_turns, optional=tuple(prompt.optional), tally=Tally(notes),
        )  # fmt: skip
    return _implicit_form(look, named, sides, became, notes)


def _ends_answered(look: Look, prompt: PromptColumns, sides: tuple[str, str]) -> bool:
    """Whether the conversations of (nearly) all first rows end with one of their two answers."""
    if not look.all_are(prompt.text, list):
        return False
    ends = 0
    for row in look.first:
        try:
            ends += _is_answered(prompt.read(row), *(read_text(row[side], side) for side in sides))
        except (BadRow, KeyError):
            continue  # the row is bad, and is named where it is read
    return ends >= 0.9 * len(look.first)


def _is_answered(prompt: Text, *sides: Text) -> bool:
    last = prompt[-1] if isinstance(prompt, list) and prompt else {"role": None}
    answers = [side if isinstance(side, str) else side[-1].get("content") for side in sides if side]
    return last["role"] == "assistant" and last.get("content") in answers


def _implicit_form(look: Look, named: Any, sides: tuple[str, str], became: list[Any], notes: Counter[str]) -> Form:
    """No prompt column: both sides begin with the prompt."""
    system = named.get("system", [None])[0] or look.find(*SYSTEMS)
    if system:
        look.used.add(system)
        became.insert(0, (system, "first turn"))
    transcripts = is_transcripts(look.values[sides[0]], look.values[sides[1]])

    def split(row: Row) -> tuple[Text, Text, Text]:
        chosen, rejected = (_side(row, column, notes) for column in sides)
        if isinstance(chosen, list) and isinstance(rejected, str):  # another last turn
            rejected = [turn_of("assistant", rejected, sides[1])]
        if isinstance(chosen, list) and isinstance(rejected, list) and _answers_alone(rejected, chosen):
            rejected = [*chosen[:-1], *rejected]
        if isinstance(chosen, list) and isinstance(rejected, list):
            prompt, chosen, rejected = split_turns(chosen, rejected)
            return with_turns_before(row, system, None, prompt), chosen, rejected
        if isinstance(chosen, str) and isinstance(rejected, str):
            parts = split_transcripts(chosen, rejected) if transcripts else split_strings(chosen, rejected, notes)
            if system and row.get(system):
                raise BadRow(f'"{system}" needs turns, and "{sides[0]}" is a string with its prompt inside')
            return parts
        raise BadRow(f'"{sides[0]}" and "{sides[1]}" must both be strings or both be messages')

    def read(name: str, row: Row) -> Iterable[Record]:
        prompt, chosen, rejected = split(row)
        yield make_record(name, prompt, {"chosen": chosen, "rejected": rejected})

    optional = (system,) if system else ()
    return Form("pair", "/".join(sides), sides, tuple(became), read, optional=optional, tally=Tally(notes))


def _answers_alone(rejected: Text, chosen: Text) -> bool:
    """The worse side is an answer alone, the better one a whole conversation."""
    return (
        len(rejected) == 1
        and rejected[0]["role"] == "assistant"
        and chosen[:1] != []
        and chosen[0]["role"] != "assistant"
    )


def pair(name: str, prompt: Text, chosen: Text, rejected: Text, notes: Counter[str], **more: Any) -> Record:
    """One pair, whether prompt and sides are strings or turns, and whether or not the sides repeat the prompt."""
    sides = {"chosen": chosen, "rejected": rejected}
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides.values()):
        if _begins_both(prompt, chosen, rejected):
            notes[REPEATED] += 1
            sides = {side: text[len(prompt) :] for side, text in sides.items()}
        elif len(prompt.strip()) >= NO_CHANCE and chosen.startswith(prompt) != rejected.startswith(prompt):
            notes[REPEATED_ONCE] += 1
        return make_record(name, prompt, sides, **more)
    asked = prompt[-1].get("content") if isinstance(prompt, list) and prompt else None
    if asked and all(isinstance(side, str) for side in sides.values()) and _begins_both(asked, chosen, rejected):
        notes[REPEATED] += 1
        sides = {side: text[len(asked) :] for side, text in sides.items()}
    turns = {
        side: [turn_of("assistant", text, side)] if isinstance(text, str) else text for side, text in sides.items()
    }
    if isinstance(prompt, str):
        # Many published sets repeat, as a string, the question that chosen and rejected both start with.
        if any(side[:1] and side[0]["role"] != "assistant" for side in turns.values()):
            shared, *rest = split_turns(turns["chosen"], turns["rejected"])
            if not shared:
                raise BadRow("the prompt has no turn")
            if not any(turn.get("content", "").strip() == prompt.strip() for turn in shared):
                raise BadRow('"prompt" is a string, and it is none of the turns that chosen and rejected share')
            return make_record(name, shared, dict(zip(turns, rest, strict=True)), **more)
        prompt = [turn_of("user", prompt, "prompt")]
    if prompt and all(side[: len(prompt)] == prompt and len(side) > len(prompt) for side in turns.values()):
        notes[REPEATED] += 1
        turns = {side: text[len(prompt) :] for side, text in turns.items()}
    else:
        turns = {side: _without_last_question(prompt, text) for side, text in turns.items()}
    return make_record(name, prompt, turns, **more)


def _without_last_question(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """A side may repeat the user's last turn alone, where a system turn stands before it."""
    same = len(turns) > 1 and turns[0]["role"] == "user" and prompt[-1:] == turns[:1]
    return turns[1:] if same else turns


def _begins_both(prompt: str, chosen: str, rejected: str) -> bool:
    """Both sides begin with the prompt as a whole, not with its letters inside a longer word."""
    if not prompt.strip() or not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        return False
    rests = chosen[len(prompt) :], rejected[len(prompt) :]
    return all(rest.strip() and (not prompt[-1].isalnum() or not rest[0].isalnum()) for rest in rests)


# ---------------------------------------------------------------------------------------------------------
# The columns of the two sides


def _sides(look: Look, named: dict[str, list[str]]) -> tuple[str, str] | None:
    """The columns of the better and the worse side."""
    if "chosen" in named or "rejected" in named:
        chosen = named.get("chosen", [None])[0] or look.find("chosen")
        rejected = named.get("rejected", [None])[0] or look.find("rejected")
        return (chosen, rejected) if chosen and rejected else None
    for names in side_names():
        chosen, rejected = (look.find(name) for name in names)
        if chosen and rejected and look.is_text(chosen) and look.is_text(rejected):
            return chosen, rejected
    for rejected in filter(None, (look.find("rejected_response"), look.find("rejected_messages"))):
        chosen = look.find(*CONVERSATIONS)  # the conversation ends with the better answer
        if chosen and look.is_text(rejected):
            return chosen, rejected
    both = look.find("chosen"), look.find("rejected")  # named so, whatever they hold: their rows say what is wrong
    if not all(both) or (all(map(look.is_numbers, both)) and _may_be_about_answers(look)):
        return None
    return both  # type: ignore[return-value]


def _may_be_about_answers(look: Look) -> bool:
    """Whether numbers under chosen and rejected may be places or scores of other columns' answers."""
    beside = any(look.is_text(look.find(first)) and look.is_text(look.find(second)) for first, second, *_ in NAMES)
    asked = look.find(*PROMPTS)
    others = find_listed(look, {}) or look.find(*CONVERSATIONS) or look.find(*ANSWERS)
    return beside or bool(others) or not look.all_are(asked, str)


def _copy_of_chosen(look: Look, chosen: str) -> str | None:
    """A `messages` column beside chosen that is the same conversation, as some published sets have it."""
    for column in look.find_all(*CONVERSATIONS):
        if look.values[column] == look.values[chosen]:
            return column
    return None


def _side(row: Row, column: str, notes: Counter[str]) -> Text:
    text = read_text(row[column], column)
    if column.endswith("preferred_output") and isinstance(text, list) and len(text) > 1:
        if all(turn["role"] == "assistant" and not turn.get("tool_calls") for turn in text):
            notes[FIRST_OF_SEVERAL] += 1
            return text[:1]
    return text


# ---------------------------------------------------------------------------------------------------------
# Lists of strings on both sides (RM-Bench)


def _are_lists_of_answers(look: Look, sides: tuple[str, str]) -> bool:
    """Of one side at least; the other may be one string."""
    lists = [look.all_are(side, list) and _is_list_of_answers(look.values[side]) for side in sides]
    return any(lists) and all(is_list or look.all_are(side, str) for is_list, side in zip(lists, sides, strict=True))


def _is_list_of_answers(values: list[Any]) -> bool:
    lists = [value for value in values if isinstance(value, list) and value]
    return bool(lists) and all(isinstance(text, str) for value in lists for text in value)


def _lists_form(look: Look, named: Any, sides: Any, became: Any, prompt: Any, notes: Counter[str]) -> Form | None:
    if prompt is None:
        return None

    def read(name: str, row: Row) -> Iterable[Record]:
        chosen, rejected = ([row[side]] if isinstance(row[side], str) else row[side] for side in sides)
        text = prompt.read(row)
        for texts, side in ((chosen, sides[0]), (rejected, sides[1])):
            if not isinstance(texts, list) or not texts or not all(isinstance(part, str) for part in texts):
                raise BadRow(f'"{side}" must be a list of strings')
        if len(chosen) == len(rejected):
            notes["rows of two lists of one length: paired in order"] += 1
            both = [(i, i) for i in range(len(chosen))]
        else:
            notes["rows of two lists of different lengths: each chosen answer with each rejected one"] += 1
            both = [(i, j) for i in range(len(chosen)) for j in range(len(rejected))]
        for i, j in both:
            texts = [_answer(part, prompt.as_turns) for part in (chosen[i], rejected[j])]
            yield pair(f"{name} ({i} over {j})", text, *texts, notes)

    columns = (prompt.text, *sides)
    return Form(
        "pair", "/".join(columns), columns, tuple(became), read, as_turns=prompt.as_turns,
        optional=tuple(prompt.optional), tally=Tally(notes),
    )  # fmt: skip


def _answer(text: str, as_turns: bool) -> Text:
    return [turn_of("assistant", text, "answer")] if as_turns else text
