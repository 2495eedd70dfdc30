"""A Python function as a scorer: `rewards.py:name`, with the signature of TRL's reward functions.

    def name(prompts, completions, **columns) -> list[float | None]

Conversations come as TRL gives them: `prompts` as messages, `completions` as [{"role": "assistant", "content": ...}].
It gets the columns of the rows that it names (all that were read, if it has **kwargs). None means no score. A file is
the user's own code and is run as such, in this process.
"""

import asyncio
import hashlib
import importlib.util
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.engine.errors import UserError
from prefuse.engine.score.contract import Columns, NoScore, Scores, Text, by_answer

BATCH = 64  # answers in one call
MOST_TIMEOUTS = 3  # in a row; the answers behind them are not asked about


@dataclass(frozen=True)
class Function:
    name: str
    call: Callable[..., Any]
    columns: tuple[str, ...]
    key: str
    timeout: float = 60.0  # seconds a call

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        return by_answer(self._flat, prompts, answers, columns)

    def _flat(self, prompts: list[Text], answers: list[str], columns: dict[str, list]) -> list[float | NoScore]:
        """In batches; of a batch that fails every answer is asked about alone, so that one bad row costs itself."""
        found: list[float | NoScore] = []
        late = 0

        def ask(part: range) -> list[float | NoScore] | NoScore:
            nonlocal late
            if late >= MOST_TIMEOUTS:
                return NoScore("not asked", f"after {MOST_TIMEOUTS} calls in a row that timed out")
            outcome = self._ask(prompts, answers, columns, part)
            late = late + 1 if isinstance(outcome, NoScore) and outcome.kind == "timed out" else 0
            return outcome

        for start in range(0, len(answers), BATCH):
            part = range(start, min(start + BATCH, len(answers)))
            outcomes = [ask(part)]
            if isinstance(outcomes[0], NoScore) and len(part) > 1:
                outcomes = [ask(range(i, i + 1)) for i in part]
            for outcome in outcomes:
                found += [outcome] if isinstance(outcome, NoScore) else outcome
        return found

    def _ask(
        self, prompts: list[Text], answers: list[str], columns: dict[str, list], part: range
    ) -> list[float | NoScore] | NoScore:
        own = [prompts[i] for i in part]
        said = [
            [{"role": "assistant", "content": answers[i]}] if isinstance(prompts[i], list) else answers[i] for i in part
        ]
        given = {name: [values[i] for i in part] for name, values in columns.items() if self._takes(name)}
        result = within_seconds(self.timeout, lambda: self.call(prompts=own, completions=said, **given))
        if isinstance(result, NoScore):
            return result
        try:
            values = list(result)
        except TypeError:
            return NoScore("wrong type", f"expected a list of numbers, got {type(result).__name__}")
        if len(values) != len(part):
            return NoScore("wrong length", f"{len(values)} scores for {len(part)} answers")
        return [_number(value) for value in values]

    def _takes(self, name: str) -> bool:
        parameters = inspect.signature(self.call).parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _number(value: Any) -> float | NoScore:
    if value is None:
        return NoScore("none given", "the function returned None")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NoScore("no number", f"{value!r:.60}")


def within_seconds(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns, or why it did not. A call that is late goes on in a thread that nobody waits for."""
    box: list[Any] = []

    def run() -> None:
        try:
            result = call()
            box.append(asyncio.run(result) if inspect.iscoroutine(result) else result)
        except (Exception, SystemExit) as error:  # whatever a file of the user's does
            box.append(NoScore("raised", f"{type(error).__name__}: {error}".splitlines()[0][:200]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else NoScore("timed out", f"no result within {seconds:g} s")


def load_function(spec: str, timeout: float) -> Function:
    """`path/to/file.py:name`."""
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"scorer {spec}: {path} is no file; expected FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"prefuse_scorer_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does
        raise UserError(f"scorer {spec}: {path} cannot be imported: {type(error).__name__}: {error}") from None
    call = getattr(module, name, None)
    if not callable(call):
        names = ", ".join(sorted(n for n, v in vars(module).items() if inspect.isfunction(v))) or "none"
        raise UserError(f"scorer {spec}: {path} has no function {name}; its functions are {names}")
    return Function(spec, call, _columns_of(spec, call), _key_of(file, name), timeout)


def _columns_of(spec: str, call: Callable) -> tuple[str, ...]:
    """The parameters that are neither prompts nor completions: columns of the rows."""
    parameters = inspect.signature(call).parameters
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UserError(f"scorer {spec}: expected a function of (prompts, completions, **columns), as TRL's are")
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return tuple(p.name for p in named if p.name not in ("prompts", "completions") and p.default is p.empty)


def _key_of(file: Path, name: str) -> str:
    return f"function {hashlib.sha256(file.read_bytes()).hexdigest()} {name}"
