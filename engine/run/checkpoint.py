"""Checkpoints: a folder that appears whole, proves itself by its hashes, and holds no pickle.

checkpoint-300/  model.safetensors config.json tokenizer...   what from_pretrained reads; with adapters, theirs alone
                 optimizer-00001.safetensors ...              <state>.<parameter name>
                 rng.safetensors                              the random state of every rank
                 trainer_state.json                           step, settings, metrics since the last log line
                 manifest.json                                sha256 of every file above

Tensors are whole, whatever the ranks held of them, so a run goes on with any number of ranks, sharded or not. Every
rank takes part in saving; the main one gathers the weights at once and the optimizer's states file by file, on the CPU.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.errors import UserError
from prefuse.engine.model.adapters import ABOUT, WEIGHTS, adapter_state
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import save_model, trained_weights
from prefuse.engine.run.files import published_folder, require_space, sha256_of
from prefuse.engine.run.ranks import ALONE, Ranks, check_same_weights, fill_, whole
from prefuse.models.trunk import class_of

logger = logging.getLogger(__name__)

FILE_BYTES = 4 << 30  # of optimizer states in a file


def save_checkpoint(
    folder: Path,
    lm: LanguageModel,
    tokenizer,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `checkpoint-<step>` aside, publish it, and only then delete all but the newest `keep` (0: none)."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{state['step']}"
    check_same_weights(lm.model, ranks)
    size = sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1)
        for p in (lm.model.parameters() if lm.adapters is None else _trainable(lm).values())
    )
    ranks.from_main(lambda: require_space(folder, size + (size >> 5) + (1 << 20), final.name))
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
                (aside / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
                files = sorted(path for path in aside.rglob("*") if path.is_file())
                manifest = {path.relative_to(aside).as_posix(): sha256_of(path) for path in files}
                (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if keep:
                older = [path for step, path in _checkpoints(folder) if step < state["step"]]
                for path in older[keep - 1 :]:
                    shutil.rmtree(path)
        finally:
            drain()  # where writing failed, the others still wait to be asked for their parts

    def drain() -> None:
        for _ in optimizer_files:
            pass

    ranks.from_main(write, meanwhile=drain)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every hash holds; says which ones it passed over, and sets them aside."""
    for half in folder.glob("checkpoint-*.tmp"):
        shutil.rmtree(half, ignore_errors=True)
    for _, path in _checkpoints(folder):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s): trying an older one", path, fault)
        damaged = path.with_name(path.name + ".damaged")  # else it would count among the newest that are kept
        shutil.rmtree(damaged, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rename(damaged)
    return None


def read_state(path: Path) -> dict:
    return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))


def load_checkpoint(path: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> None:
    """Weights, optimizer and random state as they were. The model and the optimizer must already be built."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if lm.adapters is None:
        saved = class_of(lm.model).from_pretrained(path, dtype=lm.head.weight.dtype).state_dict()
        own = lm.model.state_dict()
    else:
        saved, own = load_file(path / WEIGHTS), adapter_state(lm.model, lm.adapters)
    with torch.no_grad():
        for name, value in own.items():
            fill_(value, saved[name])

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


def check_same(before: dict, now: dict) -> None:
    """A resumed run must be the run that was interrupted."""
    for name, value in now.items():
        if name in before and before[name] != value:
            raise UserError(
                f"cannot resume: {name} was {before[name]} and is now {value}; "
                f"set it back, or start a new run from the checkpoint's weights"
            )


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Newest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        about = ABOUT if ABOUT in manifest else "config.json"
        for name in (about, "trainer_state.json", "rng.safetensors"):
            if name not in manifest:
                return f"manifest.json does not list {name}"
        for name, expected in manifest.items():
            if sha256_of(path / name) != expected:
                return f"{name} does not have the hash that was written down"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None


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
    """A state of the optimizer where it was: spread over the ranks as its parameter is, on its device, in pages."""
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
