"""Checkpoints: a folder that appears whole, proves itself by its hashes, and holds no pickle.

checkpoint-300/  model.safetensors config.json tokenizer...   what from_pretrained reads
                 optimizer.safetensors                        <state>.<parameter name>, and rng.<device>
                 trainer_state.json                           step, settings, metrics since the last log line
                 manifest.json                                sha256 of every file above
"""

import json
import logging
import re
import shutil
from pathlib import Path

import torch

from prefuse.engine.errors import UserError
from prefuse.engine.files import published_folder, sha256_of
from prefuse.engine.forward import LanguageModel
from prefuse.engine.model import save_model

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, lm: LanguageModel, tokenizer, optimizer: torch.optim.Optimizer, state: dict, keep: int
) -> Path:
    """Write `checkpoint-<step>` aside, publish it, and only then delete all but the newest `keep` (0: none)."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{state['step']}"
    with published_folder(final) as aside:
        save_model(lm.model, tokenizer, aside)
        save_file(_optimizer_tensors(lm, optimizer) | _rng_states(), aside / "optimizer.safetensors")
        (aside / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {path.relative_to(aside).as_posix(): sha256_of(path) for path in files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if keep:
        for _, old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose every hash holds; says which ones it passed over."""
    for _, path in _checkpoints(folder):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("%s is damaged (%s): trying an older one", path, fault)
    return None


def read_state(path: Path) -> dict:
    return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))


def load_checkpoint(path: Path, lm: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    """Weights, optimizer and random state as they were. The model and the optimizer must already be built."""
    from safetensors.torch import load_file

    saved = type(lm.model).from_pretrained(path, dtype=lm.head.weight.dtype)
    lm.model.load_state_dict(saved.state_dict())
    tensors = load_file(path / "optimizer.safetensors")
    for name, parameter in _trainable(lm).items():
        if f"step.{name}" in tensors:  # absent for a parameter that never had a gradient
            moments = {part: tensors[f"{part}.{name}"].to(parameter.device) for part in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **moments}
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


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
        for name, expected in manifest.items():
            if sha256_of(path / name) != expected:
                return f"{name} does not have the hash that was written down"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _trainable(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """A tied parameter appears once."""
    return {name: parameter for name, parameter in lm.model.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(lm: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.contiguous()
        for name, parameter in _trainable(lm).items()
        for part, value in optimizer.state[parameter].items()
    }


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states
