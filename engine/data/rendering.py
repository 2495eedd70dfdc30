"""One chat template, rendered: with the run's date, its arguments, and limits on time and size.

    ChatTemplate(tokenizer).text(messages) == tokenizer.apply_chat_template(messages, tokenize=False)

A template is a program from elsewhere. It may recurse, divide by zero, or never end; then it is refused in one line.
"""

import datetime
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from prefuse.engine.data.records import BadRow, DataError
from prefuse.engine.data.turns import Message, parsed

PROBE = {"probe": "a  b"}  # arguments of a tool call
PROBE_TEXT = json.dumps(PROBE)
SECONDS = 10  # CPU time that one conversation may take
CHARACTERS = 50_000_000  # that one conversation may become


class ChatTemplate:
    """The chat template of a tokenizer, compiled once."""

    def __init__(
        self,
        tokenizer: Any,
        arguments: dict[str, Any] | None = None,
        date: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """`arguments`: what every row's template sees; `date`: the day that the template is told, "2026-11-28";
        `system_prompt`: the first turn of conversations that have no system turn, for `begun` and `prompt`."""
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self._probing, self._printed_calls = False, {}
        day = datetime.datetime.fromisoformat(date or datetime.date.today().isoformat())
        self.variables = {**tokenizer.special_tokens_map, "strftime_now": day.strftime, **(arguments or {})}

    def begun(self, turns: list[Message]) -> list[Message]:
        """A prompt's turns with the default system prompt."""
        if self.system_prompt and (not turns or turns[0]["role"] not in ("system", "developer")):
            return [{"role": "system", "content": self.system_prompt}, *turns]
        return turns

    def prompt(self, turns: list[Message]) -> str:
        """The text of a prompt, as it stands where the model answers it."""
        return self.text(self.begun(turns), generation_prompt=True)

    def ids(self, messages: list[Message], *, generation_prompt: bool = False) -> list[int]:
        """The token ids of the whole text; the template writes the special tokens itself."""
        text = self.text(messages, generation_prompt=generation_prompt)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(
        self,
        messages: list[Message],
        *,
        generation_prompt: bool = False,
        tools: list[Message] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> str:
        """What the template writes for a conversation; BadRow if it refuses it."""
        compiled, variables = self._prepared(messages, tools, arguments)
        with _limits():
            return "".join(_bounded(compiled.generate(variables, add_generation_prompt=generation_prompt)))

    def marked(
        self, messages: list[Message], *, tools: list[Message] | None = None, arguments: dict[str, Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the template's {% generation %} blocks stand in it."""
        compiled, variables = self._prepared(messages, tools, arguments)
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        with _limits(), compiled.environment.activate_tracker(pieces, spans):
            for piece in _bounded(compiled.generate(variables, add_generation_prompt=False)):
                pieces.append(piece)
        return "".join(pieces), spans

    def _shaped(self, turn: Message) -> Message:
        """The turn as this template reads it: content in parts, a call's arguments as an object or as JSON text, and
        its content, where it has none, as an empty text."""
        if "tool_calls" in turn and not self._probing:
            turn = turn | {"tool_calls": [self._shaped_call(call) for call in turn["tool_calls"]]}
            if "content" not in turn and self._asks_for_content:
                turn = turn | {"content": ""}
        if isinstance(turn.get("content"), str) and not self._probing and self._reads_parts:
            return turn | {"content": [{"type": "text", "text": turn["content"]}]}
        return turn

    def _shaped_call(self, call: Message) -> Message:
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not self._prints_call(PROBE_TEXT):
            arguments = parsed(arguments, f'the arguments of the tool call "{function["name"]}"')
        elif isinstance(arguments, dict) and not self._prints_call(PROBE) and self._prints_call(PROBE_TEXT):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return (
            call if arguments is function.get("arguments") else call | {"function": function | {"arguments": arguments}}
        )

    @cached_property
    def _reads_parts(self) -> bool:
        """Templates of models that see images read a content as a list of parts, and drop a string."""
        word = "a question"
        return not self._prints([{"role": "user", "content": word}], word) and self._prints(
            [{"role": "user", "content": [{"type": "text", "text": word}]}], word
        )

    @cached_property
    def _asks_for_content(self) -> bool:
        """Whether a call without a content is refused, as by templates that write `'' + message['content']`."""
        call = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": {}}}
        asked, turn = {"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}
        return not self._prints([asked, turn], "") and self._prints([asked, turn | {"content": ""}], "")

    def _prints_call(self, arguments: Any) -> bool:
        """Whether such arguments of a tool call are printed as they are."""
        if type(arguments) not in self._printed_calls:
            function = {"name": "probe", "arguments": arguments}
            call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
            said = PROBE_TEXT if isinstance(arguments, str) else PROBE["probe"]
            self._printed_calls[type(arguments)] = self._prints([{"role": "user", "content": "Q"}, call], said)
        return self._printed_calls[type(arguments)]

    def _prints(self, messages: list[Message], text: str) -> bool:
        self._probing = True
        try:
            return text in self.text(messages)
        except BadRow:
            return False
        finally:
            self._probing = False

    def source(self, tools: list[Message] | None = None) -> str:
        return self.tokenizer.get_chat_template(None, tools)

    def reads(self, tools: list[Message] | None = None) -> list[str]:
        """The names that the template takes from outside: messages, its arguments, functions."""
        from jinja2.meta import find_undeclared_variables
        from transformers.utils.chat_template_utils import _compile_jinja_template

        source = self.source(tools)
        return sorted(find_undeclared_variables(_compile_jinja_template(source).environment.parse(source)))

    def marks_answers(self, tools: list[Message] | None = None) -> bool:
        source = self.source(tools)
        return "generation" in source and "endgeneration" in source

    def _prepared(self, messages: list[Message], tools: list[Message] | None, arguments: dict[str, Any] | None) -> Any:
        # What apply_chat_template does before it renders; it cannot be told a date.
        from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

        try:
            compiled = _compile_jinja_template(self.source(tools))
        except Exception as error:  # not Jinja, or Jinja that this version does not know
            raise DataError(
                f"the chat template cannot be read: {_said(error)}. Fix: give another --chat_template"
            ) from None
        messages = [self._shaped({key: value for key, value in turn.items() if value is not None}) for turn in messages]
        variables = self.variables | (arguments or {})
        return compiled, {"messages": _alias_reasoning_fields(messages), "tools": tools, "documents": None, **variables}


class _TooLong(Exception):
    pass


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > CHARACTERS:
            raise _TooLong(f"it writes more than {CHARACTERS} characters")
        yield piece


@contextmanager
def _limits() -> Iterator[None]:
    """A row that the template refuses is a BadRow; a template that does not end stops the run."""
    try:
        with _cpu_seconds(SECONDS):
            yield
    except _TooLong as error:
        raise DataError(f"the chat template does not end: {error}. Fix: give another --chat_template") from None
    except RecursionError:
        raise BadRow("the chat template refuses it: it calls itself without end") from None
    except Exception as error:  # whatever the template's own code raises
        raise BadRow(f"the chat template refuses it: {_said(error)}") from None


@contextmanager
def _cpu_seconds(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the main thread after so much CPU time. (Signals reach no other thread.)"""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong(f"one conversation takes more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    # And again: Python drops what is raised while an object is freed.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _said(error: Exception) -> str:
    """The error in one line: jinja2's and Python's own say enough by their class where they have no message."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return (
        text if text and name in ("TemplateError", "UndefinedError", "ValueError") else f"{name}: {text}".rstrip(": ")
    )
