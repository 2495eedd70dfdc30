"""What the trainers for TRL stand on, without TRL: rows -> flat batch, reference cache, mismatches, log window.

    collate = Collator(max_length=1024)
    inputs = collate([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    hidden = completion_hidden(model, inputs["batch"].tokens)       # (N, D), of `prefuse.models.flat`

E rows of a microbatch (pairs, or labelled completions), S sequences, N completion tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.packing import Group, Packed, Padded, pack, padded
from prefuse.preference import means_of
from prefuse.tokens import group_prompts, hash_tokens, share_prompts

# ---------------------------------------------------------------------------------------------------------
# Rows and their batches


@dataclass(frozen=True)
class TokenizedRow:
    """One row of a data set, tokenized and truncated."""

    prompt: list[int]
    completions: list[list[int]]  # chosen and rejected, or the one that has a label
    label: bool | None = None
    other: list[int] | None = None  # a completion of another row, where the data set says which

    @property
    def key(self) -> bytes:
        """The same for the same tokens, whatever data set they come from: what reference numbers are kept by."""
        digest = hashlib.blake2b(digest_size=16)
        hash_tokens(digest, (self.prompt, *self.completions))
        return digest.digest()

    @property
    def sides(self) -> list[bool]:
        """Of each completion, whether it is the preferred kind."""
        return [True, False][: len(self.completions)] if self.label is None else [self.label]

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each completion count: without a prompt nothing predicts the first one."""
        return [len(completion) - (not self.prompt) for completion in self.completions]


@dataclass(frozen=True)
class Microbatch:
    rows: list[TokenizedRow]  # (E,)
    tokens: Packed | Padded
    preferred: Tensor  # (N,) bool: tokens of chosen, or desirable, completions
    labels: Tensor | None  # (S,) bool, for labelled completions
    z0: Tensor | None = None  # () KTO's reference point, where the optimizer step has one

    def to(self, device: torch.device | str) -> Microbatch:
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, tokens=self.tokens.to(device), preferred=self.preferred.to(device), labels=labels)


@dataclass
class Collator:
    """Rows of a data set that TRL has tokenized -> one microbatch, a mapping as `transformers.Trainer` moves it about.

    Rows that share a prompt stand side by side, so that it runs once for all of them; else they keep their order.
    """

    max_length: int | None = None
    flat: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.batch([self._row(example) for example in examples])
        tokens = [sum(len(row.prompt) + len(side) for side in row.completions) for row in batch.rows]
        # (The count comes first: Trainer reads the number of rows off the first tensor.)
        return {"num_tokens": torch.tensor(tokens), "input_ids": batch.tokens.input_ids, "batch": batch}

    def batch(self, rows: Sequence[TokenizedRow]) -> Microbatch:
        rows = _prompts_together(rows)
        sides = [side for row in rows for side in row.sides]
        counts = [length for row in rows for length in row.lengths]
        preferred = torch.tensor(sides).repeat_interleave(torch.tensor(counts))
        labels = None if rows[0].label is None else torch.tensor(sides)
        return Microbatch(rows, self.tokens([(row.prompt, row.completions) for row in rows]), preferred, labels)

    def tokens(self, groups: Sequence[Group]) -> Packed | Padded:
        """The batch of these groups. A completion without a prompt uses its first token as the prompt, as in TRL."""
        groups = [group for prompt, sides in groups for group in _with_prompt(prompt, sides)]
        if self.flat:
            return pack(share_prompts(groups))
        return padded([(list(prompt), list(side)) for prompt, sides in groups for side in sides])

    def _row(self, example: dict[str, Any]) -> TokenizedRow:
        prompt = list(example["prompt_ids"])
        names = ("completion_ids",) if "label" in example else ("chosen_ids", "rejected_ids")
        label = bool(example["label"]) if "label" in example else None
        other = example.get("KL_completion_ids")
        completions = [self.cut(prompt, example[name]) for name in names]
        return TokenizedRow(prompt, completions, label, None if other is None else self.cut(prompt, other))

    def cut(self, prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
        """What `max_length` leaves of a completion: its start."""
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room for a completion within max_length = "
                f"{self.max_length}: raise max_length, or shorten the prompt"
            )
        return list(completion[:room])


def _with_prompt(prompt: Sequence[int], sides: Sequence[Sequence[int]]) -> list[Group]:
    return [(prompt, sides)] if len(prompt) else [(side[:1], [side[1:]]) for side in sides]


def _prompts_together(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """The rows, reordered: all rows of a prompt follow the first of them."""
    return [rows[i] for together in group_prompts([row.prompt for row in rows]) for i in together]


# ---------------------------------------------------------------------------------------------------------
# The reference's log-probabilities


class ReferenceCache:
    """Per-token log-probabilities of the reference, float32 on the CPU, computed once for each distinct row.

    Kept by the rows' tokens and in memory only: the reference does not change while a trainer lives. New numbers wait
    on the device until somebody asks for them or `settle` is called, so that no step waits for the device.
    """

    def __init__(self):
        self._kept: dict[bytes, Tensor] = {}
        self._waiting: list[tuple[list[TokenizedRow], Tensor]] = []
        self._expected: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._kept.keys() | self._expected)

    def put(self, rows: Sequence[TokenizedRow], logps: Tensor) -> None:  # (N,)
        self._waiting.append((list(rows), logps.detach()))
        self._expected.update(row.key for row in rows)

    def get(self, rows: Sequence[TokenizedRow]) -> Tensor | None:  # (N,) on the CPU
        """The numbers of these rows, end to end, if all of them are known."""
        keys = [row.key for row in rows]
        if not all(key in self._kept or key in self._expected for key in keys):
            return None
        if not all(key in self._kept for key in keys):
            self.settle()
        return torch.cat([self._kept[key] for key in keys])

    def settle(self) -> None:
        """Fetches what waits on the device, in one copy."""
        if not self._waiting:
            return
        rows = [row for rows, _ in self._waiting for row in rows]
        logps = torch.cat([logps for _, logps in self._waiting]).float().cpu()
        for row, values in zip(rows, logps.split([sum(row.lengths) for row in rows]), strict=True):
            self._kept[row.key] = values.clone()  # not a view that keeps all the others alive
        self._waiting, self._expected = [], set()

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Gives every rank of `group` the entries of all ranks."""
        self.settle()
        if group is None:
            return
        everyone: list[dict[bytes, Tensor] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, self._kept, group=group)
        for kept in everyone:
            self._kept = kept | self._kept


# ---------------------------------------------------------------------------------------------------------
# Metrics between two log lines


@dataclass
class MicrobatchMetrics:
    """Sums and counts of each microbatch since the last log line, on the device until then.

    TRL logs the plain mean of its microbatches' means (over all ranks each), where `reduce_metrics` weighs each row the
    same; so every microbatch keeps its own sums here, and all of them are reduced at once. They are read then, not
    before: a backward may still write into one.
    """

    microbatches: list[dict[str, Tensor]] = field(default_factory=list)  # {name: (2,) [sum, count]}

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.microbatches.append(metrics)

    def take(self, extra: Tensor, group: dist.ProcessGroup | None) -> tuple[list[dict[str, float]], float]:
        """The means of each microbatch, a name that nobody counted left out, and the sum of () `extra` over `group`.

        One packed reduction, one wait for the device; the window is empty afterwards.
        """
        sums = [value.double() for metrics in self.microbatches for value in metrics.values()]
        packed = torch.cat([*sums, extra.double().reshape(1)])
        if group is not None:
            dist.all_reduce(packed, group=group)
        *values, total = packed.tolist()
        pairs = zip(values[0::2], values[1::2], strict=True)
        means = [means_of({name: next(pairs) for name in metrics}) for metrics in self.microbatches]
        self.microbatches = []
        return means, total


def counted(x: Tensor, mask: Tensor | None = None) -> Tensor:  # (N,), (N,) bool -> (2,)
    """[sum, count] of `x`, where `mask` is true."""
    x = x.detach().double()
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return torch.stack([torch.where(mask, x, 0.0).sum(), mask.sum().double()])
