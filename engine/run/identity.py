"""What a resumed run must have in common with the run before it: all that decides the weights it ends with.

Settings are compared by value; rows, the model it starts from and its reference by what is in them, wherever they lie.
Steps may be added: from the step it goes on with, the learning rate is that of a run of the new length.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefuse.engine.config.settings import Config, decides_weights
from prefuse.engine.data.batches import Examples
from prefuse.engine.errors import UserError
from prefuse.engine.run.ranks import Ranks

# Compared by what they lead to: rows, weights, the number of items and of steps.
BY_CONTENT = {
    "dataset_name", "dataset_train_split", "dataset_test_split", "eval_fraction", "model_name_or_path", "gguf_file",
    "ref_model_name_or_path", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps",
}  # fmt: skip
# These change how a number is computed, and so its last digits.
ROUNDING = {
    "impl", "torch_compile", "torch_compile_backend", "use_liger_kernel", "padding_free", "max_tokens_per_batch",
}  # fmt: skip
ROWS_OF_A_STEP = "the rows of a step (per_device_train_batch_size x gradient_accumulation_steps x processes)"
LIBRARIES = ("prefuse", "torch", "transformers", "tokenizers", "peft", "triton", "bitsandbytes", "liger_kernel")


def deciding_settings(config: Config) -> dict[str, object]:
    """Those that decide the weights, and those that decide their last digits."""
    return {k: v for k, v in dataclasses.asdict(config).items() if decides_weights(k) and k not in BY_CONTENT}


def libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Identity:
    command: str
    items_per_step: int
    total_steps: int
    steps_per_epoch: int
    settings: dict[str, object]
    rows: Tensor  # (E,) int64, a digest of each row's tokens and label
    model: dict[str, int]  # a checksum of each tensor that the run starts from
    libraries: dict[str, str]
    reference: dict[str, int] | None = None  # of a second model

    def state(self) -> dict:
        """Without the rows, which a checkpoint keeps as a tensor."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "rows"}


def row_digests(examples: Examples) -> Tensor:  # (E,) int64
    """Of each row's tokens, in its parts, which of them are learned, and its label."""
    digests = bytearray()
    for index, row in enumerate(examples.rows_as_bytes()):
        digest = hashlib.blake2b(row, digest_size=8)
        if examples.learned is not None:
            digest.update(np.asarray(examples.learned_of(index), bool).tobytes())
        if examples.labels is not None:
            digest.update(bytes([bool(examples.labels[index])]))
        for name in ("weights", "margins", "scores"):
            if (of_rows := getattr(examples, name)) is not None:
                digest.update(np.float64(of_rows[index]).tobytes())
        digests += digest.digest()
    return torch.frombuffer(digests, dtype=torch.int64)


CHUNK = 1 << 20  # of words summed at once
PERIOD = 65521  # a prime


@torch.no_grad()
def checksums(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """Of each tensor, by its bits and their places, however it is spread over the ranks."""
    local = [_local(x) for x in tensors.values()]
    starts = torch.zeros(len(local), dtype=torch.int64)
    spread = torch.tensor([x is not y for x, y in zip(local, tensors.values(), strict=True)])
    if ranks.sharded and ranks.size > 1:  # fully_shard cuts the first dimension, in the order of the ranks
        sizes = ranks.gather(torch.tensor([x.numel() for x in local]))
        starts = sizes[: ranks.rank].sum(0) * spread
    sums = torch.tensor([_checksum(x, int(start)) for x, start in zip(local, starts, strict=True)], dtype=torch.int64)
    if ranks.sharded and ranks.size > 1:
        sums = torch.where(spread, ranks.sum_(sums.clone()), sums)
    return dict(zip(tensors, sums.tolist(), strict=True))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _checksum(x: Tensor, start: int) -> int:
    """sum over i of word_i * (1 + (start + i) mod PERIOD), modulo 2^64."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    words = x.detach().contiguous().flatten().view(word)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for at in range(0, len(words), CHUNK):
        part = words[at : at + CHUNK].long()
        place = torch.arange(start + at, start + at + len(part), device=x.device) % PERIOD + 1
        total += (part * place).sum()
    return int(total)


# ---------------------------------------------------------------------------------------------------------
# Before and now


def check_settings(command: str, before: dict, config: Config) -> None:
    """By the mark of the folder, before anything is read. `before`: {"command", "settings"}"""
    faults = []
    if before.get("command", command) != command:
        faults.append(f"the command was {before['command']} and is now {command}")
    faults += _changed(before.get("settings", {}), deciding_settings(config))
    _refuse(faults)


def check_same(before: dict, rows_before: Tensor, now: Identity, rows: Sequence[str], done: int) -> list[str]:
    """What changed and may, in words; UserError names all that may not. `before`: `Identity.state()` of the checkpoint;
    `rows`: the names of the rows; `done`: the steps of the checkpoint."""
    faults = _changed(before["settings"], now.settings)
    for name, what in ("command", "the command"), ("items_per_step", ROWS_OF_A_STEP):
        if before[name] != getattr(now, name):
            faults.append(f"{what} was {before[name]} and is now {getattr(now, name)}")
    if now.total_steps < before["total_steps"]:
        faults.append(f"the run had {before['total_steps']} steps and now has {now.total_steps}: it can only be longer")
    faults += _changed_rows(rows_before, now.rows, rows)
    faults += _changed_tensors("the model that the run starts from", before["model"], now.model)
    if before["reference"] is not None and now.reference is not None:
        faults += _changed_tensors("the reference model", before["reference"], now.reference)
    elif before["reference"] != now.reference:
        faults.append("there was no" if before["reference"] is None else "there was a")
        faults[-1] += " second model as the reference, and now it is the other way round (ref_model_name_or_path)"
    _refuse(faults)

    said = []
    for name in sorted(ROUNDING & now.settings.keys()):
        if before["settings"].get(name) != now.settings[name]:
            value = before["settings"].get(name)
            said.append(f"{name} was {_word(value)} and is now {_word(now.settings[name])}: equal to rounding")
    for name in sorted(before["libraries"].keys() | now.libraries.keys()):
        old, new = before["libraries"].get(name, "absent"), now.libraries.get(name, "absent")
        if old != new:
            said.append(f"{name} was {old} and is now {new}: not to the last bit what the run would have been")
    if now.total_steps > before["total_steps"]:
        said.append(
            f"the run is extended from {before['total_steps']} to {now.total_steps} steps: from step {done + 1} on, "
            "the learning rate is that of a run of the new length"
        )
    return said


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UserError(
            f"cannot resume: {'; '.join(faults)}; set it back, or start a new run from the checkpoint's weights "
            "(model_name_or_path) in another output_dir"
        )


def _word(value: object) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _changed(before: dict, now: dict) -> list[str]:
    before = json.loads(json.dumps(before))  # as it was read: a tuple is a list
    now = json.loads(json.dumps(now))
    names = [name for name in now if name not in ROUNDING and name in before and before[name] != now[name]]
    return [f"{name} was {_word(before[name])} and is now {_word(now[name])}" for name in names]


def _changed_rows(before: Tensor, now: Tensor, names: Sequence[str]) -> list[str]:
    if before.shape == now.shape and torch.equal(before, now):
        return []
    count = min(len(before), len(now))
    differ = (before[:count] != now[:count]).nonzero().flatten().tolist()
    first = differ[0] if differ else count
    where = f"first at {names[first]}" if first < len(names) else f"the first {count} are the same"
    if before.shape == now.shape and torch.equal(before.sort().values, now.sort().values):
        return [f"the training rows are not in the same order: {len(differ)} of {count} stand elsewhere, {where}"]
    if len(before) == len(now):
        return [f"the training rows are not the same: {len(differ)} of {count} differ in tokens or label, {where}"]
    return [f"the training rows are not the same: there were {len(before)} and are now {len(now)}, {where}"]


def _changed_tensors(what: str, before: dict[str, int], now: dict[str, int]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return []
    return [f"{what} is not the same: {len(names)} of {len(now)} tensors differ, first {names[0]}"]
