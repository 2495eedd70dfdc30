"""Every choice of a run that looks random: which rows are held out, their order, and KTO's mismatches.

Each is a function of its arguments and the seed alone, so a resumed run, or one on another machine, chooses the same.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from prefuse import mismatches
from prefuse.engine.data.ragged import Ragged
from prefuse.engine.errors import UserError


def generator(purpose: str, seed: int, epoch: int = 0) -> torch.Generator:
    """A generator of its own for every purpose: drawing more for one never shifts another."""
    digest = hashlib.sha256(f"{purpose} {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def hold_out(
    prompts: Sequence[list[int]], fraction: float, seed: int, at_least: int = 1, threads: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out (of `at_least` so many prompts), in the order of the data.

    Whole prompts are held out: rows that share a prompt stay on one side, and so do the parts of one conversation
    (equal numbers in `threads`, (E,)), so nothing held out was seen in training.
    """
    if fraction == 0:
        return list(range(len(prompts))), []
    _, first, same = np.unique(joined(_same(prompts), threads), return_index=True, return_inverse=True)
    keys = [hashlib.sha256(f"{seed} {prompts[i]}".encode()).digest() for i in first.tolist()]  # by distinct prompt
    held = sorted(range(len(keys)), key=keys.__getitem__)[: max(at_least, round(fraction * len(keys)))]
    if fraction < 1 and len(held) == len(keys):
        raise UserError(
            f"holding out {len(held)} of {len(keys)} distinct prompt(s) leaves nothing to train on: "
            "set eval_fraction to 0, or give an eval_dataset"
        )
    is_held = np.zeros(len(keys), bool)
    is_held[held] = True
    return np.flatnonzero(~is_held[same]).tolist(), np.flatnonzero(is_held[same]).tolist()


def joined(same: np.ndarray, threads: np.ndarray | None) -> np.ndarray:  # (E,), (E,) -> (E,)
    """The groups of `same`, those that share a thread made one: each with the number of its first group."""
    if threads is None:
        return same
    threads = np.unique(threads, return_inverse=True)[1]
    groups = same
    while True:
        before = groups
        for parts in (threads, same):
            least = np.full(int(parts.max(initial=-1)) + 1, len(same))
            np.minimum.at(least, parts, groups)
            groups = least[parts]
        if (groups == before).all():
            return groups


def _same(prompts: Sequence[list[int]]) -> np.ndarray:  # (E,) equal for equal prompts, numbered as they first appear
    return (prompts if isinstance(prompts, Ragged) else Ragged.of(prompts)).same


Bins = Callable[[Sequence[int]], list[list[int]]]  # indices -> microbatches of them


class Epoch(Sequence):
    """The optimizer steps of one epoch, each a list of microbatches of example indices, cut when it is asked for."""

    def __init__(self, order: np.ndarray, per_step: int, cut: Bins):
        self.order, self.per_step, self.cut = order, per_step, cut

    def __len__(self) -> int:
        return -(-len(self.order) // self.per_step)

    def __getitem__(self, step: int) -> list[list[int]]:
        start = range(len(self))[step] * self.per_step
        return self.cut(self.order[start : start + self.per_step].tolist())


def plan_epoch(
    lengths: Sequence[int], microbatch: int, accumulation: int, seed: int, epoch: int, bins: Bins | None = None
) -> Epoch:
    """A new order each epoch, cut into optimizer steps and those into microbatches; the last of each may be smaller.

    A step has `microbatch * accumulation` examples. Its microbatches are what `bins` makes of them, without it so many
    examples, longest first, which cuts padding. Either changes the update by rounding only.
    """
    order = torch.randperm(len(lengths), generator=generator("order", seed, epoch)).numpy()
    return Epoch(order, microbatch * accumulation, bins or longest_first(lengths, microbatch))


def plan_evaluation(lengths: Sequence[int], microbatch: int, bins: Bins | None = None) -> list[list[int]]:
    """All examples once, longest first."""
    return (bins or longest_first(lengths, microbatch))(range(len(lengths)))


def longest_first(lengths: Sequence[int], microbatch: int) -> Bins:
    lengths = np.asarray(lengths)

    def cut(indices: Sequence[int]) -> list[list[int]]:
        chosen = np.asarray(indices, np.int64)
        chosen = chosen[np.lexsort((chosen, -lengths[chosen]))].tolist()
        return [chosen[start : start + microbatch] for start in range(0, len(chosen), microbatch)]

    return cut


def mismatches_of_epoch(prompts: Sequence[list[int]], seed: int, epoch: int) -> list[int]:
    """For each example i, an example j with another prompt, uniformly: KTO's z0 reads completion j after prompt i."""
    same = _same(prompts)
    if same.max(initial=0) == 0:
        raise UserError(
            "all rows have the same prompt: KTO's reference point needs completions of another prompt, "
            "so at least two different prompts are expected; use loss_type dpo or ipo with pairs"
        )
    uniform = torch.rand(len(prompts), dtype=torch.float64, generator=generator("mismatch", seed, epoch))
    return mismatches.draw_mismatches(torch.from_numpy(same).long(), uniform)
