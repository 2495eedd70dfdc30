"""Monte-Carlo labels of steps: how often does an answer come out right when a model goes on from there?

    prefuse label --label_form steps --model_name_or_path sft --dataset_name solutions.jsonl \
        --scorer number=solution --num_generations 8 --output_file steps.jsonl

From the end of each step num_generations rollouts are sampled, and each whole answer is judged by an outcome scorer. A
step's share is that of its rollouts which succeed; its label is that share (soft), or whether any succeeds (hard): Wang
et al. 2024 (Math-Shepherd, arXiv 2312.08935), eq. 3 and 4. Behind the last step nothing is left to sample: the answer
itself is judged. Rows come out in TRL's stepwise form, which `prefuse reward --reward_loss steps` reads.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import text_options
from prefuse.engine.data.examples import Prompt
from prefuse.engine.data.records import BadRow, DataError, Record, Skipped
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.steps import SEPARATOR, encoded, solution, steps_of
from prefuse.engine.data.templates import template_of
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import device_of, load_tokenizer
from prefuse.engine.report.log import print_table, say
from prefuse.engine.rounds.sampler import Sampler, seed_of, texts_of
from prefuse.engine.rounds.served import source_of
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.score.contract import Scorer, Text

SHOWN = 5  # rows left out, by name


@dataclass(frozen=True)
class Solved:
    """A row: a prompt, and an answer in steps. S steps."""

    row: str
    prompt: Text
    steps: list[str]
    ids: list[list[int]]  # (S,) token ids of the prompt and the answer up to the end of each step
    values: dict[str, Any]  # of the columns that the scorer reads

    def text(self, count: int, separator: str) -> str:
        """The answer's first `count` steps, each with its separator; the last step of all has none behind it."""
        return separator.join(self.steps[:count]) + (separator if count < len(self.steps) else "")


def label_steps(config: Config, scorer: Scorer) -> dict[str, float]:
    """Writes output_file and returns what was counted. One line names the rows that are left out."""
    if hasattr(scorer, "compare"):
        raise UserError(f"{scorer.name} compares: labels of steps need a scorer that says whether one answer is right")
    device, separator = device_of(config), config.separator() or SEPARATOR
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    sampler = Sampler(source_of(config, tokenizer, device), scorer, {})
    solved, skipped = read_solved(config, sampler, separator)
    shares, lost = shares_of(solved, sampler, config, separator)
    rows = []
    for one, own in zip(solved, shares, strict=True):
        if any(share != share for share in own):
            skipped.append(Skipped(one.row, "a step has no rollout with a score"))
            continue
        hard = config.step_labels == "hard"
        labels = [share > 0 for share in own] if hard else own
        about = {"shares": own, "rollouts": config.num_generations, "meta_row": one.row}
        about |= {
            "annotator_name": scorer.name,
            "annotator_key": scorer.key,
            "meta_rollouts_by": config.model_name_or_path,
        }
        rows.append({"prompt": one.prompt, "completions": one.steps, "labels": labels, **about})
    if skipped:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        say(f"{len(skipped)} rows are left out: {', '.join(f'{s.row} ({s.reason})' for s in skipped[:SHOWN])}{more}")
    if not rows:
        raise UserError("no row has labels for all of its steps")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(Path(config.output_file), lines.encode("utf-8", errors="backslashreplace").decode())
    flat = [share for row in rows for share in row["shares"]]
    metrics = {
        "rows": float(len(rows)), "left_out": float(len(skipped)), "steps": float(len(flat)),
        "mean_share": sum(flat) / len(flat), "any_success": sum(share > 0 for share in flat) / len(flat),
        "right_answers": sum(row["shares"][-1] > 0 for row in rows) / len(rows), "without_score": float(lost),
    }  # fmt: skip
    write_whole(Path(config.output_file).with_suffix(".trust.json"), json_text(metrics, indent=1) + "\n")
    title = f"labels of steps by rollouts of {config.model_name_or_path}, judged by {scorer.name}"
    print_table(title, ["", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    say(f"wrote {len(rows)} rows to {config.output_file}")
    return metrics


def shares_of(
    solved: list[Solved], sampler: Sampler, config: Config, separator: str
) -> tuple[list[list[float]], int]:  # (P, S), rollouts without a score
    """The share of successes from the end of each step; NaN where no rollout has a score."""
    places = [(p, s) for p, one in enumerate(solved) for s in range(len(one.steps))]
    asked = [place for place in places if place[1] + 1 < len(solved[place[0]].steps)]
    names = [f"{solved[p].row}, step {s + 1}" for p, s in places]
    starts = [Prompt(solved[p].ids[s], "", f"{solved[p].row}, step {s + 1}", solved[p].prompt) for p, s in asked]
    goes_on = dict(zip(asked, _rollouts(starts, sampler, config), strict=True))
    answers = []
    for p, s in places:
        before = solved[p].text(s + 1, separator)
        answers.append([before + text for text in goes_on.get((p, s), [""])])
    columns = {name: [solved[p].values.get(name) for p, _ in places] for name in sampler.scorer.columns}
    judged = Sampler(sampler.source, sampler.scorer, columns)
    whole = [Prompt([], "", name, solved[p].prompt) for name, (p, _) in zip(names, places, strict=True)]
    scores = judged.score(range(len(places)), whole, answers)
    shares: list[list[float]] = [[] for _ in solved]
    lost = 0
    for (p, _), own, texts in zip(places, scores, answers, strict=True):
        known = [score > config.success_threshold for score in own[: len(texts)].tolist() if not math.isnan(score)]
        lost += len(texts) - len(known)
        shares[p].append(sum(known) / len(known) if known else math.nan)
    return shares, lost


def _rollouts(starts: list[Prompt], sampler: Sampler, config: Config) -> list[list[str]]:
    if not starts:  # answers of one step alone
        return []
    sampler.source.check(starts)
    return texts_of(sampler.sample(starts, config.num_generations, seed_of(config.seed, "steps"), "rollouts"))


# ---- rows ----------------------------------------------------------------------------------------


def read_solved(config: Config, sampler: Sampler, separator: str) -> tuple[list[Solved], list[Skipped]]:
    """The rows' answers in steps; where a row has a prompt alone, the model answers it once. And what is left out."""
    source, split = config.dataset_name, config.dataset_train_split
    if config.datasets or not source:
        raise DataError("labels of steps read one dataset_name, no mixture")
    tokenizer = sampler.source.tokenizer
    template = template_of(tokenizer, text_options(config)) if tokenizer.chat_template else None
    rows = list(open_source(source, split, config.dataset_config).rows())[: config.num_prompts or None]
    alone = [(name, row) for name, row in rows if isinstance(row, dict) and _steps_in(row, separator) is None]
    sampled = _answered(alone, sampler, template, config)
    solved, skipped = [], []
    records: list[Record | Skipped] = []
    for name, row in rows:
        try:
            if not isinstance(row, dict):
                raise BadRow("the row is no object")
            steps = _steps_in(row, separator)
            steps = steps_of(sampled.get(name, ""), separator) if steps is None else steps
            records.append(solution(name, row.get("prompt"), steps, template, separator))
        except BadRow as problem:
            records.append(Skipped.of(name, problem))
    for (name, row), read, record in zip(rows, records, encoded(records, tokenizer), strict=True):
        ends = [] if isinstance(record, Skipped) else [i + 1 for i, end in enumerate(record.learned or []) if end]
        if isinstance(record, Skipped):
            skipped.append(record)
        elif len(ends) != len(steps := [text for text, is_end in read.sides["completion"] if not is_end]):
            skipped.append(Skipped(name, f"the tokenizer has no token for the separator {separator!r}"))
        else:
            ids = [record.prompt + record.sides["completion"][:end] for end in ends]
            values = {column: row.get(column) for column in sampler.scorer.columns}
            solved.append(Solved(name, row["prompt"], steps, ids, values))
    if not solved:
        raise DataError(f"{source} has no usable row, such as {skipped[0].row}: {skipped[0].reason}")
    return solved, skipped


def _steps_in(row: dict, separator: str) -> Any:
    """The row's own answer in steps, or None. `completions` is a list of steps, `completion` one text."""
    if row.get("completions") is not None:
        return row["completions"]
    text = row.get("completion")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
        text = text[0].get("content")
    return steps_of(text, separator) if isinstance(text, str) else text


def _answered(
    rows: list[tuple[str, dict]], sampler: Sampler, template: ChatTemplate | None, config: Config
) -> dict[str, str]:
    """{row: one answer of the model} for rows that have a prompt alone."""
    records: list[Record | Skipped] = []
    for name, row in rows:
        try:
            record = solution(name, row.get("prompt"), ["-"], template, SEPARATOR)
            records.append(Record(name, record.prompt, {}, rendered=True))
        except BadRow:  # it is named where its steps are read
            continue
    prompts = [
        Prompt(one.prompt, "", one.row) for one in encoded(records, sampler.source.tokenizer) if isinstance(one, Record)
    ]
    if not prompts:
        return {}
    sampler.source.check(prompts)
    said = sampler.sample(prompts, 1, seed_of(config.seed, "solutions"), "answers")
    say(f"{len(prompts)} rows have a prompt alone: the model answers them, and its answers are labelled")
    return {prompt.row: own[0].text for prompt, own in zip(prompts, said, strict=True)}
