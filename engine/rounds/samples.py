"""What a round has sampled, and how good it is: kept on the disk before the first update that learns from it.

    samples/round-00012.jsonl           a line for each prompt: its row, the answers, their token ids and scores
    samples/round-00012.safetensors     log-probabilities of the policy that sampled, where later steps need them

A resumed run that stands within a round goes on with its file; one that stands before it samples again from the same
weights and the same seed. Of several ranks each keeps its own part: round-00012.1-of-4.jsonl.

P prompts with K answers each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.run.files import aside_of, json_text, write_whole
from prefuse.engine.run.ranks import Ranks

FOLDER = "samples"


@dataclass(frozen=True)
class Round:
    """The answers to some prompts, sampled by the policy as it was at `step`."""

    number: int
    step: int  # optimizer steps done before it
    seed: int
    prompts: list[int]  # (P,) indices of the prompts
    rows: list[str]  # (P,) their names
    ids: list[list[list[int]]]  # (P, K) token ids, the token that ended each included
    texts: list[list[str]]  # (P, K)
    stopped: list[list[bool]]  # (P, K) False: cut off
    round_trip: list[list[bool]]  # (P, K) False: the ids are not those that a server sampled
    scores: Tensor  # (P, K) float64, NaN: no score
    parts: dict[str, Tensor] = field(default_factory=dict)  # {name: (P, K)} of several scorers, each by itself
    weights: int = 0  # optimizer steps that the weights had that sampled; a server may lag behind
    old_logps: Tensor | None = None  # (N,) of all answers end to end, at the sampling temperature
    ref_logps: Tensor | None = None  # (N,)
    sampler_logps: Tensor | None = None  # (N,) as a server gave them, NaN where it did not
    old_values: Tensor | None = None  # (N,) ppo
    example_ref_logps: Tensor | None = None  # iterative_dpo: of the pairs made of it, by the policy that sampled

    @property
    def answers(self) -> list[tuple[int, int]]:  # (P * K,) place of each, end to end
        return [(p, k) for p, own in enumerate(self.ids) for k in range(len(own))]

    @property
    def lengths(self) -> list[int]:  # (P * K,)
        return [len(ids) for own in self.ids for ids in own]

    def tokens_of(self, x: Tensor) -> list[Tensor]:  # (N,) -> a tensor for each answer
        return list(x.split(self.lengths))


TENSORS = ("old_logps", "ref_logps", "sampler_logps", "old_values", "example_ref_logps")


def path_of(folder: Path, number: int, ranks: Ranks) -> Path:
    part = f".{ranks.rank + 1}-of-{ranks.size}" if ranks.size > 1 else ""
    return folder / FOLDER / f"round-{number:05}{part}.jsonl"


def save_round(folder: Path, made: Round, ranks: Ranks) -> None:
    """The tensors first: a round that has its text file is whole."""
    from safetensors.torch import save_file

    path = path_of(folder, made.number, ranks)
    path.parent.mkdir(exist_ok=True)
    tensors = {name: x.contiguous() for name in TENSORS if (x := getattr(made, name)) is not None}
    if tensors:
        final = path.with_suffix(".safetensors")
        aside = aside_of(final)
        save_file(tensors, aside)
        aside.replace(final)
    head = {"round": made.number, "step": made.step, "weights": made.weights, "seed": made.seed}
    head |= {"tensors": sorted(tensors)}
    lines = [head] + [
        {
            "row": made.rows[p], "prompt": made.prompts[p], "answers": made.texts[p], "stopped": made.stopped[p],
            "round_trip": made.round_trip[p], "scores": [None if x != x else x for x in made.scores[p].tolist()],
            "parts": {name: [None if x != x else x for x in part[p].tolist()] for name, part in made.parts.items()},
            "ids": made.ids[p],
        }
        for p in range(len(made.prompts))
    ]  # fmt: skip
    text = "".join(json_text(line) + "\n" for line in lines)
    write_whole(path, text.encode("utf-8", errors="backslashreplace").decode())


def load_round(folder: Path, number: int, step: int, seed: int, prompts: Sequence[int], ranks: Ranks) -> Round | None:
    """The round as it was sampled; None where there is none, or another one: other prompts, another seed."""
    from safetensors.torch import load_file

    path = path_of(folder, number, ranks)
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tensors = load_file(path.with_suffix(".safetensors")) if head["tensors"] else {}
        if (head["step"], head["seed"], [row["prompt"] for row in rows]) != (step, seed, list(prompts)):
            return None
        scores = numbers_of([row["scores"] for row in rows])
        parts = {name: numbers_of([row["parts"][name] for row in rows]) for name in rows[0]["parts"]}
        made = Round(
            number, step, seed, list(prompts), [row["row"] for row in rows], [row["ids"] for row in rows],
            [row["answers"] for row in rows], [row["stopped"] for row in rows], [row["round_trip"] for row in rows],
            scores, parts, head["weights"],
        )  # fmt: skip
        return replace(made, **{name: tensors[name] for name in head["tensors"]})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def numbers_of(rows: list[list[float | None]]) -> Tensor:  # (P, K)
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in rows], dtype=torch.float64)


def forget_tensors(folder: Path, before: int) -> None:
    """Of rounds that no checkpoint stands in: their log-probabilities are of no use any more."""
    for path in (folder / FOLDER).glob("round-*.safetensors"):
        if int(path.name.split("-")[1].split(".")[0]) < before:
            path.unlink(missing_ok=True)
