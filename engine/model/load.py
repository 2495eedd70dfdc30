"""Load and save a causal LM with its tokenizer; where and in which precision it computes."""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.config.text import TextSettings
from prefuse.engine.data.batches import Examples
from prefuse.engine.errors import UserError, fault_of
from prefuse.engine.hub import require_repository
from prefuse.engine.model.adapters import add_adapters, base_of, go_on_with, load_adapters, save_adapters
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.layers import prepare_layers, use_liger
from prefuse.engine.model.limits import check_rows
from prefuse.engine.model.router import router_and_weight
from prefuse.engine.model.sharding import LiveHead, shard, where_weights_are
from prefuse.engine.model.tokenizer import apply_settings, is_foreign, refuse_foreign
from prefuse.engine.run.files import file_faults_as_oserror
from prefuse.engine.run.ranks import ALONE, Ranks, whole_weights
from prefuse.models.flat import check_packing
from prefuse.models.head import Head
from prefuse.models.probes import check_padded_trunk
from prefuse.models.rope import hold_rope
from prefuse.models.trunk import UnsupportedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
SHARD_SIZE = "5GB"  # of a file of weights
WEIGHT_FILES = (*SAFETENSORS, "pytorch_model.bin", "pytorch_model.bin.index.json")


def device_of(config: Config) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL and fully_shard look
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {config.device} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 where the trunk and the head run under autocast, else the weights' dtype."""
    mixed = config.bf16
    if mixed is None:
        mixed = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if mixed else getattr(torch, config.dtype)


def load_tokenizer(
    path: str, settings: TextSettings | None = None, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer at `path`, with the chat template and the EOS that the settings want."""
    from transformers import AutoTokenizer

    base = base_of(Path(path))
    if base is not None and not any(Path(path).glob("tokenizer*")):
        path, base = base, None
    gguf = gguf_of(path, gguf_file or getattr(settings, "gguf_file", None))
    if base is None and not gguf:
        _require_model_folder(path)
    try:
        trust_remote_code = trust_remote_code or getattr(settings, "trust_remote_code", False)
        load = functools.partial(AutoTokenizer.from_pretrained, path, trust_remote_code=trust_remote_code, **gguf)
        tokenizer = load()
        if is_foreign(tokenizer):  # transformers takes it first; the folder may hold one of transformers' own as well
            own = load(mistral_format=False)
            tokenizer = own if getattr(own, "eos_token", None) is not None else tokenizer
    except Exception as error:  # whatever a file of another's making makes transformers do
        refuse_foreign(path)
        raise UserError(f"no tokenizer in {path}: {fault_of(error)}") from None
    refuse_foreign(path, tokenizer)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"no tokenizer in {path}: model_max_length in tokenizer_config.json must be a number, got "
            f"{tokenizer.model_max_length!r}"
        )
    if settings is not None:
        apply_settings(tokenizer, settings)
    return tokenizer


def load_model(
    path: str, config: Config, device: torch.device, ranks: Ranks = ALONE, *, trains: bool = False,
    read: "Callable[[str, Config], PreTrainedModel] | None" = None, make: type[LanguageModel] = LanguageModel,
) -> LanguageModel:  # fmt: skip
    """The model at `path`, or that of the adapters there; with `trains`, as the settings want it trained. `read` and
    `make`: another kind than a causal LM (engine/model/reward_model.py).

    It stays in eval mode for good. That turns dropout off wherever the model has it, in modules and in functional
    calls, for the policy as for the reference, without touching the config that is saved; gradients flow all the same.
    """
    folder, base = Path(path), base_of(Path(path))
    if base is not None:
        if trains and not config.use_peft:
            raise UserError(
                f"{path} holds adapters, and training of all weights starts from a whole model: give --use_peft true "
                "to go on with these adapters, or merge them into it first, "
                f"prefuse merge --model_name_or_path {path} --output_dir {path}-merged"
            )
        moved = config.base_model_name_or_path if path == config.model_name_or_path else None
        path = moved or base
    model = (_read_model if read is None else read)(path, config)
    _refuse_no_numbers(model, path)
    if trains:
        _with_gradients_through_4_bits(model)
    adapters = None
    if config.use_liger_kernel:
        use_liger(model, device)
    if base is not None:
        adapters = go_on_with(model, folder, config) if trains else load_adapters(model, folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = _generation_config(folder)
    elif trains and config.use_peft:
        adapters = add_adapters(model, config)
    router, coefficient = router_and_weight(model, config, trains)
    if trains:
        prepare_layers(model, config, device)
    model = model.eval() if ranks.sharded else model.to(device).eval()
    try:
        head = make.head_of(model)
    except UnsupportedModel as error:
        raise UserError(str(error)) from None
    dtype = compute_dtype(config, device)
    if ranks.sharded:
        model = shard(model, ranks, device, dtype)
    if ranks.sharded or adapters is not None:
        head = LiveHead(make.head_layer(model), head)
    return make(model, head, device, dtype, config.impl, adapters, config.gradient_tolerance, router, coefficient)


def _read_model(path: str, config: Config) -> "PreTrainedModel":
    """The whole causal LM of a folder or of the hub, in the settings' dtype."""
    from transformers import AutoModelForCausalLM

    gguf = gguf_of(path, config.gguf_file)
    if config.gguf_file is not None and not gguf and path == config.model_name_or_path:
        raise UserError(f"gguf_file {config.gguf_file} does not exist in {path}: give a name in that folder")
    model = read_weights(AutoModelForCausalLM, "a causal LM", path, config, **gguf)
    return _that_can_be_saved(model) if gguf else model


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Hides transformers' table of the weights that are new or left over: what is wrong there is said in one line."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def read_weights(auto: type, what: str, path: str, config: Config, new: str = "", **options) -> "PreTrainedModel":
    """The model of a folder or of the hub, by one of transformers' Auto classes. Weights whose names begin with `new`
    may be absent: transformers draws them."""
    if "gguf_file" not in options:
        _require_model_folder(path)
    try:
        with file_faults_as_oserror(), without_report():
            model, info = auto.from_pretrained(
                path,
                dtype=getattr(torch, config.dtype),
                output_loading_info=True,
                trust_remote_code=config.trust_remote_code,
                **options,
                **_in_4_bits(config),
            )
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"cannot load {what} from {path}: {fault_of(error)}") from None
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    absent = [name for name in absent if not (new and name.startswith(new))]
    if absent:
        raise UserError(
            f"the weights in {path} lack or misshape {len(absent)} tensors of {type(model).__name__} "
            f"({', '.join(absent[:3])}): expected {what.replace('a ', 'a whole ', 1)}, its head included"
        )
    return model


def _in_4_bits(config: Config) -> dict[str, object]:
    """transformers' argument for a base in 4 bits: products compute in the settings' dtype, heads stay whole."""
    if not config.load_in_4bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    wanted = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant, bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=["lm_head", "embed_out", "score", "classifier"],
    )  # fmt: skip
    return {"quantization_config": wanted}


def _with_gradients_through_4_bits(model: torch.nn.Module) -> None:
    """bitsandbytes (0.50) repacks a layer for inference on the CPU in its first pass in eval mode without gradient, and
    no gradient passes that form: after an evaluation nothing below the layer would learn."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _generation_config(folder: Path) -> "GenerationConfig":
    """What adapters were saved with: the tokens that end their answers."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"cannot read generation_config.json of {folder}: {fault_of(error)}") from None


def gguf_of(path: str, gguf_file: str | None) -> dict[str, str]:
    """transformers' argument for a folder in which the GGUF file stands; for another, none."""
    if gguf_file is None or not (Path(path) / gguf_file).is_file():
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf_file needs the package gguf: pip install gguf")
    return {"gguf_file": gguf_file}


def _that_can_be_saved(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model of the same weights: transformers saves none that it read from GGUF."""
    from transformers import AutoModelForCausalLM

    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    again = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    again.load_state_dict(model.state_dict())
    again.generation_config = model.generation_config
    return again


def check_model(lm: LanguageModel, examples: Examples) -> None:
    """Before the first step: the model can take the rows, and the fused head is the model's own."""
    check_rows(lm, examples)
    longest = examples.longest_sequence()
    for kind in dict.fromkeys(hold_rope(lm.model, len(longest))):
        logger.info(
            "The model's %s rotary embedding depends on the longest row of a batch; here every row gets that for the "
            "longest row of all, %d tokens",
            kind,
            len(longest),
        )
    probe = torch.tensor([longest[:64]], device=lm.device)
    try:
        # A sharded model's layers are gathered in the dtype they compute in, which only autocast brings together.
        # So are adapters, in float32 whatever the base has.
        mixed = hasattr(lm.model, "with_weights") or lm.adapters is not None
        with lm.autocast() if mixed else contextlib.nullcontext():
            where_weights_are(lambda lm: lm.check(probe))(lm)
    except (UnsupportedModel, RuntimeError) as error:  # RuntimeError: an impl that cannot run here
        raise UserError(str(error)) from None
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{type(lm.model).__name__} cannot run with its config.json: {fault_of(error)}") from None


def without_padding(examples: Examples, models: Sequence[LanguageModel], config: Config) -> Examples:
    """`examples` for flat batches, if all models take them (each compared with itself), else as they are."""
    if config.padding_free is False:
        return _with_padding(examples, models)
    for lm in models:
        try:
            with lm.autocast():
                where_weights_are(lambda lm: check_packing(lm.model))(lm)
        except UnsupportedModel as error:
            if config.padding_free:
                raise UserError(f"{error}; set padding_free to false") from None
            logger.warning("%s. Batches are padded, and prompts run once for each completion", error)
            return _with_padding(examples, models)
    return dataclasses.replace(examples, padding_free=True)


def _with_padding(examples: Examples, models: Sequence[LanguageModel]) -> Examples:
    """`examples` as they are, if padding changes no row of any of the models."""
    for lm in models:
        try:
            with lm.autocast():
                where_weights_are(lambda lm: check_padded_trunk(lm.model))(lm)
        except UnsupportedModel as error:
            raise UserError(str(error)) from None
    return examples


def check_same_vocabulary(lm: LanguageModel, ref: LanguageModel, config: Config) -> int:
    """How many tokens both models have; UserError where the same id may mean another token.

    Heads are padded to rounder sizes: one model may have more rows beyond the tokenizer's last id than the other.
    """
    own, theirs = lm.head.weight.shape[0], ref.head.weight.shape[0]
    how = {"trust_remote_code": config.trust_remote_code, "gguf_file": config.gguf_file}
    tokens = load_tokenizer(config.model_name_or_path, **how).get_vocab()
    try:
        others = load_tokenizer(config.ref_model_name_or_path, **how).get_vocab()
    except UserError:  # a folder with weights alone
        others = None
    if own != theirs and (others != tokens or max(tokens.values()) >= min(own, theirs)):
        raise UserError(
            f"the model has {own} tokens and the reference {theirs}: expected two models with the same tokenizer"
        )
    if others is not None and others != tokens:
        different = len(tokens.items() ^ others.items())
        logger.warning(
            "the tokenizers of model and reference differ in %d entries; rows are read with the model's own, and the "
            "reference is asked about the same ids", different,
        )  # fmt: skip
    return min(own, theirs)


def first_rows(head: Head, tokens: int) -> Head:
    """The head over the first `tokens` tokens: without rows of padding."""
    bias = None if head.bias is None else head.bias[:tokens]
    return Head(head.weight[:tokens], bias, head.softcap, head.logit_scale)


def trained_weights(lm: LanguageModel, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The weights that `save_model` writes, on the CPU of the main rank: the whole model's, or the adapters' alone."""
    return whole_weights(lm.model, ranks, trained_only=lm.adapters is not None)


def save_model(
    lm: LanguageModel, tokenizer: "PreTrainedTokenizerBase", folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    """Safetensors weights, config and tokenizer: what `from_pretrained(folder)` reads, peft's with adapters."""
    with file_faults_as_oserror():
        if lm.adapters is None:
            lm.model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
        else:
            save_adapters(lm.adapters, folder, weights)
            if (
                getattr(lm.model, "generation_config", None) is not None
            ):  # peft leaves it out; it says where answers stop
                lm.model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _refuse_no_numbers(model: torch.nn.Module, path: str) -> None:
    wrong = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if wrong:
        raise UserError(
            f"the weights in {path} are not finite (NaN or infinity) in {len(wrong)} tensors ({', '.join(wrong[:3])}): "
            "expected a model that was saved whole, before it diverged"
        )


def _require_model_folder(path: str) -> None:
    """A path that exists must be a whole model; any other name must be one of the hub."""
    require_repository(path)
    folder = Path(path)
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no model folder: expected config.json in it")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"model folder {path} has no weights: expected {' or '.join(SAFETENSORS)} beside config.json")
