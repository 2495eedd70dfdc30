"""Whether a checkpoint is whole: all that training needs is in it, is what was written, and could be what a run saves.

First the files, by their hashes, which stand in two places; then the state, by its types; then every tensor, by its
name, shape and numbers. A function here returns what is wrong in words, or None.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from prefuse.engine.model.adapters import ABOUT, WEIGHTS, adapter_state
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.run.files import is_number, sha256_of
from prefuse.models.head import class_of

ALWAYS = ("trainer_state.json", "rng.safetensors", "rows.safetensors")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
FIELDS = {  # of trainer_state.json
    "step": int, "lines": int, "evaluate": bool, "cut": list, "window": dict, "guards": dict, "identity": dict,
    "files": dict,
}  # fmt: skip
IDENTITY = {  # Identity.state()
    "command": str, "items_per_step": int, "total_steps": int, "steps_per_epoch": int, "settings": dict, "model": dict,
    "libraries": dict, "reference": (dict, type(None)),
}  # fmt: skip


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Those of ours, newest first. Another trainer's are never looked at, renamed or removed."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match and _is_ours(path)), reverse=True)


def _is_ours(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    for name, ours in ("manifest.json", "trainer_state.json"), ("trainer_state.json", "identity"):
        try:
            if ours in json.loads((path / name).read_text(encoding="utf-8")):
                return True
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return False


def read_state(path: Path) -> dict:
    return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))


def fault_of_files(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return (
            _fault_of_list(manifest)
            or _fault_of_hashes(path, manifest)
            or _fault_of_state(path, manifest)
            or _fault_of_rows(path)
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except Exception as error:  # whatever is in the files
        return f"{type(error).__name__}: {error}"


def _fault_of_list(manifest: object) -> str | None:
    if not isinstance(manifest, dict) or not all(isinstance(value, str) for value in manifest.values()):
        return "manifest.json is no list of hashes"
    for name in manifest:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"manifest.json lists {name!r}, which is not in the checkpoint"
    needed = [ABOUT, WEIGHTS] if ABOUT in manifest else ["config.json"]
    for name in (*needed, *ALWAYS):
        if name not in manifest:
            return f"manifest.json does not list {name}"
    if ABOUT not in manifest and not any(name in manifest for name in MODEL_FILES):
        return f"manifest.json does not list {MODEL_FILES[0]}"
    return None


def _fault_of_hashes(path: Path, manifest: dict[str, str]) -> str | None:
    for name, expected in manifest.items():
        if sha256_of(path / name) != expected:
            return f"{name} does not have the hash that was written down"
    return None


def _fault_of_state(path: Path, manifest: dict[str, str]) -> str | None:
    state = read_state(path)
    for record, fields in (state, FIELDS), (state.get("identity") if isinstance(state, dict) else None, IDENTITY):
        if not isinstance(record, dict):
            return "trainer_state.json is no state of a run"
        for name, kind in fields.items():
            value = record.get(name)
            if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
                return f"trainer_state.json has no plausible {name!r}: {_short(value)}"
    if path.name != f"checkpoint-{state['step']}" or not state["step"]:
        return f"it is of step {state['step']}, by trainer_state.json"
    if state["step"] > state["identity"]["total_steps"]:
        return f"it is of step {state['step']} of {state['identity']['total_steps']}"
    if len(state["cut"]) != 3 or not all(type(number) is int and number > 0 for number in state["cut"]):
        return f"trainer_state.json has no plausible 'cut': {_short(state['cut'])}"
    window = state["window"].values()
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in window):
        return "trainer_state.json has no plausible 'window'"
    if {**state["files"], "trainer_state.json": manifest["trainer_state.json"]} != manifest:
        return "manifest.json and trainer_state.json do not name the same files with the same hashes"
    return _fault_of_guards(state["guards"])


def _fault_of_guards(guards: dict) -> str | None:
    numbers = guards.get("losses")
    if not isinstance(numbers, list) or not all(map(is_number, numbers)):
        return "trainer_state.json has no plausible 'guards'"
    for name in ("skipped", "skipped_in_row"):
        if type(guards.get(name)) is not int or guards[name] < 0:
            return f"trainer_state.json has no plausible guards: {name} {_short(guards.get(name))}"
    for name in ("first_loss", "best_accuracy", "train_accuracy"):
        if guards.get(name) is not None and not is_number(guards[name]):
            return f"trainer_state.json has no plausible guards: {name} {_short(guards[name])}"
    if not isinstance(guards.get("fired"), list) or not all(isinstance(name, str) for name in guards["fired"]):
        return "trainer_state.json has no plausible guards: fired"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------------
# Tensors


def fault_of_tensors(path: Path, state: dict, lm: LanguageModel, trainable: dict[str, Tensor]) -> str | None:
    """Against the model that is to go on. One tensor is in memory at a time."""
    try:
        return (
            _fault_of_weights(path, lm)
            or _fault_of_optimizer(path, state, trainable)
            or _fault_of_random(path, state["cut"][0])
        )
    except Exception as error:  # whatever is in the files
        return f"{type(error).__name__}: {error}"


def _fault_of_weights(path: Path, lm: LanguageModel) -> str | None:
    if lm.adapters is None:  # transformers may keep them under other names than the model has
        model, info = class_of(lm.model).from_pretrained(path, dtype=lm.head.weight.dtype, output_loading_info=True)
        absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        saved, own = model.state_dict(), lm.model.state_dict()
    else:
        saved, own, absent = load_file(path / WEIGHTS), adapter_state(lm.model, lm.adapters), []
    absent += sorted(own.keys() - saved.keys())
    if absent:
        return f"it lacks the weights {absent[0]}"
    for name, value in own.items():
        if saved[name].shape != value.shape:
            return f"{name} has the shape {tuple(saved[name].shape)}, expected {tuple(value.shape)}"
        if saved[name].is_floating_point() and not saved[name].isfinite().all():
            return f"{name} holds numbers that are not finite"
    return None


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def _fault_of_optimizer(path: Path, state: dict, trainable: dict[str, Tensor]) -> str | None:
    files = sorted(path.glob("optimizer-*.safetensors"))
    parts: dict[str, set[str]] = {}
    for key, value in _tensors(files):
        part, name = key.split(".", 1)
        if name not in trainable:
            return f"it has a state of {name}, which is not trained"
        parts.setdefault(name, set()).add(part)
        if part.startswith("exp_avg") and value.shape != trainable[name].shape:
            return f"{key} has the shape {tuple(value.shape)}, expected {tuple(trainable[name].shape)}"
        if value.is_floating_point() and not value.isfinite().all():
            return f"{key} holds numbers that are not finite"
        if part == "exp_avg_sq" and (value < 0).any():
            return f"{key} holds negative numbers"
        if part == "step" and not 1 <= value.item() <= state["step"]:
            return f"{key} is {value.item()}, after {state['step']} steps"
    if not parts:
        return "it has no states of the optimizer"
    for name, own in parts.items():  # bitsandbytes keeps other states for small tensors
        if "exp_avg" in set().union(*parts.values()) and own != {"step", "exp_avg", "exp_avg_sq"}:
            return f"the optimizer's states of {name} are {', '.join(sorted(own))}"
    return None


def _fault_of_random(path: Path, ranks: int) -> str | None:
    states = dict(_tensors([path / "rng.safetensors"]))
    expected = (ranks, torch.get_rng_state().numel())
    if "cpu" not in states or states["cpu"].dtype != torch.uint8 or tuple(states["cpu"].shape) != expected:
        return f"rng.safetensors does not hold the random states of {ranks} ranks"
    return None


def _fault_of_rows(path: Path) -> str | None:
    rows = dict(_tensors([path / "rows.safetensors"])).get("rows")
    return None if rows is not None and rows.ndim == 1 and rows.dtype == torch.int64 else "rows.safetensors has no rows"
