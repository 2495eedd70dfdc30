"""LoRA by peft: a few matrices are trained beside the model's own, which stay as they are.

    prefuse train --use_peft true --lora_r 16 --lora_alpha 32 ...

The reference is the same model with its adapters off, so no second one is in memory. The head has no adapters and is
frozen, so forward and backward are 2 passes over the vocabulary, not 4. What a run writes are the adapters alone, as
peft writes them: `PeftModel.from_pretrained(base, run)` reads them, and so do `prefuse eval` and `prefuse generate`.

peft puts its layers into the model in place. So `LanguageModel.model` stays the transformers model, whose trunk and
head are where they were; the PeftModel around it is asked for names and files only.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapted_linear import adapted_linear
from prefuse.engine.run.files import file_faults_as_oserror
from prefuse.models.trunk import class_of

if TYPE_CHECKING:
    from peft import PeftModel

ABOUT = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the transformers model's names inside a PeftModel


def add_adapters(model: nn.Module, config: Config) -> PeftModel:
    """Fresh adapters, which change nothing yet, in float32; all other weights are frozen.

    Drawn from the seed alone, on the CPU: every rank has the same.
    """
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, config)
    wanted = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=None if config.lora_target_modules else _never_called(model),
        modules_to_save=config.lora_modules_to_save,
        task_type=task_of(model),
    )
    if Path(model.name_or_path).exists():  # the adapters will be read from elsewhere
        model.name_or_path = str(Path(model.name_or_path).absolute())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            with quiet():
                adapters = get_peft_model(model, wanted)
        except (ValueError, TypeError) as error:  # no module of such a name, or none that LoRA knows
            raise UserError(f"lora_target_modules or lora_modules_to_save: {error}") from None
    head = model.get_output_embeddings()
    if head is not None and any(name.startswith("lora_") for name, _ in head.named_modules()):
        name = next(name for name, module in model.named_modules() if module is head)
        raise UserError(
            f"LoRA on the head ({name}) would be left out of the fused loss: take it from lora_target_modules, or put "
            "it into lora_modules_to_save, which trains it whole"
        )
    _drop_only_where_gradients_are_taken(model)
    _scale_between_the_matrices(model)
    _in_float32(model)
    return adapters


MIXERS = ("Mamba", "FalconH1Mixer")  # in the names of their classes


def task_of(model: nn.Module) -> str:
    """peft's name. With the second and third it trains the score head whole and saves it with the adapters."""
    if model.get_output_embeddings() is not None:
        return "CAUSAL_LM"
    return "SEQ_CLS" if "ForSequenceClassification" in class_of(model).__name__ else "TOKEN_CLS"


def _never_called(model: nn.Module) -> list[str] | None:
    """The names of linear layers that are not called as `layer(x)`: adapters around them would fail, or never run.

    These are layers with a forward of their own (routers, grouped projections), and layers whose weights Mamba's
    kernels read directly.
    """
    own = lambda m: isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward  # noqa: E731
    names = [
        name
        for name, module in model.named_modules()
        if own(module) and type(module).__module__.startswith("transformers.models.") and not _is_plain(module)
    ]
    mixers = [name for name, module in model.named_modules() if any(kind in type(module).__name__ for kind in MIXERS)]
    names += [f"{mixer}.{inner}" for mixer in mixers for inner in ("out_proj", "conv1d")]
    names += ["score"] if task_of(model) == "TOKEN_CLS" else []  # trained whole; peft itself leaves out that of SEQ_CLS
    return names or None


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Whether its own forward, tried on two rows, is that of a linear layer: Falcon's is."""
    x = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).to(layer.weight)
    try:
        got, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    except Exception:  # of layers that take more than x, or x of another shape
        return False
    return isinstance(got, torch.Tensor) and got.shape == expected.shape and torch.allclose(got, expected, 1e-2, 1e-3)


def _targets(model: nn.Module, config: Config) -> list[str] | str:
    """Names of modules, or one pattern. peft passes over a name that no module has where another one is found."""
    paths = [f".{path}" for path, _ in model.named_modules()]
    unknown = lambda names: [n for n in names or () if not any(path.endswith(f".{n}") for path in paths)]  # noqa: E731
    targets = config.lora_target_modules or ["all-linear"]
    if len(targets) == 1 and unknown(targets):
        targets = targets[0]  # a pattern, which peft checks
    for setting, names in ("lora_target_modules", targets), ("lora_modules_to_save", config.lora_modules_to_save):
        if isinstance(names, list) and unknown(names):
            raise UserError(f"{setting}: no module of the model is called {', '.join(unknown(names))}")
    return targets


def go_on_with(model: nn.Module, folder: Path, config: Config) -> PeftModel:
    """The adapters in `folder`, to be trained further; everything else is frozen. Their shape is their own."""
    adapters = load_adapters(model, folder, trains=True)
    own = adapters.active_peft_config
    for name, value in ("lora_r", own.r), ("lora_alpha", own.lora_alpha), ("lora_dropout", own.lora_dropout):
        given = getattr(config, name)
        if given not in (value, type(config).__dataclass_fields__[name].default):
            raise UserError(f"{name} is {given}, but the adapters in {folder} have {value:g}: drop {name}")
    _drop_only_where_gradients_are_taken(model)
    _scale_between_the_matrices(model)
    return adapters


@torch.no_grad()
def load_adapters(model: nn.Module, folder: Path, trains: bool = False) -> PeftModel:
    """The adapters in `folder`, in the model that they were made for."""
    from peft import PeftModel
    from safetensors.torch import load_file

    made_for = json.loads((folder / ABOUT).read_text(encoding="utf-8")).get("task_type")
    if made_for not in (None, task_of(model)):
        raise UserError(
            f"{folder} holds adapters for {made_for}, and this command takes {task_of(model)}: merge them into their "
            "base first (prefuse merge)"
        )
    try:
        with quiet(), file_faults_as_oserror():
            adapters = PeftModel.from_pretrained(model, folder, is_trainable=trains)
        _in_float32(model)
        saved = load_file(folder / WEIGHTS)  # again: what was read into bfloat16 has lost its digits
        for name, value in adapter_state(model, adapters).items():
            value.copy_(saved[name])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"cannot put the adapters of {folder} into its base model: {error}") from None
    return adapters


def base_of(folder: Path) -> str | None:
    """The base model of a folder with adapters, None for any other."""
    if not (folder / ABOUT).is_file():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        base = about["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / ABOUT}: {error!r}") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ABOUT} does not say what its base model is: expected base_model_name_or_path")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter folder {folder} has no weights: expected {WEIGHTS} beside {ABOUT}")
    return base


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, while in the block.

    peft's own switch also takes requires_grad from the adapters, which a sharded model reads once, in its first
    forward: they would never get a gradient.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def adapter_state(model: nn.Module, adapters: PeftModel) -> dict[str, Tensor]:
    """The adapters' own tensors (DTensors where the model is sharded) by the names they have in adapter_model."""
    from peft import get_peft_model_state_dict

    state = {PREFIX + name: value for name, value in model.state_dict().items()}
    return get_peft_model_state_dict(adapters, state_dict=state, save_embedding_layers=False)


def save_adapters(adapters: PeftModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """What `PeftModel.from_pretrained` reads. `weights`: whole, by the names in the transformers model."""
    state = {PREFIX + name: value for name, value in weights.items()}
    adapters.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty template; the run writes its own


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its adapters, by the names that it has there."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.state_dict().items()
        if not _of_adapters(name)
    }


def state_in_force(model: nn.Module) -> dict[str, Tensor]:
    """The state of what computes now: with adapters off, or where there are none, that of the base model."""
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    return base_state(model) if all(layer.disable_adapters for layer in layers) else model.state_dict()


def _of_adapters(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _in_float32(model: nn.Module) -> None:
    """Casts all that is trained to float32. (peft casts its own matrices, but not modules that are trained whole.)"""
    for name, p in model.named_parameters():
        if _of_adapters(name):
            p.data = p.data.float()


@contextmanager
def quiet() -> Iterator[None]:
    """Hides FutureWarnings about how peft uses transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class _Dropout(nn.Dropout):
    """Drops in the passes that gradients are taken of, and in no other.

    The model is in eval mode for good, which turns all of its own dropout off; evaluations, the reference and KTO's z0
    have no gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=torch.is_grad_enabled())


def _drop_only_where_gradients_are_taken(model: nn.Module) -> None:
    for module in model.modules():
        drops = getattr(module, "lora_dropout", None)
        for name, drop in drops.items() if isinstance(drops, nn.ModuleDict) else ():
            if isinstance(drop, nn.Dropout):
                drops[name] = _Dropout(drop.p)


def _scale_between_the_matrices(model: nn.Module) -> None:
    """Trained adapters scale the r numbers between their matrices, not the layer's whole output: y = W x + B (s A x).

    That takes two passes over memory less in each direction. Where s is a power of two the bits are those of peft's
    y = W x + s (B A x); elsewhere peft computes, so that they are always its own.
    """
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.forward = functools.partial(_lora_forward, layer, layer.forward)


def _lora_forward(layer: nn.Module, peft_forward: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    """`peft_forward` of a LoRA layer, with less memory passed where its one plain adapter is on."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or layer.lora_variant)
    if not plain or len(names) != 1 or math.frexp(layer.scaling[names[0]])[0] != 0.5:
        return peft_forward(x, *args, **kwargs)
    base, first, second, drop, scaling = (
        layer.base_layer,
        *(getattr(layer, part)[names[0]] for part in ("lora_A", "lora_B", "lora_dropout", "scaling")),
    )
    one_dtype = x.dtype == base.weight.dtype == first.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    frozen = not any(p.requires_grad for p in base.parameters())
    if one_dtype and frozen and second.bias is None and isinstance(drop, nn.Identity):
        return adapted_linear(x, base.weight, base.bias, first.weight, second.weight, scaling)
    result = base(x)
    added = second(first(drop(layer._cast_input_dtype(x, first.weight.dtype))) * scaling)
    # In place: the gradient of a linear layer needs its input and weight alone.
    return result.add_(added) if added.dtype == result.dtype else (result + added).to(result.dtype)
