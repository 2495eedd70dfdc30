"""Preferences from a judge, a rule or a reward model: answers that are given, or sampled, become rows to train on.

    prefuse label --dataset_name pairs.jsonl --scorer judge=folder --constitution c.yaml --output_file ai.jsonl
    prefuse label --model_name_or_path sft --num_generations 4 --dataset_name p.jsonl --scorer rm --output_file ai.jsonl

prompts -> answers -> comparisons, in both orders, each by a principle of the constitution -> rows with provenance.
How far the labels can be trusted is printed: bias for the answer shown first and for the longer one, and the agreement
with the labels that the rows have (Cohen's kappa), or with gold_scorer.

P prompts with K answers each.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.data.forms import ReadOptions, Record, Skipped, read_records
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import device_of, load_tokenizer
from prefuse.engine.report.log import print_table, say
from prefuse.engine.rounds.learn import pairs_of
from prefuse.engine.rounds.sampler import seed_of, texts_of
from prefuse.engine.rounds.served import source_of
from prefuse.engine.rounds.step_labels import label_steps
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.score.constitution import Constitution, drawn, read_constitution
from prefuse.engine.score.contract import Preferences, Scorer, Scores, Text, preferences_of, say_reasons
from prefuse.engine.score.itself import warn_of_self_judge
from prefuse.engine.score.rubric import Rubric
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.winrate import cohen_kappa


@dataclass(frozen=True)
class Candidates:
    rows: list[str]
    prompts: list[Text]
    answers: list[list[str]]  # (P, K)
    by: str  # who answered
    columns: dict[str, list]
    given: Tensor | None = None  # (P,) what the rows say of answers 0 and 1: 1 for the first, 0 for the second


@dataclass(frozen=True)
class Verdicts:
    """Every comparison of two answers to one prompt."""

    places: list[tuple[int, int, int]]  # (prompt, first, second)
    values: Tensor  # (C,) 1, 0.5 or 0 for the first; NaN: no verdict
    soft: Tensor  # (C,) its probability
    principles: list[str | None]
    first_shown: float | None  # share of a judge's verdicts for the answer it read first


def label(config: Config) -> dict[str, float]:
    """`prefuse label`: writes output_file, prints how far the labels can be trusted, returns these numbers."""
    device = device_of(config)
    scorer = scorer_of(config.scorer, config, device)
    gold = scorer_of(config.gold_scorer, config, device) if config.gold_scorer else None
    if config.label_form == "steps":
        return label_steps(config, scorer)
    constitution = None if config.constitution is None else read_constitution(config.constitution)
    if constitution is not None and not (hasattr(scorer, "compare") and constitution.principles):
        raise UserError("a constitution is read by a judge, and needs principles: give --scorer judge=..., or drop it")
    answered = sample_candidates(config, device, scorer, gold) if config.model_name_or_path else given_answers(config)
    verdicts = compare_candidates(scorer, answered, constitution, config.seed)
    rows = labelled_rows(answered, verdicts, scorer, config)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(Path(config.output_file), lines.encode("utf-8", errors="backslashreplace").decode())
    metrics = {"rows": float(len(rows)), **trust(answered, verdicts, gold)}
    write_whole(Path(config.output_file).with_suffix(".trust.json"), json_text(metrics, indent=1) + "\n")
    print_table(f"labels by {scorer.name}", ["", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()])
    say(f"wrote {len(rows)} rows to {config.output_file}")
    return metrics


# ---- answers -------------------------------------------------------------------------------------


def sample_candidates(config: Config, device: torch.device, scorer: Scorer, gold: Scorer | None) -> Candidates:
    """num_generations answers of the model to each prompt."""
    warn_of_self_judge(scorer, config.model_name_or_path)
    columns = list(dict.fromkeys([*scorer.columns, *(gold.columns if gold is not None else ())]))
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    prompts = read_prompts(config, tokenizer, columns)
    values = columns_of_rows(config, prompts, columns)
    source = source_of(config, tokenizer, device)
    source.check(prompts)
    seed = seed_of(config.seed, "label")
    texts = texts_of(source.answers(prompts, config.num_generations, seed, "sampling answers"))
    return Candidates([p.row for p in prompts], [p.raw for p in prompts], texts, config.model_name_or_path, values)


def given_answers(config: Config) -> Candidates:
    """The two answers of each row, in an order that the seed draws: which of them was chosen must not show."""
    reading = ReadOptions(**config.reading())
    records, _, _ = read_records(config.datasets or config.dataset_name, "pair", config.dataset_train_split, reading)
    rows: list[Record] = []
    skipped: list[Skipped] = []
    for record in records:
        (skipped if isinstance(record, Skipped) else rows).append(record)
    if skipped:
        say(f"{len(skipped)} rows are left out: {', '.join(f'{s.row} ({s.reason})' for s in skipped[:5])}")
    rows = rows[: config.num_prompts or None]
    if not rows:
        raise UserError("no row has two answers: give pairs, or --model_name_or_path to sample answers")
    turned = [bool(drawn(2, "order", config.seed, record.row)) for record in rows]
    sides = [[text_of(record.sides[side]) for side in ("chosen", "rejected")] for record in rows]
    answers = [own[::-1] if turn else own for own, turn in zip(sides, turned, strict=True)]
    given = torch.tensor([0.0 if turn else 1.0 for turn in turned], dtype=torch.float64)
    return Candidates([r.row for r in rows], [r.prompt for r in rows], answers, "the rows", {}, given)


def text_of(side: Text) -> str:
    return side if isinstance(side, str) else "\n\n".join(str(turn.get("content") or "") for turn in side)


# ---- comparisons ---------------------------------------------------------------------------------


def compare_candidates(scorer: Scorer, answered: Candidates, constitution: Constitution | None, seed: int) -> Verdicts:
    """Every two answers to each prompt; with a constitution, each comparison by the principle that is drawn for it."""
    places = [(p, i, j) for p, own in enumerate(answered.answers) for i, j in combinations(range(len(own)), 2)]
    principles = [
        None if constitution is None else constitution.principle_of(seed, answered.rows[p], i, j) for p, i, j in places
    ]
    values, soft = torch.full((2, len(places)), math.nan, dtype=torch.float64)
    outcomes, shown, decided = Counter(), 0.0, 0
    for principle in dict.fromkeys(principles):
        chosen = [c for c, own in enumerate(principles) if own == principle]
        prompts = [answered.prompts[places[c][0]] for c in chosen]
        first, second = ([answered.answers[places[c][0]][places[c][side]] for c in chosen] for side in (1, 2))
        columns = {name: [own[places[c][0]] for c in chosen] for name, own in answered.columns.items()}
        judge = scorer if principle is None else replace(scorer, rubric=Rubric(principle, scorer.rubric.mode))
        found = preferred(judge, prompts, first, second, columns)
        values[chosen], soft[chosen] = found.values, found.soft
        outcomes += found.outcomes
        if found.first_shown is not None:
            shown, decided = shown + found.first_shown * len(chosen), decided + len(chosen)
        say_reasons(scorer.name, found.reasons, [answered.rows[places[c][0]] for c in chosen])
    say(f"  outcomes: {', '.join(f'{name} {count}' for name, count in sorted(outcomes.items()))}")
    return Verdicts(places, values, soft, principles, shown / decided if decided else None)


def preferred(
    scorer: Scorer, prompts: list[Text], first: list[str], second: list[str], columns: dict[str, list]
) -> Preferences:  # fmt: skip
    """By the scorer's own comparison if it has one (a judge), else by the difference of its scores."""
    if hasattr(scorer, "compare"):
        return scorer.compare(prompts, first, second)
    both = scorer.score(prompts, list(zip(first, second, strict=True)), columns)
    sides = [Scores(both.values[:, k : k + 1], [row[k : k + 1] for row in both.reasons]) for k in (0, 1)]
    return preferences_of(*sides)


# ---- rows ----------------------------------------------------------------------------------------


def labelled_rows(answered: Candidates, verdicts: Verdicts, scorer: Scorer, config: Config) -> list[dict]:
    """In the columns that `prefuse train` reads. A pair's weight is |2 p - 1|, how far its verdict is from a tie."""
    soft = dict(zip(verdicts.places, verdicts.soft.tolist(), strict=True))
    principle = dict(zip(verdicts.places, verdicts.principles, strict=True))
    rows = []
    for p, answers in enumerate(answered.answers):
        shares = [share_of(p, k, len(answers), soft) for k in range(len(answers))]
        about = {"annotator_name": scorer.name, "annotator_key": scorer.key, "meta_answers_by": answered.by}
        about |= {"meta_row": answered.rows[p]}
        prompt = answered.prompts[p]
        if config.label_form == "pairs":
            for better, worse in pairs_of(shares, config.pairs, config.seed, answered.rows[p]):
                place = (p, min(better, worse), max(better, worse))
                sure = soft[place] if better < worse else 1 - soft[place]
                if not sure > 0.5:  # no verdict, a tie, or against the others
                    continue
                sides = {"chosen": spoken(prompt, answers[better]), "rejected": spoken(prompt, answers[worse])}
                numbers = {"weight": abs(2 * sure - 1), "annotator_probability": sure}
                rows.append({"prompt": prompt, **sides, **numbers, "annotator_principle": principle[place], **about})
            continue
        for k, share in enumerate(shares):
            if share != share or (config.label_form == "labelled" and share == 0.5):
                continue
            verdict = {"score": share}
            if config.label_form == "labelled":
                verdict = {"label": share > 0.5, "weight": abs(2 * share - 1)}
            rows.append({"prompt": prompt, "completion": spoken(prompt, answers[k]), **verdict, **about})
    return rows


def share_of(p: int, k: int, count: int, soft: dict[tuple[int, int, int], float]) -> float:
    """The mean probability that answer k is better than each of the others; NaN where no comparison has a verdict."""
    found = [soft[p, k, j] for j in range(k + 1, count)] + [1 - soft[p, i, k] for i in range(k)]
    found = [x for x in found if x == x]
    return sum(found) / len(found) if found else math.nan


def spoken(prompt: Text, answer: str) -> Text:
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


# ---- how far they can be trusted -----------------------------------------------------------------


def trust(answered: Candidates, verdicts: Verdicts, gold: Scorer | None) -> dict[str, float]:
    """Bias and agreement. 0.5 is no bias; kappa is 0 for chance and 1 for full agreement."""
    values = verdicts.values
    known = ~values.isnan()
    lengths = torch.tensor(
        [len(answered.answers[p][i]) - len(answered.answers[p][j]) for p, i, j in verdicts.places], dtype=torch.float64
    )
    decided = known & (values != 0.5) & (lengths != 0)
    longer = torch.where(lengths > 0, values, 1 - values)[decided]
    metrics = {
        "comparisons": float(len(values)),
        "without_verdict": float((~known).sum()),
        "ties": float((values == 0.5).sum()),
        "mean_weight": float((2 * verdicts.soft[known] - 1).abs().mean()) if known.any() else math.nan,
        "longer_wins": float(longer.mean()) if len(longer) else math.nan,
    }
    if verdicts.first_shown is not None:
        metrics["first_shown_wins"] = verdicts.first_shown
    if answered.given is not None:
        metrics |= agreement("given", values, answered.given)
    if gold is not None:
        prompts = [answered.prompts[p] for p, _, _ in verdicts.places]
        first, second = ([answered.answers[place[0]][place[side]] for place in verdicts.places] for side in (1, 2))
        columns = {name: [own[p] for p, _, _ in verdicts.places] for name, own in answered.columns.items()}
        metrics |= agreement("gold", values, preferred(gold, prompts, first, second, columns).values)
    return metrics


def agreement(name: str, values: Tensor, other: Sequence[float] | Tensor) -> dict[str, float]:
    other = torch.as_tensor(other, dtype=torch.float64)
    both = ~(values.isnan() | other.isnan())
    share = float((values[both] == other[both]).double().mean()) if both.any() else math.nan
    return {f"{name}_agreement": share, f"{name}_kappa": cohen_kappa(values, other)}
