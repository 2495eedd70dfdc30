"""Messages -> text, by the chat template of the tokenizer.

The template is rendered up to the assistant's turn, as it is when the model answers, and to the end. The first text
must be a prefix of the second; what follows it, up to the stop token, is the completion. What the template drops or
doubles is found (fidelity.py), and the row is refused with the fix. The template writes its special tokens itself.

Of a conversation that is one demonstration every answer is learned: as pieces of one text where the template writes
an earlier answer like a last one, else as examples of their own, one for each answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from prefuse.engine.data.cures import cure_for_lost_text, cure_for_prefix, folded
from prefuse.engine.data.endings import control_tokens, ending_of, learned_header
from prefuse.engine.data.fidelity import doubled_tag, is_trimmed, lost_in_answer, lost_in_prompt, reasoning_tags
from prefuse.engine.data.marks import Marks
from prefuse.engine.data.records import BadRow, Record, Skipped
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.turns import LEARNED, Message

logger = logging.getLogger(__name__)

Piece = tuple[str, bool]  # a part of a completion, and whether it is learned

# For a tokenizer without a chat template: ChatML, assistant turns ended by EOS so that generation stops.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '<|im_end|>' }}"
    "{% endfor %}"
    "{{ '\n<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class TextOptions:
    """How rows become text, and text tokens: what `prefuse ... --help` says of the settings."""

    turns: Literal["all", "last"] = "all"  # sft: which answers of a conversation are learned
    arguments: dict[str, Any] | None = None  # for the template; a row's chat_template_kwargs come on top
    system_prompt: str | None = None  # first turn of conversations that have none of their own
    date: str | None = None  # "2026-11-28", what templates take for today; None: today
    eos_token: str | None = None  # put behind answers that the template ends with no token
    multi_turn: Literal["refuse", "first", "all"] = "refuse"  # pairs that differ before the last turn
    learn_after_stop: bool = False  # TRL's way: what the template writes behind the stop token is learned too
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    long_completions: Literal["skip", "cut"] = "skip"
    controls: tuple[str, str] | None = None  # before the prompts of good and of bad answers
    control: str | None = None  # before every prompt that is to be answered


def template_of(tokenizer: Any, options: TextOptions) -> ChatTemplate:
    """The tokenizer's chat template, as these options have it rendered."""
    return ChatTemplate(tokenizer, options.arguments, options.date, options.system_prompt)


def render(
    records: Sequence[Record | Skipped], tokenizer: Any, options: TextOptions | None = None
) -> list[Record | Skipped]:
    """Messages as text; strings stay as they are. A conversation may become several records, one for each answer."""
    conversational = any(isinstance(record.prompt, list) for record in records if isinstance(record, Record))
    if not conversational:
        return list(records)
    if not tokenizer.chat_template:
        logger.warning("the tokenizer has no chat template: messages are rendered with a built-in ChatML")
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE  # and saved with the model, which learns this format
    renderer = Renderer(tokenizer, options or TextOptions())
    return [rendered for record in records for rendered in _outcomes(record, renderer)]


def _outcomes(record: Record | Skipped, renderer: "Renderer") -> list[Record | Skipped]:
    if isinstance(record, Skipped) or isinstance(record.prompt, str):
        return [record]
    try:
        return renderer.render(record)
    except BadRow as problem:
        return [Skipped(record.row, str(problem))]


def is_answer(turn: Message) -> bool:
    """Whether a turn is one to learn."""
    return turn["role"] == "assistant" and all(turn.get(name) not in (0, False) for name in LEARNED)


def _require_learned(side: str, turns: list[Message]) -> None:
    if any(turn["role"] == "assistant" for turn in turns) and not any(map(is_answer, turns)):
        raise BadRow(f'no turn to learn: each answer of "{side}" has weight 0')


class Renderer:
    """What is known of a tokenizer's template once, for all rows."""

    def __init__(self, tokenizer: Any, options: TextOptions) -> None:
        self.options = options
        self.template = template_of(tokenizer, options)
        self.marks = Marks(self.template)
        self.tokens = control_tokens(tokenizer)
        self.ending = ending_of(self.template)
        if header := learned_header(self.template):
            _say_once(
                f"the chat template ignores add_generation_prompt: answers are learned with their header {header!r}, "
                "and prompts to be answered end before it. Fix: give another --chat_template, or end this one with "
                f"{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"
            )

    def render(self, record: Record) -> list[Record]:
        arguments = {"tools": record.tools, "arguments": record.template_kwargs}
        prompt, sides = self.template.begun(record.prompt), record.sides
        whole = record.conversation and self.options.turns == "all"
        if whole and len(sides) == 1:
            ((side, turns),) = sides.items()
            conversation = [*prompt, *turns]
            _require_learned(side, conversation)
            answers = [i for i, turn in enumerate(conversation) if is_answer(turn)]
            if len(answers) > 1 or answers[0] != len(prompt) or self.template.marks_answers(record.tools):
                return self._conversation(record, side, conversation, answers, arguments)
        text = self.template.text(prompt, generation_prompt=True, **arguments)
        self._check_prompt(prompt, text, arguments)
        texts = {side: self._side(side, prompt, text, turns, arguments) for side, turns in sides.items()}
        return [replace(record, prompt=text, sides=texts, rendered=True)]

    def _side(
        self, side: str, prompt: list[Message], text: str, turns: list[Message], arguments: dict[str, Any]
    ) -> str | list[Piece]:
        """A completion, in pieces where turns of others stand between its answers."""
        others = [i for i, turn in enumerate(turns) if turn["role"] != "assistant"]
        if not others or self.options.multi_turn == "first":
            turns = turns[: min(others, default=None)]
            _require_learned(side, turns)
            return self._completion(side, prompt, text, turns, arguments)
        if self.options.multi_turn == "refuse" and self.options.turns == "last":
            role = turns[others[0]]["role"]
            raise BadRow(
                f'"{side}" has a turn from "{role}", expected assistant turns only. Fix: --multi_turn first compares '
                "the first answers that differ, --multi_turn all those behind them too"
            )
        _require_learned(side, turns)
        conversation = [*prompt, *turns]
        answers = [i for i in range(len(prompt), len(conversation)) if is_answer(conversation[i])]
        parts = [self._part(side, conversation, i, arguments) for i in answers]
        pieces = _pieces(self.template.text(conversation, **arguments), parts, len(text))
        if pieces is None:
            raise BadRow(
                f'the chat template writes answers of "{side}" otherwise once others follow. Fix: --multi_turn first'
            )
        return pieces

    def _part(self, side: str, conversation: list[Message], i: int, arguments: dict[str, Any]) -> tuple[str, str]:
        """The prompt before the answer at `i`, and the answer."""
        prompt = conversation[:i]
        if not prompt:
            raise BadRow("the conversation begins with an answer: the prompt has no turn")
        text = self.template.text(prompt, generation_prompt=True, **arguments)
        self._check_prompt(prompt, text, arguments)
        return text, self._completion(side, prompt, text, conversation[i : i + 1], arguments)

    def _check_prompt(self, prompt: list[Message], text: str, arguments: dict[str, Any]) -> None:
        tools, own = arguments["tools"], arguments["arguments"]

        def lost_in(messages: list[Message], text: str, own: dict[str, Any] | None) -> str | None:
            return lost_in_prompt(messages, text) or self.marks.lost(messages, 0, tools, own, generation_prompt=True)

        lost = lost_in(prompt, text, own)
        if lost is not None:
            cure = cure_for_lost_text(
                self.template, prompt, tools, lambda messages, text, more: not lost_in(messages, text, more)
            )
            raise BadRow(f"the chat template drops or rewrites {lost}. {cure}")
        unseen = self.marks.unseen_tools(prompt, text, tools, own) if tools else []
        if unseen:
            _say_once(
                f'the chat template does not print all "tools" of the rows ({unseen[0]}): the model will not see them'
            )

    def _completion(
        self, side: str, prompt: list[Message], text: str, turns: list[Message], arguments: dict[str, Any]
    ) -> str:
        """What the template writes for `turns` behind the prompt, up to the stop token."""
        whole = self.template.text([*prompt, *turns], **arguments)
        if not whole.startswith(text):
            whole = self._folded(prompt, text, turns, arguments) or whole
        if not whole.startswith(text):
            cure = cure_for_prefix(self.template, prompt, turns, arguments)
            raise BadRow(
                f'the chat template renders the prompt otherwise when "{side}" follows: no true prefix. {cure}'
            )
        completion = whole[len(text) :]
        self._check_answers(side, text, completion, prompt, turns, arguments)
        return self._ended(completion)

    def _folded(self, prompt: list[Message], text: str, turns: list[Message], arguments: dict[str, Any]) -> str | None:
        """For templates that print the system turn within the last user turn, and drop it once an answer follows.

        The same system text within the user turn gives the same prompt, and stays.
        """
        moved = folded(prompt)
        if moved is None or self.template.text(moved, generation_prompt=True, **arguments) != text:
            return None
        return self.template.text([*moved, *turns], **arguments)

    def _check_answers(
        self, side: str, text: str, completion: str, prompt: list[Message], turns: list[Message],
        arguments: dict[str, Any],
    ) -> None:  # fmt: skip
        """Refuses answers of which the template drops something, or writes the tags of reasoning a second time."""
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        stop = self.ending.stop
        if stop and any((turn.get("content") or "").rstrip().endswith(stop) for turn in answers):
            raise BadRow(f'an answer of "{side}" ends with {stop}, which the template writes too: it would stand twice')
        if any(map(reasoning_tags, answers)):
            tag = doubled_tag(answers, self._header(prompt, text, arguments), completion)
            if tag is not None:
                apart = any(tag in (turn.get("reasoning_content") or "") for turn in answers)
                fix = "leave its tags out" if apart else 'put the reasoning into "reasoning_content"'
                raise BadRow(
                    f'the chat template writes {tag} for "{side}", which has one of its own: it would stand twice. '
                    f"Fix: {fix}, or give another --chat_template"
                )
        if any(is_trimmed(turn, completion) for turn in answers):
            _say_once("the chat template trims white space at the ends of answers: they are learned as it writes them")
        lost = next((found for turn in answers if (found := lost_in_answer(turn, text, completion))), None)
        conversation, tools = [*prompt, *turns], arguments["tools"]
        lost = lost or self.marks.lost(conversation, len(prompt), tools, arguments["arguments"])
        if lost is None:
            return
        cure = cure_for_lost_text(
            self.template,
            conversation,
            tools,
            lambda messages, whole, more: (
                not (_lost(messages, prompt, whole) or self.marks.lost(messages, len(prompt), tools, more))
            ),
        )
        raise BadRow(f'the chat template drops or rewrites text of "{side}": {lost}. {cure}')

    def _header(self, prompt: list[Message], text: str, arguments: dict[str, Any]) -> str:
        """What the template opens an answer with."""
        try:
            bare = self.template.text(prompt, **arguments)
        except BadRow:
            return ""
        return text[len(bare) :] if text.startswith(bare) else ""

    def _ended(self, completion: str) -> str:
        if self.options.learn_after_stop:
            return completion
        completion = self.ending.trimmed(completion, self.tokens)
        eos = self.options.eos_token
        if eos and self.ending.stop is None and not completion.endswith(eos):
            completion = completion.rstrip("\n") + eos
        return completion

    def _conversation(
        self, record: Record, side: str, turns: list[Message], answers: list[int], arguments: dict[str, Any]
    ) -> list[Record]:
        """A conversation whose answers at `answers` are learned: one record, or one for each answer."""
        if self.template.marks_answers(record.tools):
            marked = self._by_marks(record, side, turns, answers, arguments)
            if marked is not None:
                return [marked]
        parts = [self._part(side, turns, i, arguments) for i in answers]
        whole = self.template.text(turns[: answers[-1] + 1], **arguments)
        pieces = _pieces(whole, parts, len(parts[0][0]))
        if pieces is not None:
            return [replace(record, prompt=parts[0][0], sides={side: pieces}, rendered=True)]
        return [replace(record, prompt=text, sides={side: completion}, rendered=True) for text, completion in parts]

    def _by_marks(
        self, record: Record, side: str, turns: list[Message], answers: list[int], arguments: dict[str, Any]
    ) -> Record | None:
        """By the template's {% generation %} blocks, one for each answer; None where they are not so many, or where the
        text does not hold the answers whole, or the prompts as they are when the model answers them."""
        whole, spans = self.template.marked(turns, **arguments)
        spoken = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(spans) != len(spoken):
            return None
        pieces: list[Piece] = []
        prompts = [self.template.text(turns[:i], generation_prompt=True, **arguments) for i in answers]
        at = len(prompts[0])
        learned = [span for span, i in zip(spans, spoken, strict=True) if i in answers]
        for (start, end), prompt, i in zip(learned, prompts, answers, strict=True):
            if not whole.startswith(prompt) or not at <= len(prompt) < end:
                return None
            answer = whole[max(start, len(prompt)) : end]
            try:
                self._check_answers(side, prompt, whole[len(prompt) : end], turns[:i], turns[i : i + 1], arguments)
            except BadRow:  # alone, and last, it may stand whole
                return None
            pieces += [(whole[at : end - len(answer)], False)] if at < end - len(answer) else []
            kept = answer if self.options.learn_after_stop else self.ending.trimmed(answer, self.tokens)
            pieces.append((kept, True))
            at = end - len(answer) + len(kept)
        self._check_prompt(turns[: answers[-1]], prompts[-1], arguments)
        return replace(record, prompt=prompts[0], sides={side: pieces}, rendered=True)


def _pieces(whole: str, parts: list[tuple[str, str]], at: int) -> list[Piece] | None:
    """The text of a conversation behind character `at`, in pieces, learned and not; None if one text does not hold all
    prompts and answers as they are when the model gives them."""
    pieces: list[Piece] = []
    for prompt, answer in parts:
        if not (whole.startswith(prompt) and whole.startswith(answer, len(prompt)) and at <= len(prompt)):
            return None
        pieces += [(whole[at : len(prompt)], False)] if at < len(prompt) else []
        pieces.append((answer, True))
        at = len(prompt) + len(answer)
    return pieces


def _lost(messages: list[Message], prompt: list[Message], whole: str) -> bool:
    return any(lost_in_answer(turn, "", whole) for turn in messages[len(prompt) :] if turn["role"] == "assistant")


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)
