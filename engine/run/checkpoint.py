"""Checkpoints: a folder that appears whole, proves itself by its hashes, and holds no pickle.

checkpoint-300/  model.safetensors config.json tokenizer...   what from_pretrained reads; with adapters, theirs alone
                 optimizer-00001.safetensors ...              <state>.<parameter name>
                 rng.safetensors                              the random state of every rank
                 rows.safetensors                             a digest of every training row
                 trainer_state.json                           step, settings, metrics since the last log line, hashes
                 manifest.json                                sha256 of every file above

Tensors are whole, whatever the ranks held of them, so a run goes on with any number of ranks, sharded or not. Every
rank takes part in saving; the main one gathers the weights at once and the optimizer's states file by file, on the CPU.

A checkpoint is good once a later step has found its weights sound: loss and gradient were finite, and the loss was not
an explosion. Only then are older ones deleted, so that a run which diverges keeps a good one. `proof` says what a whole
checkpoint must have.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefuse.engine.model.adapters import WEIGHTS, adapter_state
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import save_model, trained_weights
from prefuse.engine.run.files import json_text, published_folder, require_space, sha256_of
from prefuse.engine.run.proof import checkpoints, fault_of_files, fault_of_tensors, read_state
from prefuse.engine.run.ranks import ALONE, Ranks, check_same_weights, fill_, whole
from prefuse.models.trunk import class_of

if TYPE_CHECKING:
    from prefuse.engine.run.best import Best

logger = logging.getLogger(__name__)

FILE_BYTES = 4 << 30  # of optimizer states in a file


def checkpoint_bytes(lm: LanguageModel) -> int:
    """About what one takes on the disk: weights, and two states of the optimizer for what is trained."""
    size = sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1)
        for p in (lm.model.parameters() if lm.adapters is None else _trainable(lm).values())
    )
    return size + (size >> 5) + (1 << 20)


def model_bytes(lm: LanguageModel) -> int:
    """About how many bytes the model, or its adapters alone, take on the disk."""
    own = lm.model.parameters() if lm.adapters is None else _trainable(lm).values()
    size = sum(p.numel() * p.element_size() for p in own)
    return size + (size >> 5) + (1 << 20)


def save_checkpoint(
    folder: Path,
    lm: LanguageModel,
    tokenizer,
    optimizer: torch.optim.Optimizer,
    state: dict,
    rows: Tensor,  # (E,) int64
    ranks: Ranks = ALONE,
) -> Path:
    """Write `checkpoint-<step>` aside and publish it."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{state['step']}"
    check_same_weights(lm.model, ranks)
    size = checkpoint_bytes(lm)
    ranks.from_main(lambda: require_space(folder, size, final.name))
    weights = trained_weights(lm, ranks)
    random = _gather_rng(ranks)
    optimizer_files = _optimizer_files(lm, optimizer, ranks)

    def write() -> None:
        try:
            with published_folder(final) as aside:
                save_model(lm, tokenizer, aside, weights)
                for number, (tensors, numbers) in enumerate(optimizer_files, 1):
                    about = {"numbers": json.dumps(numbers)}
                    save_file(tensors, aside / f"optimizer-{number:05}.safetensors", metadata=about)
                save_file(random, aside / "rng.safetensors")
                save_file({"rows": rows}, aside / "rows.safetensors")
                files = sorted(path for path in aside.rglob("*") if path.is_file())
                hashes = {path.relative_to(aside).as_posix(): sha256_of(path) for path in files}
                (aside / "trainer_state.json").write_text(json_text({**state, "files": hashes}, 1), encoding="utf-8")
                manifest = {**hashes, "trainer_state.json": sha256_of(aside / "trainer_state.json")}
                (aside / "manifest.json").write_text(json_text(manifest, 1), encoding="utf-8")
        finally:
            drain()  # where writing failed, the others still wait to be asked for their parts

    def drain() -> None:
        for _ in optimizer_files:
            pass

    ranks.from_main(write, meanwhile=drain)
    return final


class Checkpoints:
    """Those of a run: which is the newest, and which the last that is known to be good."""

    def __init__(self, keep: int, ranks: Ranks, newest: int | None = None, best: "Best | None" = None) -> None:
        self.keep = keep  # 0: all
        self.best = best  # whose step is kept too
        self.ranks = ranks
        self.newest = self.good = newest
        self.unproven: int | None = newest

    def saved(self, step: int) -> None:
        self.newest = self.unproven = step

    def proven(self, folder: Path) -> None:
        """The weights of the newest are sound: it is good, and older ones may go."""
        if self.unproven is None:
            return
        self.good, self.unproven = self.unproven, None
        if self.keep and self.ranks.main:
            for step, path in checkpoints(folder)[self.keep :]:
                if self.best is None or step != self.best.step:
                    shutil.rmtree(path, ignore_errors=True)

    def diverged(self, folder: Path) -> None:
        """The newest is not sound: it is set aside, so that a resumed run goes back behind it."""
        if self.unproven is None:
            return
        if self.ranks.main:
            set_aside(folder / f"checkpoint-{self.unproven}", "diverged")
        self.newest, self.unproven = (None if self.good == self.unproven else self.good), None
        self.good = self.newest


@dataclass(frozen=True)
class Saved:
    path: Path
    state: dict
    rows: Tensor  # (E,) int64


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whose files are whole; says which ones it passed over, and sets them aside."""
    for _, path in checkpoints(folder):
        fault = fault_of_files(path)
        if fault is None:
            return path
        _pass_over(path, fault)
    return None


def load_newest(
    folder: Path,
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks = ALONE,
    agree: Callable[[Saved], None] = lambda saved: None,
) -> Saved | None:
    """Weights, optimizer and random state of the newest checkpoint in which nothing is wrong. `agree` raises UserError
    for one of another run."""
    while True:
        newest = ranks.from_main(lambda: (latest_checkpoint(folder) or Path()).name)
        if not newest:
            return None
        path = folder / newest
        saved = ranks.together(lambda path=path: _read(path))
        agree(saved)
        fault = ranks.from_main(lambda saved=saved: fault_of_tensors(saved.path, saved.state, lm, _trainable(lm)))
        if fault is None:
            _load(path, lm, optimizer, ranks)
            return saved
        if ranks.main:
            _pass_over(path, fault)


def set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{path.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(aside)


def _pass_over(path: Path, fault: str) -> None:
    logger.warning("%s is damaged (%s): trying an older one", path, fault)
    set_aside(path, "damaged")  # else it would count among the newest that are kept


def _read(path: Path) -> Saved:
    from safetensors.torch import load_file

    return Saved(path, read_state(path), load_file(path / "rows.safetensors")["rows"])


def _load(path: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """The model and the optimizer must already be built."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    load_weights(path, lm)
    states: dict[str, dict[str, Tensor]] = {}
    trainable = _trainable(lm)
    for file in sorted(path.glob("optimizer-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            numbers = json.loads((tensors.metadata() or {}).get("numbers", "[]"))
            for key in tensors.keys():
                part, name = key.split(".", 1)
                value = tensors.get_tensor(key)
                value = value.item() if key in numbers else _placed(value, part, trainable[name], optimizer)
                states.setdefault(name, {})[part] = value
    for name, state in states.items():  # without a parameter that never had a gradient
        optimizer.state[trainable[name]] = state

    random = load_file(path / "rng.safetensors")
    if ranks.rank < len(random["cpu"]):
        own = {name: state[ranks.rank].clone() for name, state in random.items()}  # of a view torch reads elsewhere
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])


def load_weights(path: Path, lm: LanguageModel) -> None:
    """Those of a checkpoint into the model that stands, of all ranks or of this rank's part."""
    from safetensors.torch import load_file

    if lm.adapters is None:
        saved = class_of(lm.model).from_pretrained(path, dtype=lm.head.weight.dtype).state_dict()
        own = lm.model.state_dict()
    else:
        saved, own = load_file(path / WEIGHTS), adapter_state(lm.model, lm.adapters)
    with torch.no_grad():
        for name, value in own.items():
            fill_(value, saved[name])


def _trainable(lm: LanguageModel) -> dict[str, Tensor]:
    """A tied parameter appears once."""
    return {name: parameter for name, parameter in lm.model.named_parameters() if parameter.requires_grad}


def _optimizer_files(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """The states of the optimizer as whole tensors, a file's worth at a time, and which of them are plain numbers; on
    other ranks than the main, empty."""
    tensors, numbers, size = {}, [], 0
    for name, parameter in _trainable(lm).items():
        for part, value in optimizer.state[parameter].items():
            key = f"{part}.{name}"
            full = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
            size += full.numel() * full.element_size()
            if ranks.main:
                tensors[key] = full.detach().cpu().clone(memory_format=torch.contiguous_format)  # some share a table
                numbers += [] if isinstance(value, Tensor) else [key]
        if size > FILE_BYTES:
            yield tensors, numbers
            tensors, numbers, size = {}, [], 0
    if size:
        yield tensors, numbers


def _placed(value: Tensor, part: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """`value` placed as the optimizer keeps it: spread over the ranks like its parameter, on its device, paged."""
    if value.shape == parameter.shape and part != "step":
        paged = getattr(optimizer, "get_state_buffer", None)  # bitsandbytes'
        own = (
            torch.zeros_like(parameter.detach(), dtype=value.dtype) if paged is None else paged(parameter, value.dtype)
        )
        fill_(own, value)
        return own
    if part == "step" and not any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        return value  # torch counts steps on the CPU
    return value.to(parameter.device)


def _gather_rng(ranks: Ranks) -> dict[str, Tensor]:  # (ranks, bytes)
    states = {"cpu": ranks.gather(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["cuda"] = ranks.gather(torch.cuda.get_rng_state())
    return {name: state.contiguous() for name, state in states.items()}
