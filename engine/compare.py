"""`prefuse eval --scorer`: whose answers are better, a model's or its reference's, and how sure that is.

    prefuse eval --model_name_or_path run --ref_model_name_or_path base --eval_dataset prompts.jsonl --scorer reward
    prefuse eval --model_answers a.json --ref_answers b.json --scorer judge=http://localhost:8000/v1#judge

prompts -> answers of both (sampled, or read from answer files) -> a scorer or judge -> win rate with ties and a
bootstrap interval, length-controlled win rate, position bias of a judge, agreement with a second one, best-of-n.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.errors import UserError
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, load_tokenizer
from prefuse.engine.model.sampling import sample_for
from prefuse.engine.report.log import print_table, say
from prefuse.engine.rounds.served import sampling_server
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.score import answers as files
from prefuse.engine.score.contract import Preferences, Scorer, Scores, Text, preferences_of, say_reasons
from prefuse.engine.score.history import record
from prefuse.engine.score.itself import is_judge_of, wrote_the_answers
from prefuse.engine.score.length_control import length_controlled
from prefuse.engine.score.rubric import shown
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.winrate import best_of_n, cohen_kappa, lengths, win_rate


@dataclass
class ModelAnswers:
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
    answered = read_answered(config) if config.model_answers else sample_models(config, device, list(needed))
    for one in (scorer, gold) if config.model_answers else ():
        refuse_self_judge(one, config, answered.names)
    metrics: dict[str, float] = {"prompts": len(answered.rows), "length": lengths(answered.answers)}
    metrics |= {} if answered.cut is None else {"cut_answers": answered.cut}
    verdict = verdict_of(answered, scorer)
    trusted = None if gold is None else verdict_of(answered, gold)
    if answered.baseline is not None:
        metrics["ref_length"] = lengths(answered.baseline)
        metrics |= won(answered, verdict, trusted, config)
    metrics |= scorer.spent() if hasattr(scorer, "spent") else {}
    curve = []
    if verdict.own is not None:
        more, curve = scored(verdict, trusted)
        metrics |= more
    if config.history is not None:
        drift = record(Path(config.history), answered.names[0], answered.prompts, answered.answers, metrics)
        since = drift.pop("since", None)
        changes = "  ".join(f"{name} {value:.4g}" for name, value in drift.items())
        say(f"since {since}: {changes}" if since else f"the first look at these prompts is in {config.history}")
    if config.answers_dir is not None:
        write_answers(answered, scorer, verdict.found, Path(config.answers_dir))
    if config.output_file is not None:  # before it is shown: a screen may be gone
        content = metrics | ({"best_of_n": curve} if curve else {})
        write_whole(Path(config.output_file), json_text(content, indent=1) + "\n")
    against = f" against {answered.names[1]}" if answered.baseline is not None else ""
    title = f"{answered.names[0]}{against}, {len(answered.rows)} prompts, by {scorer.name}"
    print_table(title, ["metric", "value"], [[name, f"{value:.6g}"] for name, value in metrics.items()])
    if curve:
        rows = [[f"{point[name]:.4g}" for name in ("n", "kl", "proxy", "gold")] for point in curve]
        print_table("best of n by the scorer", ["n", "KL at most, nats", "score", "gold score"], rows)
    return metrics


@dataclass
class Verdict:
    """What a scorer or judge says of all answers."""

    found: Preferences | None  # (P * N,) of each answer against the reference's of the same number
    own: Scores | None = None  # (P, N) of the model's answers; a judge has no scores
    ref: Scores | None = None


def verdict_of(answered: ModelAnswers, scorer: Scorer) -> Verdict:
    """Both sides of a prompt are scored at once. Says who got no score, and why."""
    size = len(answered.answers[0])
    if hasattr(scorer, "compare"):
        if answered.baseline is None:
            return Verdict(None)
        first, second = ([a for own in side for a in own] for side in (answered.answers, answered.baseline))
        found = scorer.compare([prompt for prompt in answered.prompts for _ in range(size)], list(first), list(second))
        say_reasons(scorer.name, found.reasons, [row for row in answered.rows for _ in range(size)])
        return Verdict(found)
    others = answered.baseline or [[] for _ in answered.answers]
    both = [own + other for own, other in zip(answered.answers, others, strict=True)]
    scores = scorer.score(answered.prompts, both, answered.columns)
    flat = [(row, reason) for row, reasons in zip(answered.rows, scores.reasons, strict=True) for reason in reasons]
    say_reasons(scorer.name, [reason for _, reason in flat], [row for row, _ in flat])
    own, ref = scores.parted(size)
    return Verdict(None, own) if answered.baseline is None else Verdict(preferences_of(own, ref), own, ref)


def won(answered: ModelAnswers, verdict: Verdict, trusted: Verdict | None, config: Config) -> dict[str, float]:
    """What the comparisons come to."""
    found, size = verdict.found, len(answered.answers[0])
    metrics = win_rate(found.values.view(-1, size), config.seed)
    first, second = ([len(a) for own in side for a in own] for side in (answered.answers, answered.baseline))
    metrics["length_controlled_win_rate"] = length_controlled(found.soft.tolist(), first, second)
    say(f"  outcomes: {', '.join(f'{name} {count}' for name, count in sorted(found.outcomes.items()))}")
    if found.first_shown is not None:
        metrics["first_shown_wins"] = found.first_shown
    if metrics["without_verdict"] and verdict.own is None:
        say("  the same command asks again only about what has no verdict")
    if trusted is not None:
        others = win_rate(trusted.found.values.view(-1, size), config.seed)
        metrics |= {f"gold_{name}": value for name, value in others.items()}
        metrics["cohen_kappa"] = cohen_kappa(found.values, trusted.found.values)
    return metrics


def scored(verdict: Verdict, trusted: Verdict | None) -> tuple[dict[str, float], list[dict]]:
    """Mean scores, and the curve of best-of-n where there are several answers."""
    metrics = {"score": _mean(verdict.own)} | ({} if verdict.ref is None else {"ref_score": _mean(verdict.ref)})
    gold = verdict.own if trusted is None or trusted.own is None else trusted.own
    if gold is not verdict.own:
        metrics["gold_score"] = _mean(gold)
    several = verdict.own.values.shape[1] > 1
    return metrics, best_of_n(verdict.own.values, gold.values) if several else []


def _mean(scores: Scores) -> float:
    return float(scores.values.nanmean()) if scores.values.numel() else math.nan


def sample_models(config: Config, device: torch.device, columns: list[str]) -> ModelAnswers:
    """The prompts of the data set, and what model and reference say to them."""
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = read_prompts(config, tokenizer, columns)
    size = config.num_generations
    said, cut = {}, None
    for path in (config.model_name_or_path, config.ref_model_name_or_path):
        if path is None:
            continue
        if path == config.model_name_or_path and config.server_type is not None:
            served = sampling_server(config, tokenizer).answers(prompts, size, config.seed, "sampling")
            answers = [answer for own in served for answer in own]
        else:
            lm = load_model(path, config, device)
            check_prompts(lm, [p.ids for p in prompts], [p.row for p in prompts], config.max_new_tokens)
            answers = sample_for(config, lm, tokenizer, [prompt.ids for prompt in prompts for _ in range(size)])
        if path == config.model_name_or_path:
            cut = sum(not answer.stopped for answer in answers) / len(answers)
        said[path] = [[a.text for a in answers[i : i + size]] for i in range(0, len(answers), size)]
    return ModelAnswers(
        [prompt.row for prompt in prompts],
        [prompt.raw for prompt in prompts],
        columns_of_rows(config, prompts, columns),
        (config.model_name_or_path, config.ref_model_name_or_path),
        said[config.model_name_or_path],
        said.get(config.ref_model_name_or_path),
        cut,
    )


def read_answered(config: Config) -> ModelAnswers:
    """What stands in two answer files."""
    first = files.read_answers(config.model_answers, config.questions)
    second = files.read_answers(config.ref_answers, config.questions)
    both = files.common(first, second)
    prompts, names = [first.prompts[own] for own in both], (first.model, second.model)
    answers, baseline = ([[one.answers[own]] for own in both] for one in (first, second))
    return ModelAnswers([own[:40] for own in both], prompts, {}, names, list(answers), list(baseline))


def write_answers(answered: ModelAnswers, scorer: Scorer, found: Preferences | None, folder: Path) -> None:
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


def refuse_self_judge(scorer: Scorer | None, config: Config, generators: Sequence[str] = ()) -> None:
    """A model that judges its own answers prefers them. `generators`: who wrote the answers of files."""
    if config.allow_self_judge:
        return
    judged = [path for path in (config.model_name_or_path, config.ref_model_name_or_path) if path]
    if any(is_judge_of(scorer, path) for path in judged) or any(wrote_the_answers(scorer, name) for name in generators):
        raise UserError(
            f"{scorer.name} would judge its own answers, which models prefer: give another judge, or "
            "--allow_self_judge true"
        )
