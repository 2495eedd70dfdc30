"""What the GPU suite found, as a page."""

from __future__ import annotations

import itertools
from typing import Any

from prefuse.bench import peers
from prefuse.bench.gpu_inputs import MODELS
from prefuse.bench.record import markdown


def report(result: dict[str, Any]) -> str:
    env, lines = result["environment"], []
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items())
    lines += [f"# {env.get('gpu') or env.get('cpu')}", "", f"{env.get('time')}; {packages}", ""]
    if "gemm_8192_tflops" in env:
        lines += [
            f"8192^3 bf16 product {env['gemm_8192_tflops']:.0f} TFLOP/s, copy {env['copy_tb_per_s']:.2f} TB/s",
            "",
        ]
    outcomes = [row["outcome"] for row in result["checks"]]
    counts = ", ".join(f"{outcomes.count(x)} {x}" for x in ("passed", "FAILED", "skipped", "not reached"))
    lines += [f"Lost the device {result['lost_device']}.", ""] if "lost_device" in result else []
    lines += [f"Checks: {counts}. compute-sanitizer: {result['sanitizer']}.", ""]
    lines += [f"* {row['outcome']}: {row['check']}" for row in result["checks"] if row["outcome"] != "passed"]
    for row in result["sections"]:
        ended = f"{row['ended_s']:.0f} s" if "ended_s" in row else "not ended"
        lines += [f"* section {row['section']}: {row['began_s']:.0f} s to {ended} {row.get('error', '')}".rstrip()]
    for row in result["tiles"]:
        lines += [
            "",
            f"## Tiles of {row['kernel']}, {row['model']}",
            "",
            "```",
            row.get("error") or row["table"],
            "```",
        ]
    if result["tail"]:
        lines += [
            "",
            "## Behind the log-probabilities: loss, metrics and gradient",
            "",
            tail_table(result["tail"]),
        ]
    for model, mode in itertools.product(MODELS, peers.MODES):
        rows = [row for row in result["timings"] if (row["model"], row["mode"]) == (model.name, mode)]
        if rows:
            first = rows[0]
            title = f"## {model.name}, {mode} (N = {first['N']}, D = {first['D']}, V = {first['V']})"
            lines += ["", title, "", timing_table(rows)]
    return "\n".join(lines) + "\n"


def tail_table(rows: list[dict[str, Any]]) -> str:
    lines = [[row["loss"], f"{row['sequences']} x {row['tokens']}", row["impl"], ms_or_error(row)] for row in rows]
    return markdown(["loss", "sequences x tokens", "impl", "time"], lines)


def ms_or_error(row: dict[str, Any]) -> str:
    return row.get("error") or f"{row['ms']:.3f} ms ({row['ms_low']:.3f}-{row['ms_high']:.3f})"


def timing_table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    columns = {
        "ms": lambda r: r["error"] if "error" in r else f"{r['ms']:.2f} ({r['ms_low']:.2f}-{r['ms_high']:.2f})",
        "TFLOP/s": lambda r: cell(r, "tflops", ".0f"),
        "of bare GEMMs": lambda r: cell(r, "gemm_share", ".0%"),
        "peak MiB": lambda r: cell(r, "peak_mib", ".0f"),
        "error (nats)": lambda r: cell(r, "largest_error_nats", ".1e"),
    }
    return markdown(["variant", *columns], [[r["variant"], *(column(r) for column in columns.values())] for r in rows])
