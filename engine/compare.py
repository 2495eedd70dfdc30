"""`prefuse eval --scorer`: whose answers are better, a model's or its reference's, and how sure that is.

    prefuse eval --model_name_or_path run --ref_model_name_or_path base --eval_dataset prompts.jsonl --scorer reward
    prefuse eval --model_answers a.json --ref_answers b.json --scorer judge=http://localhost:8000/v1#judge

prompts -> answers of both (sampled, or read from answer files) -> a scorer or judge -> win rate with ties and a
bootstrap interval, length-controlled win rate, position bias of a judge, agreement with a second one, best-of-n.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.errors import UserError
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, load_tokenizer
from prefuse.engine.model.sampling import sample
from prefuse.engine.report.log import say, table
from prefuse.engine.run.files import json_text, sha256_of, write_whole
from prefuse.engine.score import answers as files
from prefuse.engine.score.contract import Preferences, Scorer, Scores, Text, preferences, say_reasons
from prefuse.engine.score.length_control import length_controlled
from prefuse.engine.score.rubric import shown
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.winrate import best_of_n, cohen_kappa, lengths, win_rate


@dataclass
class Answered:
    """P prompts with N answers of the model, and as many of its reference if there is one."""

    rows: list[str]
    prompts: list[Text]
    columns: dict[str, list]
    names: tuple[str, str | None]  # of the model, of the reference
    answers: list[list[str]]  # (P, N)
    baseline: list[list[str]] | None  # (P, N)
    cut: float | None = None  # share of the model's answers that max_new_tokens cut off


def compare_answers(config: Config) -> dict[str, float]:
    """Prints the metrics, writes them to output_file and the answers to answers_dir."""
    device = device_of(config)
    scorer = scorer_of(config.scorer, config, device)
    gold = scorer_of(config.gold_scorer, config, device) if config.gold_scorer else None
    for one in (scorer, gold):
        refuse_self_judge(one, config)
    if hasattr(scorer, "compare") and not (config.ref_model_name_or_path or config.ref_answers):
        raise UserError(f"{scorer.name} compares two answers: give --ref_model_name_or_path too")
    needed = dict.fromkeys([*scorer.columns, *(gold.columns if gold else ()), *(config.scorer_columns or ())])
    answered = read_answered(config) if config.model_answers else sampled(config, device, list(needed))
    metrics: dict[str, float] = {"prompts": len(answered.rows), "length": lengths(answered.answers)}
    metrics |= {} if answered.cut is None else {"cut_answers": answered.cut}
    found = None
    if answered.baseline is not None:
        metrics["ref_length"] = lengths(answered.baseline)
        found, more = won(answered, scorer, gold, config)
        metrics |= more
    curve = []
    if not hasattr(scorer, "compare"):
        more, curve = scored(answered, scorer, gold)
        metrics |= more
    if config.answers_dir is not None:
        write_answers(answered, scorer, found, Path(config.answers_dir))
    if config.output_file is not None:  # before it is shown: a screen may be gone
        content = metrics | ({"best_of_n": curve} if curve else {})
        write_whole(Path(config.output_file), json_text(content, indent=1) + "\n")
    against = f" against {answered.names[1]}" if answered.baseline is not None else ""
    title = f"{answered.names[0]}{against}, {len(answered.rows)} prompts, by {scorer.name}"
    table(title, ["metric", "value"], [[name, f"{value:.6g}"] for name, value in metrics.items()])
    if curve:
        rows = [[f"{point[name]:.4g}" for name in ("n", "kl", "proxy", "gold")] for point in curve]
        table("best of n by the scorer", ["n", "KL at most, nats", "score", "gold score"], rows)
    return metrics


def won(
    answered: Answered, scorer: Scorer, gold: Scorer | None, config: Config
) -> tuple[Preferences, dict[str, float]]:
    """The comparisons of each answer with the reference's of the same number, and what they come to."""
    size = len(answered.answers[0])
    first = [answer for own in answered.answers for answer in own]
    second = [answer for own in answered.baseline for answer in own]
    prompts = [prompt for prompt in answered.prompts for _ in range(size)]
    rows = [row for row in answered.rows for _ in range(size)]
    columns = {name: [value for value in values for _ in range(size)] for name, values in answered.columns.items()}
    found = preferences(scorer, prompts, first, second, columns)
    say_reasons(scorer.name, found.reasons, rows)
    metrics = win_rate(found.values.view(-1, size), config.seed)
    metrics["length_controlled_win_rate"] = length_controlled(
        found.soft.tolist(), [len(a) for a in first], [len(a) for a in second]
    )
    say(f"  outcomes: {', '.join(f'{name} {count}' for name, count in sorted(found.outcomes.items()))}")
    if metrics["without_verdict"] and hasattr(scorer, "compare"):
        say("  the same command asks again only about what has no verdict")
    if found.first_shown is not None:
        metrics["first_shown_wins"] = found.first_shown
    metrics |= scorer.spent() if hasattr(scorer, "spent") else {}
    if gold is not None:
        other = preferences(gold, prompts, first, second, columns)
        say_reasons(gold.name, other.reasons, rows)
        metrics |= {f"gold_{name}": value for name, value in win_rate(other.values.view(-1, size), config.seed).items()}
        metrics["cohen_kappa"] = cohen_kappa(found.values, other.values)
    return found, metrics


def scored(answered: Answered, scorer: Scorer, gold: Scorer | None) -> tuple[dict[str, float], list[dict]]:
    """Mean scores, and the curve of best-of-n where there are several answers."""
    own = scorer.score(answered.prompts, answered.answers, answered.columns)
    metrics = {"score": _mean(own, scorer.name, answered.rows)}
    if answered.baseline is not None:
        metrics["ref_score"] = _mean(scorer.score(answered.prompts, answered.baseline, answered.columns))
    trusted = own
    if gold is not None:
        trusted = gold.score(answered.prompts, answered.answers, answered.columns)
        metrics["gold_score"] = _mean(trusted, gold.name, answered.rows)
    return metrics, best_of_n(own.values, trusted.values) if own.values.shape[1] > 1 else []


def _mean(scores: Scores, name: str = "", rows: list[str] | None = None) -> float:
    if rows is not None:
        flat = [(row, reason) for row, reasons in zip(rows, scores.reasons, strict=True) for reason in reasons]
        say_reasons(name, [reason for _, reason in flat], [row for row, _ in flat])
    return float(scores.values.nanmean()) if scores.values.numel() else math.nan


def sampled(config: Config, device: torch.device, columns: list[str]) -> Answered:
    """The prompts of the data set, and what model and reference say to them."""
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = read_prompts(config, tokenizer, columns)
    size = config.num_generations
    said, cut = {}, None
    for path in (config.model_name_or_path, config.ref_model_name_or_path):
        if path is None:
            continue
        lm = load_model(path, config, device)
        ids = [prompt.ids for prompt in prompts for _ in range(size)]
        check_prompts(lm, [prompt.ids for prompt in prompts], [prompt.row for prompt in prompts], config.max_new_tokens)
        answers = sample(lm, tokenizer, ids, config)
        if path == config.model_name_or_path:
            cut = sum(not answer.stopped for answer in answers) / len(answers)
        said[path] = [[a.text for a in answers[i : i + size]] for i in range(0, len(answers), size)]
    return Answered(
        [prompt.row for prompt in prompts],
        [prompt.raw for prompt in prompts],
        columns_of_rows(config, prompts, columns),
        (config.model_name_or_path, config.ref_model_name_or_path),
        said[config.model_name_or_path],
        said.get(config.ref_model_name_or_path),
        cut,
    )


def read_answered(config: Config) -> Answered:
    """What stands in two answer files."""
    first = files.read_answers(config.model_answers, config.questions)
    second = files.read_answers(config.ref_answers, config.questions)
    both = files.common(first, second)
    prompts, names = [first.prompts[own] for own in both], (first.model, second.model)
    answers, baseline = ([[one.answers[own]] for own in both] for one in (first, second))
    return Answered([own[:40] for own in both], prompts, {}, names, list(answers), list(baseline))


def write_answers(answered: Answered, scorer: Scorer, found: Preferences | None, folder: Path) -> None:
    """The first answer of each: what the judges of AlpacaEval, MT-Bench and Arena-Hard read."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [shown(prompt) for prompt in answered.prompts]
    own = [answers[0] for answers in answered.answers]
    model = files.file_name(answered.names[0])
    files.write_alpaca(folder / "model_outputs.json", model, prompts, own)
    files.write_arena(folder, model, prompts, own)
    if answered.baseline is not None:
        other, reference = [answers[0] for answers in answered.baseline], files.file_name(answered.names[1])
        reference = reference if reference != model else f"{reference}-reference"
        files.write_alpaca(folder / "reference_outputs.json", reference, prompts, other)
        files.write_arena(folder, reference, prompts, other)
        values = found.values.view(len(prompts), -1)[:, 0].tolist()
        names = (reference, model)
        files.write_annotations(folder / "annotations.json", names, scorer.name, prompts, other, own, values)
    say(f"answers are in {folder}")


def refuse_self_judge(scorer: Scorer | None, config: Config) -> None:
    """A model that judges its own answers prefers them (arXiv 2404.13076)."""
    backend = getattr(scorer, "backend", None)
    if backend is None or config.allow_self_judge:
        return
    judged = [path for path in (config.model_name_or_path, config.ref_model_name_or_path) if path]
    for path in judged:
        served = getattr(backend, "model", None)  # of a server: the name alone is known
        same = served in (path, Path(path).name) if served is not None else _same_weights(path, backend.name)
        if same:
            raise UserError(
                f"{scorer.name} would judge its own answers, which models prefer: give another judge, or "
                "--allow_self_judge true"
            )


def _same_weights(path: str, other: str) -> bool:
    if Path(path).resolve() == Path(other).resolve():
        return True
    weights = [sorted(sha256_of(file) for file in Path(folder).glob("*.safetensors")) for folder in (path, other)]
    return bool(weights[0]) and weights[0] == weights[1]
