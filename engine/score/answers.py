"""Answer files of other evaluations, read and written, so that their own judges can be used.

AlpacaEval     JSON list of {instruction, output, generator}
MT-Bench       JSONL of {question_id, model_id, choices: [{turns: ["..."]}]}, prompts in question.jsonl
Arena-Hard     the same with turns [{content: "..."}]; since 2.0 {uid, model, messages: [...]}
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say
from prefuse.engine.run.files import write_whole
from prefuse.engine.score.contract import Text


@dataclass(frozen=True)
class AnswerFile:
    model: str
    prompts: dict[str, Text]  # by the id of the question
    answers: dict[str, str]


def read_answers(path: str, questions: str | None = None) -> AnswerFile:
    """What one model answered. `questions`: question.jsonl of MT-Bench or Arena-Hard."""
    rows = _rows(Path(path))
    first = rows[0]
    if "instruction" in first and "output" in first:
        return _alpaca(rows, path)
    if "choices" in first or "messages" in first:
        if questions is None:
            raise UserError(f"{path} has answers without their prompts: give --questions question.jsonl too")
        return _arena(rows, path, _questions(questions))
    raise UserError(
        f"{path}: expected answers as AlpacaEval has them (instruction, output, generator), or MT-Bench and Arena-Hard "
        f"(question_id, choices; or uid, messages); its rows have {', '.join(first)}"
    )


def _alpaca(rows: list[dict], path: str) -> AnswerFile:
    prompts: dict[str, Text] = {}
    answers, skipped = {}, []
    for number, row in enumerate(rows):
        instruction, output = row.get("instruction"), row.get("output")
        if not (isinstance(instruction, str) and isinstance(output, str)) or instruction in answers:
            skipped.append(str(number))
            continue
        prompts[instruction] = [{"role": "user", "content": instruction}]
        answers[instruction] = output
    _say_skipped(path, skipped, "no instruction and output as text, or an instruction that stood before")
    return AnswerFile(str(rows[0].get("generator") or Path(path).stem), prompts, answers)


def _arena(rows: list[dict], path: str, questions: dict[str, Text]) -> AnswerFile:
    prompts, answers, skipped, more = {}, {}, [], 0
    for number, row in enumerate(rows):
        own = str(row.get("uid") or row.get("question_id"))
        try:
            turns = _turns(row)
            prompts[own], answers[own] = questions[own], turns[0]
            more += len(turns) > 1
        except (KeyError, IndexError, TypeError, StopIteration):
            skipped.append(str(number))
    _say_skipped(path, skipped, "no text of an answer, or no question of its id")
    if more:
        say(f"{path}: {more} answers have more turns; the first is compared")
    return AnswerFile(str(rows[0].get("model_id") or rows[0].get("model") or Path(path).stem), prompts, answers)


def _turns(row: dict) -> list[str]:
    if "choices" in row:
        found = [turn["content"] if isinstance(turn, dict) else turn for turn in row["choices"][0]["turns"]]
    else:
        found = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    texts = [one["answer"] if isinstance(one, dict) else one for one in found]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("no text")
    return texts


def _questions(path: str) -> dict[str, Text]:
    found: dict[str, Text] = {}
    for row in _rows(Path(path)):
        own = row.get("uid") or row.get("question_id")
        text = row.get("prompt") or (row.get("turns") or [None])[0]
        text = text.get("content") if isinstance(text, dict) else text
        if own is not None and isinstance(text, str):
            found[str(own)] = [{"role": "user", "content": text}]
    if not found:
        raise UserError(f"{path}: expected questions: JSON lines with question_id and turns, or uid and prompt")
    return found


def _rows(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
        listed = text.lstrip()[:1] == "["
        rows = json.loads(text) if listed else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = [row for row in rows if isinstance(row, dict)]
    if not rows:
        raise UserError(f"{path} has no answers: expected a JSON list, or JSON lines, of objects")
    return rows


def _say_skipped(path: str, skipped: list[str], why: str) -> None:
    if skipped:
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        say(f"{path}: rows {', '.join(skipped[:10])}{more} are left out, {why}")


def common(first: AnswerFile, second: AnswerFile) -> list[str]:
    """The ids that both answer; says how many one alone has."""
    both = [own for own in first.answers if own in second.answers]
    alone = len(first.answers) + len(second.answers) - 2 * len(both)
    if not both:
        raise UserError(f"{first.model} and {second.model} answer no prompt in common")
    if alone:
        say(f"{alone} prompts are answered by one of {first.model} and {second.model} alone: left out")
    return both


# ---------------------------------------------------------------------------------------------------------
# Written


def write_alpaca(path: Path, model: str, prompts: Sequence[str], answers: Sequence[str]) -> None:
    rows = [
        {"instruction": prompt, "output": answer, "generator": model, "dataset": "prefuse"}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    _write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def write_annotations(
    path: Path, names: tuple[str, str], annotator: str, prompts: Sequence[str], baseline: Sequence[str],
    answers: Sequence[str], values: Sequence[float],
) -> None:  # fmt: skip
    """AlpacaEval's annotations.json: preference 1 for the baseline (output_1), 2 for the model (output_2)."""
    rows = [
        {
            "instruction": prompt, "output_1": one, "generator_1": names[0], "output_2": two, "generator_2": names[1],
            "annotator": annotator, "preference": None if value != value else 1 + value,
        }
        for prompt, one, two, value in zip(prompts, baseline, answers, values, strict=True)
    ]  # fmt: skip
    _write(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def write_arena(folder: Path, model: str, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """question.jsonl and model_answer/MODEL.jsonl, as FastChat's MT-Bench and Arena-Hard's first version read them."""
    questions = [
        {"question_id": i, "category": "prefuse", "turns": [{"content": prompt}]} for i, prompt in enumerate(prompts, 1)
    ]
    rows: list[dict[str, Any]] = [
        {
            "question_id": i, "answer_id": f"{model}-{i}", "model_id": model,
            "choices": [{"index": 0, "turns": [{"content": answer}]}], "tstamp": time.time(),
        }
        for i, answer in enumerate(answers, 1)
    ]  # fmt: skip
    (folder / "model_answer").mkdir(parents=True, exist_ok=True)
    _write(folder / "question.jsonl", "".join(json.dumps(row) + "\n" for row in questions))
    _write(folder / "model_answer" / f"{model}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8", errors="backslashreplace").decode())  # half a surrogate pair is no UTF-8


def file_name(model: str) -> str:
    """A model's path as the name of a file."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model).strip("._") or "model"
