"""Tables of README and docs, made of the results: `prefuse bench figures` writes them between markers in the pages.

A page says `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->`; between them stands what `BLOCKS[NAME]` returns.
"""

from __future__ import annotations

from collections.abc import Callable

from prefuse.bench.record import Record, markdown
from prefuse.bench.show import number

Row = dict


class Results:
    """Records, found by what they measured."""

    def __init__(self, records: list[Record]) -> None:
        self.records = sorted(records, key=lambda record: record.environment["time"])

    def newest(self, verb: str, **settings: object) -> Record:
        """The last one of a verb whose settings have these values."""
        for record in reversed(self.records):
            if record.verb == verb and settings.items() <= record.settings.items():
                return record
        raise KeyError(f"no result of `prefuse bench {verb}` with {settings}: run it, or remove its table")


def row(record: Record, **keys: object) -> Row:
    """The one row that has these keys."""
    (found,) = (x for x in record.rows if keys.items() <= x.items())
    return found


def link(record: Record, text: str = "numbers", up: str = "../") -> str:
    return f"[{text}]({up}bench/results/{record.path.name})"


def where(record: Record) -> str:
    """`one thread of an AMD EPYC, torch 2.13.0`"""
    device, torch = record.device, record.environment["packages"]["torch"].split("+")[0]
    threads = {1: "one thread", 2: "two threads"}.get(device["threads"], f"{device['threads']} threads")
    return (
        f"{threads} of an {device['name']}, torch {torch}"
        if device["kind"] == "cpu"
        else f"{device['name']}, torch {torch}"
    )


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
    return [what, found, _by(record, "head")]


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
    record = results.newest("real", train="lora")
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


# ------------------------------------------------------------------------------------------ docs


def accuracy(results: Results) -> str:
    record = results.newest("accuracy")
    lengths = sorted({x["tokens_of_sequence"] for x in record.rows})
    names = dict.fromkeys(x["implementation"] for x in record.rows)
    cells = [
        [name, *(_mean_and_worst(row(record, implementation=name, tokens_of_sequence=n)) for n in lengths)]
        for name in names
    ]
    return markdown(["mean (worst) |error| in nats", "token", *(f"{n} tokens" for n in lengths[1:])], cells)


def _mean_and_worst(x: Row) -> str:
    return f"{x['error_nats']:.1e} ({x['error_nats_max']:.1e})"


DOORS = {
    "TRL": "TRL",
    "TRL, prefuse.trl.enable()": "`enable()`",
    "TRL, prefuse.trl.enable(workspace=1 << 30)": "`enable(workspace=1 << 30)`",
    "prefuse.trl.DPOTrainer": "[`prefuse.trl.DPOTrainer`](trl_trainers.md)",
}


def trl_step(results: Results) -> str:
    record = results.newest("seam")
    cells = [
        [f"{x['trained']}: {DOORS[x['implementation']]}", f"{x['seconds_per_step']:.2f}", f"{x['ratio_to_trl']:.2f}",
         f"{x['peak_mib']:.0f}"]
        for x in record.rows
    ]  # fmt: skip
    return markdown(["trained: head", "s per step", "speed / TRL's", "peak MiB"], cells)


def trl_trainers(results: Results) -> str:
    record = results.newest("seam")
    cells = []
    for trained in ("all weights", "LoRA"):
        both = [row(record, trained=trained, implementation=x) for x in ("TRL", "prefuse.trl.DPOTrainer")]
        cells.append(
            [trained, *(f"{x['seconds_per_step']:.2f}" for x in both), *(f"{x['peak_mib']:.0f}" for x in both)]
        )
    return markdown(["trained", "TRL: s per step", "here", "TRL: peak MiB", "here"], cells)


def trl_real(results: Results) -> str:
    record = results.newest("real", train="lora")
    tolerance = f"`prefuse train --gradient_tolerance {record.settings['tolerance']}`"
    names = {
        "TRL": f"TRL {record.environment['packages']['trl']}",
        "prefuse.trl.DPOTrainer": "`prefuse.trl.DPOTrainer`",
        "engine": "`prefuse train`",
        "engine, tolerance": tolerance,
    }
    measured = {x["implementation"]: x for x in record.rows}
    cells = [
        [text, f"{x['seconds_per_step']:.1f}", f"{x['ratio_to_trl']:.2f}", f"{x['peak_mib']:.0f}"]
        for name, text in names.items()
        if (x := measured.get(name))
    ]
    return markdown([f"{record.settings['model']}, LoRA", "CPU s per step", "times TRL", "peak MiB"], cells)


def model_step(results: Results) -> str:
    record = results.newest("model")
    cells = [[x["implementation"], f"{x['seconds']:.2f}", f"{x['peak_mib']:.0f}"] for x in record.rows]
    return markdown(["forward and backward", "s", "peak MiB"], cells)


def liger_losses(results: Results) -> str:
    record = results.newest("losses")
    names = ("prefuse", "lean", "Liger")
    cells = []
    for loss in dict.fromkeys(x["loss_type"] for x in record.rows):
        found = [row(record, loss_type=loss, implementation=name) for name in names]
        seconds = [f"{x['cpu_seconds']:.2f}" for x in found]
        cells.append([loss, *seconds, f"{found[0]['ratio_to_liger']:.2f}",
                      *(f"{x['peak_mib_beyond_gradients']:.0f}" for x in found)])  # fmt: skip
    header = ["loss", *(f"{x}, s" for x in names), "Liger / prefuse", *(f"{x}, MiB" for x in names)]
    return markdown(header, cells)


def whole(verb: str) -> Callable[[Results], str]:
    """Every row of the newest record of a verb, as it is, with what was absent."""

    def block(results: Results) -> str:
        from prefuse.bench.show import absent, columns

        record = results.newest(verb)
        names = [name for name in columns(record) if name not in ("ms_low", "ms_high")]
        cells = [[number(x.get(name)) for name in names] for x in record.rows]
        said = [f"{where(record)[0].upper()}{where(record)[1:]}, {link(record)}.", *record.notes]
        return "\n".join([" ".join(said), "", markdown(names, cells), *(f"\n{line}" for line in absent(record))])

    return block


BLOCKS: dict[str, Callable[[Results], str]] = {
    "measured": measured,
    "accuracy": accuracy,
    "trl step": trl_step,
    "trl trainers": trl_trainers,
    "trl real": trl_real,
    "model step": model_step,
    "liger losses": liger_losses,
    **{verb: whole(verb) for verb in ("head", "memory", "scale", "data", "evaluation", "online", "packing", "reward")},
}
