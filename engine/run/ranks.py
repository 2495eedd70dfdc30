"""One run on many processes: who does what of an optimizer step, and how the parts become one update.

    torchrun --nproc-per-node 8 -m prefuse.engine train ...     or     prefuse train --nproc 8 ...

A loss is a sum over items divided by the number of items of the whole step, so what ranks add to it is summed, never
averaged, and the same step on 1 rank, on k, and under accumulation is the same update but for rounding.

`ddp`: every rank holds the model. There is no DistributedDataParallel around it: its hooks fire on the module's own
forward, which the fused head goes around, and it averages. Here microbatches accumulate locally and the gradients are
summed once per step, in float32, bucket by bucket in the order of the parameters.

`fsdp`: weights, gradients and optimizer states are spread over the ranks (engine/model/sharding.py).
"""

from __future__ import annotations

import datetime
import heapq
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefuse.engine.errors import OtherRankFailed, UserError

if TYPE_CHECKING:
    from prefuse.engine.config.settings import Config

BUCKET_BYTES = 1 << 26  # of float32 gradients summed at once


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # fsdp
    offload: bool = False  # its shards stay in the CPU's memory

    @property
    def main(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.size > 1 else None

    def sum_(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:  # (ranks, *x.shape)
        if self.size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def texts(self, text: str) -> list[str]:
        """What every rank has to say. (As bytes in a tensor: gathering objects would pickle them.)"""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(data)]))[:, 0].tolist()
        padded = nn.functional.pad(data, (0, max(lengths) - len(data)))
        return [bytes(row[:n].tolist()).decode() for row, n in zip(self.gather(padded), lengths, strict=True)]

    def any(self, flag: bool) -> bool:
        return bool(self.sum_(torch.tensor([int(flag)])).item())

    def wait(self) -> None:
        """Waits for all ranks before the end: one that exits early may reset a connection that another still reads."""
        if self.size > 1:
            dist.barrier()

    def together(self, function: Callable[[], object]) -> object:
        """Calls `function()` on every rank. It must not communicate. If it fails on one rank, all ranks raise."""
        result, error = None, None
        try:
            result = function()
        except (UserError, OSError) as mistake:
            error = mistake
        self._fail_together(error)
        return result

    def from_main(self, function: Callable[[], object], meanwhile: Callable[[], None] | None = None) -> object:
        """The JSON value of `function()`, called by the main rank alone; the others call `meanwhile`."""
        result, error = None, None
        try:
            if self.main:
                result = function()
            elif meanwhile is not None:
                meanwhile()
        except (UserError, OSError) as mistake:
            error = mistake
        self._fail_together(error)
        return json.loads(self.texts(json.dumps(result))[0]) if self.size > 1 else result

    def _fail_together(self, error: Exception | None) -> None:
        said = self.texts("" if error is None else str(error) or type(error).__name__) if self.size > 1 else []
        if error is not None and not any(said[: self.rank]):
            raise error
        if any(said):
            raise OtherRankFailed(next(text for text in said if text))

    def in_step(self, own: Sequence, spare: object, always: bool = False) -> Iterator[tuple[object, bool]]:
        """Yields (batch, True) for each of this rank's batches. Under fsdp (or `always`) a forward takes all ranks, so
        a rank with fewer batches than another also gets (`spare`, False), whose numbers are to be dropped."""
        count = len(own)
        if (self.sharded or always) and self.size > 1:
            count = int(self.gather(torch.tensor([count])).max())
        for number in range(count):
            yield (own[number], True) if number < len(own) else (spare, False)


ALONE = Ranks()


def launched(nproc: int = 1) -> tuple[int, int]:
    """(rank, number of ranks) by what a launcher has put into the environment, which must be whole and agree."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    said = " ".join(f"{name}={value}" for name, value in given.items())
    mend = f"the environment has {said}: expected what torchrun or --nproc sets; unset {' '.join(given)} to run alone"
    for name, value in given.items():
        if not value.isascii() or not value.isdigit():
            raise UserError(f"{name} must be a whole number, got {value!r}; {mend}")
    if not given:
        return 0, 1
    if "RANK" not in given or "WORLD_SIZE" not in given:
        raise UserError(f"{'WORLD_SIZE' if 'RANK' in given else 'RANK'} is missing; {mend}")
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    local = int(given.get("LOCAL_RANK", 0))
    if rank >= size or local >= int(given.get("LOCAL_WORLD_SIZE", size)):
        raise UserError(f"a rank must be below the number of ranks; {mend}")
    where = "PREFUSE_RENDEZVOUS" in os.environ
    if size > 1:
        needed = [] if where else ["MASTER_ADDR", "MASTER_PORT"]
        absent = [name for name in ["LOCAL_RANK", *needed] if name not in os.environ]
        if absent:
            raise UserError(f"{', '.join(absent)} missing; {mend}")
    if nproc > 1 and (size != nproc or not where):
        raise UserError(
            f"--nproc {nproc} starts processes by itself, but the environment has {said}, which says that a launcher "
            f"has started them: drop --nproc under torchrun, or unset {' '.join(given)}"
        )
    return rank, size


def join(config: Config) -> Ranks:
    """The ranks that a launcher (torchrun, Slurm, `--nproc`) has started, or this process alone."""
    sharded = config.parallel == "fsdp"
    rank, size = launched(config.nproc)
    if size == 1 and not sharded:
        return ALONE
    on_cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if not dist.is_initialized():
        where = (
            {"init_method": os.environ.get("PREFUSE_RENDEZVOUS", "env://")} if size > 1 else {"store": dist.HashStore()}
        )
        try:
            dist.init_process_group(
                # gloo too where there is NCCL: what the ranks agree on before each step never waits for the device.
                "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
                rank=rank, world_size=size, timeout=datetime.timedelta(seconds=config.ddp_timeout), **where,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:  # no peer came, or an address that is none
            raise UserError(
                f"rank {rank} of {size} did not meet the others ({str(error).strip().splitlines()[0]}): expected all "
                "to be started at about the same time, with the same MASTER_ADDR and MASTER_PORT"
            ) from None
    if rank > 0:
        from prefuse.engine.report.log import console

        console.quiet = True
        logging.getLogger("prefuse").setLevel(logging.ERROR)
    return Ranks(rank, size, sharded, config.fsdp_cpu_offload)


def leave(code: int) -> None:
    """End this process at once, where it is one of several ranks: the interpreter is not shut down.

    Under CPython 3.11 a thread of gloo that frees a tensor during that shutdown ends the process by SIGABRT.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------------------------------------------------
# Who does what


def share(microbatches: Sequence[list[int]], tokens: Sequence[int], size: int) -> list[list[list[int]]]:
    """The microbatches of each of `size` ranks, by their number of tokens as even as it goes.

    All get the same number of microbatches; for that the largest are split. Only where all have a single example and
    their number does not divide do some get one less. `tokens` is by example.
    """
    if size == 1:
        return [list(microbatches)]
    tokens = np.asarray(tokens)
    bins = _as_many_for_each(microbatches, tokens, size)
    room, extra = divmod(len(bins), size)
    parts: list[list[list[int]]] = [[] for _ in range(size)]
    lightest = [(0, rank) for rank in range(size)]
    for negative, indices in sorted((-_weight(indices, tokens), indices) for indices in bins):
        load, rank = heapq.heappop(lightest)
        while len(parts[rank]) == room and not extra:
            load, rank = heapq.heappop(lightest)
        extra -= len(parts[rank]) == room
        parts[rank].append(indices)
        if len(parts[rank]) <= room:
            heapq.heappush(lightest, (load - negative, rank))
    return parts


def _as_many_for_each(microbatches: Sequence[list[int]], tokens: np.ndarray, size: int) -> list[list[int]]:
    """Microbatches whose number `size` divides: the largest that have more than one example are split."""
    wanted = -(-len(microbatches) // size) * size
    whole = [(-_weight(indices, tokens), number) for number, indices in enumerate(microbatches) if len(indices) > 1]
    heapq.heapify(whole)
    bins, numbers = dict(enumerate(microbatches)), count(len(microbatches))
    while len(bins) < wanted and whole:
        _, largest = heapq.heappop(whole)
        for half, number in zip(_halves(bins.pop(largest), tokens), numbers, strict=False):
            bins[number] = half
            if len(half) > 1:
                heapq.heappush(whole, (-_weight(half, tokens), number))
    return list(bins.values())


def _weight(indices: list[int], tokens: np.ndarray) -> int:
    return int(tokens[indices].sum())


def _halves(indices: list[int], tokens: np.ndarray) -> list[list[int]]:
    """Two parts of about the same number of tokens, neither empty, each in the order it had."""
    parts: tuple[set[int], set[int]] = (set(), set())
    loads = [0, 0]
    weights = dict(zip(indices, tokens[indices].tolist(), strict=True))
    for i in sorted(indices, key=lambda i: -weights[i]):
        side = int(loads[1] < loads[0])
        parts[side].add(i)
        loads[side] += weights[i]
    return [[i for i in indices if i in part] for part in parts]


# ---------------------------------------------------------------------------------------------------------
# Gradients and weights


def sum_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Every parameter's gradient becomes its sum over the ranks. (fully_shard has done so in the backward.)"""
    if ranks.size == 1 or ranks.sharded:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    # An expert that no token of this rank went to has no gradient here, though perhaps elsewhere.
    used = ranks.sum_(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
    parameters = [p for p, anywhere in zip(parameters, used, strict=True) if anywhere]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in parameters]):
        flat = torch.cat([grad.flatten().float() for grad in bucket])
        ranks.sum_(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + 4 * tensor.numel() > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += 4 * tensor.numel()
    if bucket:
        yield bucket


def reduce_in_backward(model: nn.Module, last: bool) -> None:
    """Of a sharded model's microbatches only the last sends its gradients, with what the others have added."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:  # ()
    """The norm of all gradients, before they are scaled down to `limit`."""
    return whole(nn.utils.clip_grad_norm_(model.parameters(), limit))


def check_same_weights(model: nn.Module, ranks: Ranks) -> None:
    """Ranks that each hold the model must hold the same one; a gradient that was not summed shows here."""
    if ranks.size == 1 or ranks.sharded:
        return
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = torch.stack([_byte_sum(p) for p in parameters])
    different = (ranks.gather(sums) != sums).any(0).tolist()
    if ranks.any(any(different)):
        name = next((name for name, differs in zip(names, different, strict=True) if differs), "some weights")
        raise AssertionError(f"{name} is no longer the same on all ranks: nothing was saved of it")


def _byte_sum(x: Tensor) -> Tensor:  # ()
    return x.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64)


def whole(x: Tensor) -> Tensor:
    """The tensor itself, gathered where it is spread over the ranks."""
    return x.full_tensor() if isinstance(x, dist.tensor.DTensor) else x


def fill_(target: Tensor, x: Tensor) -> None:
    """Copies a whole tensor into `target`, or this rank's part into its part, without communication."""
    if isinstance(target, dist.tensor.DTensor):
        mesh = target.device_mesh
        x = dist.tensor.distribute_tensor(x.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
        target, x = target.to_local(), x.to_local()
    target.copy_(x)


def whole_weights(model: nn.Module, ranks: Ranks, trained_only: bool = False) -> dict[str, Tensor]:
    """The model's state on the CPU of the main rank; the others help and get nothing. Tied names share a tensor."""
    gathered: dict[int, Tensor] = {}
    tied = dict(model.named_parameters(remove_duplicate=False))
    state = {}
    for name, value in model.state_dict().items():
        if trained_only and not (name in tied and tied[name].requires_grad):
            continue
        key = id(tied.get(name, value))
        if key not in gathered:
            full = whole(value)
            gathered[key] = full.cpu() if ranks.main else torch.empty(0)
        state[name] = gathered[key]
    return state if ranks.main else {}
