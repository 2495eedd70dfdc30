"""What each verb found, as flat rows: `KEYS` say what a row measures, `MEASURES` what its numbers mean.

A verb keeps its numbers in whatever form suits it (every round's seconds, losses by step); tables, figures and
`prefuse bench compare` read these rows alone. One function a verb, from what it handed to `record.write_result`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
MIB = 2**20
OF_THE_MACHINE = {"ms", "s", "CPU s", "s/step", "TFLOP/s", "GFLOP/s", "pairs/s"}  # units of times and speeds

# name: (unit, which is better). A ratio is of two times of one round, so it survives a busy machine.
MEASURES: dict[str, tuple[str, str]] = {
    "ms": ("ms", "lower"),
    "ms_low": ("ms", "neither"),
    "ms_high": ("ms", "neither"),
    "seconds": ("s", "lower"),
    "cpu_seconds": ("CPU s", "lower"),
    "first_call_s": ("s", "neither"),
    "seconds_per_step": ("s/step", "lower"),
    "tflops": ("TFLOP/s", "higher"),
    "gflops": ("GFLOP/s", "higher"),
    "pairs_per_second": ("pairs/s", "higher"),
    "ratio_to_gemms": ("times the bare GEMMs", "lower"),
    "gemm_share": ("of the bare GEMMs' speed", "higher"),
    "ratio_to_float32": ("times the float32 product's time", "lower"),
    "ratio_to_prefuse": ("times prefuse's time", "neither"),
    "ratio_to_trl": ("times TRL's speed", "higher"),
    "ratio_to_exact": ("times the exact head's speed", "higher"),
    "ratio_to_padded": ("times the padded speed", "higher"),
    "ratio_to_liger": ("times Liger's speed", "higher"),
    "ratio_to_generate": ("times generate's tokens per CPU second", "higher"),
    "ratio_to_map": ("times datasets.map's CPU seconds", "lower"),
    "ratio_to_separate": ("times that of separate rows", "lower"),
    "peak_mib": ("MiB", "lower"),
    "peak_mib_forward": ("MiB", "lower"),
    "peak_mib_beyond_gradients": ("MiB", "lower"),
    "page_faults": ("", "neither"),
    "tokens": ("tokens", "lower"),
    "passes": ("", "neither"),
    "units": ("NDV", "lower"),
    "error_nats": ("nats", "lower"),
    "error_nats_max": ("nats", "lower"),
    "log_ratio_error_nats": ("nats", "lower"),
    "largest_error_nats": ("nats", "lower"),
    "dhidden_error": ("relative", "lower"),
    "dweight_error": ("relative", "lower"),
    "gradient_error": ("relative", "lower"),
    "skipped_mass": ("share", "neither"),
    "kept_columns": ("share", "neither"),
    "largest_difference": ("", "lower"),
    "off_one": ("ratio - 1", "lower"),
    "tokens_off_one": ("share", "lower"),
    "loss": ("", "neither"),
    "first_loss": ("", "neither"),
    "last_loss": ("", "neither"),
    "held_out_loss": ("", "neither"),
    "held_out_accuracy": ("", "neither"),
    "held_out_margin": ("", "neither"),
    "away_from_exact": ("", "lower"),
    "deterministic": ("", "higher"),
    "batch_invariant": ("", "higher"),
    "exponent": ("log-log slope", "neither"),
    "residual": ("log", "neither"),
    "gradient_difference": ("relative", "lower"),
    "metrics_difference": ("", "lower"),
    "metrics_compared": ("", "neither"),
    "value": ("", "neither"),
    "away_from_one_process": ("relative to max(1, |value|)", "lower"),
    "right": ("", "higher"),
    "wrong": ("", "lower"),
    "error": ("", "neither"),
    "detail": ("", "neither"),
}


def accuracy(found: dict[str, Any]) -> list[Row]:
    """Errors in nats against float64: of a token's log-probability, and of a sequence's log-ratio by length."""
    rows = []
    for name, errors in found["paths"].items():
        rows.append(_error_row(name, "token logp", 1, errors["token_logp"]))
        rows += [
            _error_row(name, "sequence log-ratio", int(length), error)
            for length, error in errors["sequence_log_ratio"].items()
        ]
    return rows


def _error_row(name: str, what: str, length: int, error: dict[str, float]) -> Row:
    numbers = {"error_nats": error["mean"], "error_nats_max": error["max"]}
    return {"implementation": name, "what": what, "tokens_of_sequence": length, **numbers}


def given_rows(found: dict[str, Any]) -> list[Row]:
    """Verbs that measure in rows already."""
    return found["table"]


def cpuhead(found: dict[str, Any]) -> list[Row]:
    """Forward, and forward and backward, beside the head's own bare products."""
    rows = []
    for kind, variants in found["times"].items():
        own = variants["bare GEMMs, own tiles"]["time_over_prefuse"]
        for name, x in variants.items():
            row = {"pass": kind, "implementation": name, "shape": "x".join(str(found["settings"][k]) for k in "NDV")}
            ratios = {"ratio_to_gemms": x["time_over_prefuse"] / own, "ratio_to_prefuse": x["time_over_prefuse"]}
            rows.append({**row, "ms": 1e3 * x["seconds"], **ratios, "gflops": x["gflops"]})
    for x in found.get("peak_bytes_beyond_inputs", []):
        row = {"pass": "memory", "implementation": x["variant"], "shape": "x".join(map(str, x["shape"]))}
        beyond = x["forward+backward beyond gradients"]
        rows.append({**row, "peak_mib": x["forward+backward"] / MIB, "peak_mib_forward": x["forward"] / MIB,
                     "peak_mib_beyond_gradients": beyond / MIB})  # fmt: skip
    return rows


def losses(found: dict[str, Any]) -> list[Row]:
    rows, settings = [], found["settings"]
    gradients = 4 * settings["D"] * (2 * settings["pairs"] * settings["T"] + settings["V"])
    for loss, x in found["losses"].items():
        for name, seconds in x["seconds"].items():
            speed = statistics.median(a / b for a, b in zip(x["seconds"]["Liger"], seconds, strict=True))
            beyond = x["peak_bytes_beyond_inputs"][name] - gradients
            rows.append({"loss_type": loss, "implementation": name, "cpu_seconds": statistics.median(seconds),
                         "ratio_to_liger": speed, "peak_mib_beyond_gradients": beyond / MIB})  # fmt: skip
    return rows


def model(found: dict[str, Any]) -> list[Row]:
    return [
        {"implementation": name, "seconds": x["seconds"], "peak_mib": x["peak_bytes"] / MIB}
        for name, x in found["variants"].items()
    ]


def online(found: dict[str, Any]) -> list[Row]:
    rows = []
    for name, seconds in found["seconds"].items():
        speed = statistics.median(a / b for a, b in zip(found["seconds"]["TRL"], seconds, strict=True))
        off = found["first_ratio_off_by"][name]
        rows.append({"implementation": name, "cpu_seconds": statistics.median(seconds), "ratio_to_trl": speed,
                     "tokens": found["tokens"][name], "loss": found["first_loss"][name], "off_one": off["max"],
                     "tokens_off_one": off["share_not_1"]})  # fmt: skip
    return rows


def sampling(found: dict[str, Any]) -> list[Row]:
    return [
        {"implementation": name, "cpu_seconds": statistics.median(seconds),
         "tokens": statistics.median(found["tokens"][name]), "ratio_to_generate": found["generate_over"][name]}
        for name, seconds in found["seconds"].items()
    ]  # fmt: skip


def policy(found: dict[str, Any]) -> list[Row]:
    return [
        {"loss_type": name, "loss": x["ours"], "largest_difference": x["loss"], "gradient_difference": x["gradient"],
         "metrics_difference": x["metrics"], "metrics_compared": x["compared"]}
        for name, x in found["losses"].items()
    ]  # fmt: skip


def ranks(found: dict[str, Any]) -> list[Row]:
    """The last held-out metrics of each way to run, and the rates of its last step."""
    (_, first), *_ = found["held_out"].items()
    rows = [
        {"what": name, "implementation": way, "value": value,
         "away_from_one_process": abs(value - first[name]) / max(1.0, abs(first[name]))}
        for way, metrics in found["held_out"].items()
        for name, value in metrics.items()
    ]  # fmt: skip
    return rows + [
        {"what": f"{name}, last step", "implementation": way, "value": value}
        for way, rates in found["rates"].items()
        for name, value in rates.items()
    ]


def _outcome(word: str, why: str) -> Row:
    return {"right": word == "right", "wrong": word == "WRONG", **({"detail": why} if why else {})}


def templates(found: dict[str, Any]) -> list[Row]:
    return [
        {"package": package, "template": template, "row": kind, **_outcome(x["word"], x["why"])}
        for package, templates in found["packages"].items()
        for template, row in templates.items()
        for kind, x in row.items()
    ]


def architectures(found: dict[str, Any]) -> list[Row]:
    return [
        {"model_type": kind, "check": check, **_outcome(*(part.strip() for part in said.partition(":")[::2]))}
        for kind, result in found["types"].items()
        for check, said in result.items()
    ]


def judge(found: dict[str, Any]) -> list[Row]:
    return [{"what": name, "value": value} for name, value in found["metrics"].items()]


def packing(found: dict[str, Any]) -> list[Row]:
    slowest = found["variants"]["padded"]
    return [
        {"batches": name, "passes": x["passes"], "tokens": x["tokens"], "seconds": x["seconds"],
         "pairs_per_second": x["pairs_per_second"],
         "ratio_to_padded": 1.0 if x is slowest else found["speedup"]}
        for name, x in found["variants"].items()
    ]  # fmt: skip


def real(found: dict[str, Any]) -> list[Row]:
    """Steps of a real model: medians over the rounds."""
    settings, rows = found["settings"], []

    def middle(runs: list[dict], key: str) -> float:
        return statistics.median(x[key] for x in runs)

    base = found["variants"].get("TRL")
    for name, runs in found["variants"].items():
        seconds, steps = middle(runs, "seconds"), runs[0]["steps"]
        skipped = [step["head/skipped_mass"] for step in steps if "head/skipped_mass" in step]
        row = {"implementation": name, "seconds_per_step": seconds / settings["steps"],
               "pairs_per_second": settings["steps"] * settings["batch_size"] / seconds,
               "peak_mib": middle(runs, "peak_mib"), "last_loss": steps[-1]["loss"]}  # fmt: skip
        row |= {"ratio_to_trl": middle(base, "seconds") / seconds} if base else {}
        rows.append(row | ({"skipped_mass": max(skipped)} if skipped else {}))
    return rows


def reward(found: dict[str, Any]) -> list[Row]:
    rows = [
        {"what": "training", "implementation": name, "pairs_per_second": x["pairs_per_second"],
         "ratio_to_trl": found["trainers"]["TRL"]["prefuse_is_faster_by"] / x["prefuse_is_faster_by"],
         **{f"held_out_{key}": value for key, value in x["held_out"].items()}}
        for name, x in found["trainers"].items()
    ]  # fmt: skip
    scored = found["scoring"]
    rows.append({"what": f"scoring {scored['answers']} answers of one prompt", "implementation": "prefuse",
                 "tokens": scored["tokens"], "ratio_to_separate": scored["seconds"],
                 "largest_difference": scored["largest_difference"]})  # fmt: skip
    return rows


def sparse(found: dict[str, Any]) -> list[Row]:
    rows = [
        {"what": "error", "implementation": name, "dhidden_error": x["dhidden"], "dweight_error": x["dweight"],
         **({"skipped_mass": x["skipped_share"], "kept_columns": x["kept_columns"]} if "kept_columns" in x else {})}
        for name, x in found["errors"].items()
    ]  # fmt: skip
    for name, x in found["times"].items():
        what, _, implementation = name.partition(", ")
        rows.append({"what": what, "implementation": implementation,
                     "cpu_seconds": statistics.median(x["cpu_seconds"]),
                     "ratio_to_exact": x["times_as_fast_as_exact"],
                     **({"peak_mib": x["peak_bytes"] / MIB} if "peak_bytes" in x else {})})  # fmt: skip
    return rows


def tolerance(found: dict[str, Any]) -> list[Row]:
    return [
        {"implementation": name, "last_loss": x["steps"][-1]["loss"], "held_out_loss": x["held_out"]["eval_loss"],
         "held_out_accuracy": x["held_out"]["eval_rewards/accuracies"],
         "held_out_margin": x["held_out"]["eval_rewards/margins"], "away_from_exact": x["away_from_exact"]}
        for name, x in found["variants"].items()
    ]  # fmt: skip


def train(found: dict[str, Any]) -> list[Row]:
    rows = []
    for case, x in found["cases"].items():
        slowest = x["trainers"]["TRL"]["prefuse_is_faster_by"]
        rows += [
            {"rows": case, "implementation": name, "pairs_per_second": y["pairs_per_second"],
             "ratio_to_trl": slowest / y["prefuse_is_faster_by"], "held_out_loss": y["held_out"]["loss"],
             "held_out_accuracy": y["held_out"]["rewards/accuracies"],
             "held_out_margin": y["held_out"]["rewards/margins"]}
            for name, y in x["trainers"].items()
        ]  # fmt: skip
    return rows


def seam(found: dict[str, Any]) -> list[Row]:
    return [
        {"trained": x["trained"], "implementation": x["variant"], "seconds_per_step": x["seconds"],
         "ratio_to_trl": x["speed"], "peak_mib": x["peak_bytes"] / MIB, "first_loss": x["first_loss"],
         "last_loss": x["last_loss"]}
        for x in found["rows"]
    ]  # fmt: skip


def evaluation(found: dict[str, Any]) -> list[Row]:
    return [
        {"implementation": name, "cpu_seconds": min(seconds),
         "ratio_to_trl": min(found["seconds"]["trl"]) / min(seconds),
         **({"peak_mib": found["peak_bytes"][name] / MIB} if found["peak_bytes"] else {})}
        for name, seconds in found["seconds"].items()
    ]  # fmt: skip


def data(found: dict[str, Any]) -> list[Row]:
    rows, base = [], found["runs"]["datasets.map"]
    for name, runs in found["runs"].items():
        ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(runs, base, strict=True)]
        numbers = {key: statistics.median(run[key] for run in runs) for key in ("cpu_seconds", "seconds", "peak_mib")}
        rows.append({"implementation": name, **numbers, "ratio_to_map": statistics.median(ratios)})
    return rows


def _finite(value: float | None) -> float | None:
    """A NaN that was measured is no number in JSON; its check has failed already."""
    return value if value is None or math.isfinite(value) else None


def gpu(found: dict[str, Any]) -> list[Row]:
    """Timings, checks and the tail of the GPU suite."""
    named = ("model", "mode", "variant", "N", "D", "V", "ms_low", "ms_high", "error")
    rows = []
    for x in found["timings"]:
        row = {"section": "times", "model": x["model"], "mode": x["mode"], "implementation": x["variant"],
               "shape": f"{x['N']}x{x['D']}x{x['V']}"}  # fmt: skip
        numbers = {name: _finite(value) for name, value in x.items() if name in MEASURES and name not in named}
        rows.append(row | numbers | ({"error": x["error"]} if "error" in x else {}))
    for x in found["tail"]:
        row = {"section": "tail", "model": x["loss"], "mode": f"{x['sequences']} x {x['tokens']}",
               "implementation": x["impl"], "shape": ""}  # fmt: skip
        rows.append(row | ({"error": x["error"]} if "error" in x else {"ms": x["ms"]}))
    for number, x in enumerate(found["checks"]):
        row = {"section": "checks", "model": x["check"], "mode": x["outcome"], "implementation": "prefuse"}
        rows.append({**row, "shape": str(number), **({"detail": x["detail"]} if "detail" in x else {})})
    return rows


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "accuracy": accuracy, "architectures": architectures, "cpuhead": cpuhead, "data": data, "evaluation": evaluation,
    "gpu": gpu, "head": given_rows, "judge": judge, "losses": losses, "memory": given_rows, "model": model,
    "online": online, "packing": packing, "policy": policy, "products": given_rows, "ranks": ranks, "real": real,
    "reward": reward, "sampling": sampling, "scale": given_rows, "seam": seam, "sparse": sparse, "templates": templates,
    "tolerance": tolerance, "train": train,
}  # fmt: skip
KEYS: dict[str, tuple[str, ...]] = {
    "accuracy": ("implementation", "what", "tokens_of_sequence"),
    "architectures": ("model_type", "check"),
    "cpuhead": ("pass", "implementation", "shape"),
    "data": ("implementation",),
    "evaluation": ("implementation",),
    "gpu": ("section", "model", "mode", "implementation", "shape"),
    "head": ("shape", "dtype", "mode", "loss_type", "implementation"),
    "judge": ("what",),
    "losses": ("loss_type", "implementation"),
    "memory": ("shape", "dtype", "mode", "implementation"),
    "model": ("implementation",),
    "online": ("implementation",),
    "packing": ("batches",),
    "policy": ("loss_type",),
    "products": ("implementation",),
    "ranks": ("what", "implementation"),
    "real": ("implementation",),
    "reward": ("what", "implementation"),
    "sampling": ("implementation",),
    "scale": ("what", "implementation", "size"),
    "seam": ("trained", "implementation"),
    "sparse": ("what", "implementation"),
    "templates": ("package", "template", "row"),
    "tolerance": ("implementation",),
    "train": ("rows", "implementation"),
}
