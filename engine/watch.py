"""`prefuse eval --checkpoints RUN`: the signs of trouble over a run, checkpoint by checkpoint.

    prefuse eval --checkpoints run --eval_dataset prompts.jsonl --scorer reward --gold_scorer rules.py:truth \
        --temperature 1 --text_dataset plain.txt

Each checkpoint answers the same prompts with the same seed. Of its answers: the scorer's reward and, with a
gold_scorer, one that is trusted more; the exact KL to the reference, summed over the tokens of an answer; length,
diversity, refusals; and how well it still predicts plain text. Step 0 is the reference itself.
"""

import dataclasses
from pathlib import Path

from prefuse.engine.config.settings import Config
from prefuse.engine.config.yaml_file import read_settings
from prefuse.engine.data.dataset import columns_of_rows, read_prompts
from prefuse.engine.data.plain import plain_blocks
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import device_of, load_model, load_tokenizer
from prefuse.engine.report.log import print_table, say
from prefuse.engine.report.over_optimization import draw_over_optimization, turning_point
from prefuse.engine.rounds.look import columns_needed, look, scorers_of
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.run.proof import checkpoints

SHOWN = ("step", "score", "gold_score", "sqrt_kl", "length", "distinct_2", "self_similarity", "refusals", "perplexity")


def watch(config: Config) -> list[dict[str, float]]:
    """Prints a table, draws over_optimization.png, writes all to output_file; {name: value} of each checkpoint."""
    folder = Path(config.checkpoints)
    config, stations = stations_of(folder, config)
    device = device_of(config)
    scorers = scorers_of(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    needed = columns_needed(scorers, config)
    prompts = read_prompts(config, tokenizer, needed)
    columns = columns_of_rows(config, prompts, needed)
    blocks = None if config.text_dataset is None else plain_blocks(config.text_dataset, tokenizer, config.max_length)
    if config.temperature != 1:
        say(f"kl is that along answers at temperature {config.temperature:g}; at 1 it is the policy's own")
    ref = load_model(config.ref_model_name_or_path, config, device)
    points = []
    for step, path in stations:
        lm = ref if step == 0 else load_model(str(path), config, device)
        points.append({"step": step} | look(lm, ref, tokenizer, prompts, columns, *scorers, blocks, config))
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
        how = f"fit of d (alpha - beta d): alpha {turn.alpha:.3g}, beta {turn.beta:.3g}"
        how = how if turn.by_fit else "where it was best; no d (alpha - beta d) fits"
        say(f"{trusted} turns at sqrt(KL) {turn.turns_at:.3g} ({how}): what lies behind it is over-optimized")
