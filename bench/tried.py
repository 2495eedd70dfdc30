"""Tables of what was tried one by one: docs/chat_templates.md and docs/architectures.md, made of their records."""

from __future__ import annotations

from collections import Counter

from prefuse.bench.found import Results, link
from prefuse.bench.record import Record

# ------------------------------------------------------------------------------------------ templates


def templates(results: Results) -> str:
    """Every template's outcome for each kind of row; reasons stand once, below, by number."""
    record = results.newest("templates")
    outcomes = [
        x for package in record.details["packages"].values() for kinds in package.values() for x in kinds.values()
    ]
    words = Counter(x["word"] for x in outcomes)
    reasons = Counter(x["why"] for x in outcomes if x["why"])
    numbers = {why: number for number, (why, _) in enumerate(reasons.most_common(), 1)}
    said = (
        f"Made with transformers {record.environment['packages']['transformers']}: {len(outcomes)} rows, of which "
        f"{words['right']} are read right, {words['refused']} refused and {words['WRONG']} read wrong ({link(record)})."
    )
    lines = ["", said, ""]
    for package, found in record.details["packages"].items():
        lines += [f"## {package} {record.settings['packages'][package]}: {len(found)} templates", ""]
        lines += [*_outcome_table(found, numbers), ""]
    lines += ["What the numbers say, and of how many rows:", ""]
    return "\n".join([*lines, *(f"{number}. {why} ({reasons[why]})" for why, number in numbers.items()), ""])


def _outcome_table(found: dict[str, dict[str, dict[str, str]]], numbers: dict[str, int]) -> list[str]:
    kinds = next(iter(found.values()))
    lines = [f"| template | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for template, row in found.items():
        cells = [x["word"] + (f" {numbers[x['why']]}" if x["why"] else "") for x in row.values()]
        lines.append(f"| {template} | {' | '.join(cells)} |")
    return lines


# ------------------------------------------------------------------------------------------ kinds of models


def verdict(result: dict[str, str]) -> str:
    """The worst outcome of a type's checks."""
    words = {text.split(":")[0] for text in result.values()}
    return next((word for word in ("WRONG", "refused", "no truth") if word in words), "right")


def line_of(result: dict[str, str]) -> str:
    """`right`, or what is not, each reason once with the checks it belongs to."""
    reasons: dict[str, list[str]] = {}
    for check, text in result.items():
        if text != "right":
            reasons.setdefault(text, []).append(check)
    return "; ".join(f"{', '.join(names)} {text}" for text, names in reasons.items()) or "right"


def architectures(results: Results) -> str:
    """Every type of model by check, with the reason where one is not right."""
    record = results.newest("architectures")
    types, checks = record.details["types"], record.details["checks"]
    count = Counter(map(verdict, types.values()))
    lines = [*_how_tried(record), "", *(f"* `{name}`: {about}" for name, about in checks.items()), ""]
    lines += [
        f"{count['right']} types are right in all, {count['refused']} are refused in part or whole, each by one line "
        f"that says why, {count['no truth']} could not be compared (their own forward does not run so), "
        f"{count['WRONG']} are wrong.",
        "",
        "| type | " + " | ".join(checks) + " | why |",
        "|---|" + "---|" * (len(checks) + 1),
    ]
    for kind, result in types.items():
        words = [result.get(name, next(iter(result.values()))).split(":")[0] for name in checks]
        marks = ["yes" if word == "right" else word for word in words]
        why = "" if verdict(result) == "right" else line_of(result).replace("|", "\\|")
        lines.append(f"| {kind} | {' | '.join(marks)} | {why} |")
    return "\n".join(lines)


def _how_tried(record: Record) -> list[str]:
    packages = record.environment["packages"]
    return [
        f"`prefuse bench architectures` tried them with transformers {packages['transformers']} and torch "
        f"{packages['torch']} ({link(record)}): every type of `AutoModelForCausalLM`, {len(record.details['types'])} "
        "of them, made tiny, with stirred weights, windows and chunks shorter than the sequences, in float64 on a CPU "
        "(`engine` and `lora` in float32).",
        *record.notes,
    ]
