"""`prefuse eval --checkpoints RUN`: the signs of trouble over a run, checkpoint by checkpoint.

    prefuse eval --checkpoints run --eval_dataset prompts.jsonl --scorer reward --gold_scorer rules.py:truth \
        --temperature 1 --text_dataset plain.txt

Each checkpoint answers the same prompts with the same seed. Of its answers: the scorer's reward and, with a
gold_scorer, one that is trusted more; the exact KL to the reference, summed over the tokens of an answer; length,
diversity, refusals; and how well it still predicts plain text. Step 0 is the reference itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.config.yaml_file import read_settings
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.data.examples import Prompt
from prefuse.engine.data.plain import plain_blocks
from prefuse.engine.data.table import Demonstration
from prefuse.engine.errors import UserError
from prefuse.engine.model.divergence import kl_of_states, over_common_vocabulary
from prefuse.engine.model.forward import LanguageModel, completion_logps, completion_states
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.load import device_of, load_model, load_tokenizer, without_padding
from prefuse.engine.model.sampling import Answer, sample_for
from prefuse.engine.report.log import print_table, say
from prefuse.engine.report.over_optimization import draw_over_optimization, turning_point
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.run.held_out import evaluation_batches
from prefuse.engine.run.proof import checkpoints
from prefuse.engine.score.contract import Scorer, say_reasons
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.signs import signs_of
from prefuse.engine.score.winrate import lengths

SHOWN = ("step", "score", "gold_score", "sqrt_kl", "length", "distinct_2", "self_similarity", "refusals", "perplexity")


def watch(config: Config) -> list[dict[str, float]]:
    """Prints a table, draws over_optimization.png, writes all to output_file; {name: value} of each checkpoint."""
    folder = Path(config.checkpoints)
    config, stations = stations_of(folder, config)
    device = device_of(config)
    scorer = scorer_of(config.scorer, config, device)
    gold = scorer_of(config.gold_scorer, config, device) if config.gold_scorer else None
    for one in (scorer, gold):
        if hasattr(one, "compare"):
            raise UserError(f"{one.name} compares: with --checkpoints give a scorer that scores one answer alone")
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    needed = [*dict.fromkeys([*scorer.columns, *(gold.columns if gold else ()), *(config.scorer_columns or ())])]
    prompts = read_prompts(config, tokenizer, needed)
    columns = columns_of_rows(config, prompts, needed)
    blocks = None if config.text_dataset is None else plain_blocks(config.text_dataset, tokenizer, config.max_length)
    if config.temperature != 1:
        say(f"kl is that along answers at temperature {config.temperature:g}; at 1 it is the policy's own")
    ref = load_model(config.ref_model_name_or_path, config, device)
    points = []
    for step, path in stations:
        lm = ref if step == 0 else load_model(str(path), config, device)
        points.append({"step": step} | look(lm, ref, tokenizer, prompts, columns, scorer, gold, blocks, config))
        say("  ".join(f"{name} {points[-1][name]:.4g}" for name in SHOWN if name in points[-1]))
    conclude(points, folder, config)
    return points


def stations_of(folder: Path, config: Config) -> tuple[Config, list[tuple[int, Path]]]:
    """(step, folder) of the reference, of each checkpoint and of the final model, in order."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: expected the folder that `prefuse train --output_dir` wrote")
    run = read_settings(folder / "config.yaml")
    base = config.ref_model_name_or_path or run.get("ref_model_name_or_path") or run["model_name_or_path"]
    found: list[tuple[int, Path]] = sorted(checkpoints(folder))
    if not found:
        raise UserError(f"{folder} has no checkpoint: train with save_steps, and save_total_limit 0 to keep them all")
    config = dataclasses.replace(config, ref_model_name_or_path=base, model_name_or_path=str(found[-1][1]))
    return config, [(0, Path(base)), *found]


def look(
    lm: LanguageModel, ref: LanguageModel, tokenizer, prompts: Sequence[Prompt], columns: dict[str, list],
    scorer: Scorer, gold: Scorer | None, blocks: list[Demonstration] | None, config: Config,
) -> dict[str, float]:  # fmt: skip
    """All numbers of one checkpoint."""
    size = config.num_generations
    check_prompts(lm, [prompt.ids for prompt in prompts], [prompt.row for prompt in prompts], config.max_new_tokens)
    ids = [prompt.ids for prompt in prompts for _ in range(size)]
    said = sample_for(config, lm, tokenizer, ids)
    answers = [[a.text for a in said[i : i + size]] for i in range(0, len(said), size)]
    raw = [prompt.raw for prompt in prompts]
    metrics = {}
    for name, one in ("score", scorer), ("gold_score", gold):
        if one is not None:
            scores = one.score(raw, answers, columns)
            rows = [prompt.row for prompt, reasons in zip(prompts, scores.reasons, strict=True) for _ in reasons]
            say_reasons(one.name, [reason for reasons in scores.reasons for reason in reasons], rows)
            metrics[name] = float(scores.values.nanmean())
    metrics |= divergence(lm, ref, ids, said, config)
    metrics |= {"length": lengths(answers), "cut_answers": sum(not a.stopped for a in said) / len(said)}
    metrics |= signs_of(answers)
    if blocks is not None:
        metrics["perplexity"] = perplexity(lm, blocks, config)
    return metrics


@torch.no_grad()
def divergence(
    lm: LanguageModel, ref: LanguageModel, prompts: list[list[int]], answers: list[Answer], config: Config
) -> dict[str, float]:
    """KL(policy || reference) of whole answers: at each token the exact KL over the vocabulary, summed over the answer
    and averaged over answers. Its expectation is the KL of the two distributions over answers."""
    if lm is ref:
        return {"kl": 0.0, "kl_per_token": 0.0, "sqrt_kl": 0.0}
    lm, ref = over_common_vocabulary(lm, ref, config)
    rows = [Demonstration(ids, a.ids, f"answer {i}") for i, (ids, a) in enumerate(zip(prompts, answers, strict=True))]
    examples = without_padding(examples_of(rows), (lm, ref), config)
    total = torch.zeros(2, dtype=torch.float64)
    for indices in evaluation_batches(examples, config):
        batch = collate(examples, indices).to(lm.device)
        hidden, ref_hidden = completion_states(lm, batch), completion_states(ref, batch)
        everywhere = torch.ones(len(hidden), dtype=torch.bool, device=lm.device)
        total += kl_of_states(lm, hidden, ref, ref_hidden, everywhere).cpu()
    kl = max(0.0, float(total[0])) / len(answers)
    return {"kl": kl, "kl_per_token": float(total[0] / total[1]), "sqrt_kl": math.sqrt(kl)}


@torch.no_grad()
def perplexity(lm: LanguageModel, blocks: list[Demonstration], config: Config) -> float:
    """exp of the mean of -log p over the tokens of plain text."""
    examples = without_padding(examples_of(blocks), (lm,), config)
    total, count = 0.0, 0
    for indices in evaluation_batches(examples, config):
        logps = completion_logps(lm, collate(examples, indices).to(lm.device))
        total, count = total - float(logps.double().sum()), count + len(logps)
    return math.exp(min(total / count, 700.0))


def conclude(points: list[dict[str, float]], folder: Path, config: Config) -> None:
    """The table, the picture, the file, and which checkpoint is best."""
    trusted = "gold_score" if config.gold_scorer else "score"
    turn = turning_point([point["sqrt_kl"] for point in points], [point[trusted] for point in points])
    image = folder / "over_optimization.png"
    if config.output_file is not None:
        image = Path(config.output_file).with_suffix(".png")
        about = None if turn is None else dataclasses.asdict(turn) | {"best_step": points[turn.best]["step"]}
        write_whole(Path(config.output_file), json_text({"checkpoints": points, "turn": about}, indent=1) + "\n")
    draw_over_optimization(image, points, turn)
    names = [name for name in SHOWN if name in points[0]]
    print_table(str(folder), names, [[f"{point[name]:.4g}" for name in names] for point in points], lines=False)
    say(f"the curve over sqrt(KL) is in {image}")
    if turn is None:
        say("fewer than three points: no turning point is looked for")
        return
    best = points[turn.best]
    say(f"best by {trusted}: step {best['step']} ({best[trusted]:.4g}, sqrt(KL) {best['sqrt_kl']:.3g})")
    if turn.turns_at is None:
        say(f"{trusted} has not turned within what was seen")
    else:
        say(
            f"{trusted} turns at sqrt(KL) {turn.turns_at:.3g} (fit of d (alpha - beta d): alpha {turn.alpha:.3g}, beta "
            f"{turn.beta:.3g}): what lies behind it is over-optimized"
        )
