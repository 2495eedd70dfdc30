"""Tables of README and docs, made of the results: `prefuse bench figures` writes them between markers in the pages.

A page says `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->`; between them stands what `BLOCKS[NAME]` returns.
"""

from __future__ import annotations

from collections.abc import Callable

from prefuse.bench import roofline, tables, tried
from prefuse.bench.found import Results, link, row, where
from prefuse.bench.record import Record

# ------------------------------------------------------------------------------------------ README


def measured(results: Results) -> str:
    """One line for each thing measured: what, found, by which command."""
    lines = [["what, and beside whom", "found", "by"]]
    for claim in (_accuracy, _head, _losses, _train, _real, _packing, _seam, _online, _reward):
        lines.append(claim(results))
    return "\n".join([f"| {' | '.join(lines[0])} |", "|---|---|---|", *(f"| {' | '.join(x)} |" for x in lines[1:])])


def _by(record: Record, command: str) -> str:
    return f"`prefuse bench {command}` ({link(record, up='')})"


def _accuracy(results: Results) -> list[str]:
    record = results.newest("accuracy")
    errors = {x["implementation"]: x["error_nats"] for x in record.rows if x["tokens_of_sequence"] == 1024}
    peers = [value for name, value in errors.items() if name != "prefuse"]
    times = min(peers) / errors["prefuse"]
    found = f"{errors['prefuse']:.0e} nats on average; the nearest peer {min(peers):.2g}, {times:.0f} times as much"
    return [f"Error of a 1024-token log-ratio, bf16 inputs, V = {record.settings['V']}", found, _by(record, "accuracy")]


def _head(results: Results) -> list[str]:
    record = results.newest("cpuhead", clock="wall", N=2048)
    settings = record.settings
    forward, both = (
        {x["implementation"]: x for x in record.rows if x["pass"] == kind} for kind in ("forward", "forward+backward")
    )
    keeping = both["prefuse, 3 units"]
    ours = [1 / x["prefuse"]["ratio_to_gemms"] for x in (forward, both)]
    trl = [x["TRL"]["ratio_to_prefuse"] for x in (forward, both)]
    what = f"The portable head, float32, N = {settings['N']}, D = {settings['D']}, V = {settings['V']}, {where(record)}"
    found = (
        f"forward at {ours[0]:.1%} of the speed of its own bare products and {trl[0]:.2f}x TRL's; forward and backward "
        f"{ours[1]:.1%} and {trl[1]:.2f}x; with a workspace {keeping['ratio_to_prefuse']:.2f} of that time"
    )
    return [what, found, _by(record, "cpuhead")]


def _losses(results: Results) -> list[str]:
    record = results.newest("losses")
    ours = [x["ratio_to_liger"] for x in record.rows if x["implementation"] == "prefuse"]
    names = ", ".join(dict.fromkeys(x["loss_type"] for x in record.rows))
    what = f"{names} under Liger's names beside Liger's own, eager, float32, half of each row prompt, {where(record)}"
    return [what, f"{min(ours):.1f}x to {max(ours):.1f}x its speed", _by(record, "losses")]


def _train(results: Results) -> list[str]:
    record = results.newest("train")
    trl = record.environment["packages"]["trl"]
    said = []
    for case in dict.fromkeys(x["rows"] for x in record.rows):
        ours, plain, before = (
            row(record, rows=case, implementation=name) for name in ("prefuse", "TRL", "TRL, reference before")
        )
        speeds = [ours["pairs_per_second"] / x["pairs_per_second"] for x in (plain, before)]
        name = "real rows" if case.endswith(".json") else case
        said.append(f"{name} {ours['ratio_to_trl']:.1f}x (reference computed before: {speeds[1]:.1f}x)")
    held = [
        abs(x["held_out_loss"] - row(record, rows=x["rows"], implementation="TRL")["held_out_loss"])
        for x in record.rows
    ]
    what = (
        f"Pairs per second of a whole DPO run beside TRL {trl}'s DPOTrainer: a small Llama, the same rows in the same "
        f"order, {where(record)}"
    )
    return [what, f"{'; '.join(said)}; held-out losses equal to {max(held):.0e}", _by(record, "train")]


def _real(results: Results) -> list[str]:
    record = results.newest("real", train="lora", model="SmolLM2-135M-Instruct")
    engine, trl, trainer = (row(record, implementation=x) for x in ("engine", "TRL", "prefuse.trl.DPOTrainer"))
    memory = engine["peak_mib"] / trl["peak_mib"]
    found = (
        f"{engine['ratio_to_trl']:.2f}x the pairs per second of TRL and {memory:.2f} of its peak memory by "
        f"`prefuse train`, {trainer['ratio_to_trl']:.2f}x by `prefuse.trl.DPOTrainer`"
    )
    name = record.settings["model"]
    what = f"{name} with LoRA, DPO steps on rows of a chat data set as long as they are, {where(record)}"
    return [what, found, _by(record, "train --model_name_or_path")]


def _packing(results: Results) -> list[str]:
    record = results.newest("packing")
    flat, padded = (row(record, batches=x) for x in ("flat", "padded"))
    fewer, ratio = padded["tokens"] / flat["tokens"], record.settings["ratio"]
    found = f"{flat['ratio_to_padded']:.2f}x the pairs per second; tokens that run: {fewer:.2f} times fewer"
    what = f"Flat batches with shared prompts against padded ones, prompts {ratio:g} times as long as answers"
    return [f"{what}, {where(record)}", found, _by(record, "packing")]


def _seam(results: Results) -> list[str]:
    record = results.newest("seam")
    said = []
    for trained in ("all weights", "LoRA"):
        trl, switch, trainer = (
            row(record, trained=trained, implementation=x)
            for x in ("TRL", "TRL, prefuse.trl.enable()", "prefuse.trl.DPOTrainer")
        )
        times = [x["seconds_per_step"] / trl["seconds_per_step"] for x in (switch, trainer)]
        said.append(
            f"{trained}: `prefuse.trl.enable()` {times[0]:.2f} of the time and {switch['peak_mib']:.0f} MiB instead of "
            f"{trl['peak_mib']:.0f}, `prefuse.trl.DPOTrainer` {times[1]:.2f} and {trainer['peak_mib']:.0f}"
        )
    settings = record.settings
    what = f"A DPO step of TRL's trainer, V = {settings['vocabulary']}, D = {settings['hidden']}, {where(record)}"
    return [what, "; ".join(said), _by(record, "seam")]


def _online(results: Results) -> list[str]:
    record = results.newest("online")
    ours = row(record, implementation="prefuse")
    theirs = row(record, implementation="TRL")
    off = [x["off_one"] for x in (ours, theirs)]
    found = f"{ours['ratio_to_trl']:.1f}x its speed; first ratios off by {off[0]:g}, TRL's by {off[1]:.0e}"
    return [
        f"A GRPO learning step beside TRL's GRPOTrainer on the same samples, {where(record)}",
        found,
        _by(record, "online"),
    ]


def _reward(results: Results) -> list[str]:
    record = results.newest("reward")
    ours, theirs = (row(record, what="training", implementation=x) for x in ("prefuse", "TRL"))
    scored = next(x for x in record.rows if "scoring" in x["what"])
    found = (
        f"{ours['ratio_to_trl']:.1f}x the pairs per second, held-out accuracy {ours['held_out_accuracy']:.3f} (TRL's "
        f"{theirs['held_out_accuracy']:.3f}); {scored['what']} takes {scored['ratio_to_separate']:.2f} of the time of "
        "separate rows"
    )
    return [f"A reward model beside TRL's RewardTrainer, prompts four times the answers, {where(record)}", found,
            _by(record, "reward")]  # fmt: skip


BLOCKS: dict[str, Callable[[Results], str]] = {
    "measured": measured,
    "accuracy": tables.accuracy,
    "trl step": tables.trl_step,
    "trl trainers": tables.trl_trainers,
    "trl real": tables.trl_real,
    "model step": tables.model_step,
    "liger losses": tables.liger_losses,
    "head steps": tables.head_steps,
    "memory peaks": tables.memory_peaks,
    "scale exponents": tables.scale_exponents,
    "roofline chips": roofline.chips_table,
    "roofline passes": roofline.passes_table,
    "roofline bounds": roofline.bounds_table,
    "cpu shares": tables.cpu_shares,
    "policy parity": tables.policy_parity,
    "ranks": tables.ranks,
    "real steps": tables.real_steps,
    "sparse heads": tables.sparse_heads,
    "sparse trained": tables.sparse_trained,
    "data": tables.every("data"),
    "judge": tables.judge,
    "templates": tried.templates,
    "architectures": tried.architectures,
    **{verb: tables.whole(verb) for verb in ("evaluation", "online", "packing", "products", "reward", "sampling")},
}
