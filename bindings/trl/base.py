"""What the trainers for TRL share: the way of a microbatch through the model, the reference, the metrics, the refusals.

`FusedTrainer` stands before one of TRL's trainers among the bases of a class, and takes over what lies between the
tokenized rows and the loss: see `trainers`, which adds the losses. N completion tokens in a microbatch.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import prefuse
from prefuse.kernels import HeadOptions
from prefuse.kernels.checks import check_tolerance
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.names import loss_from
from prefuse.models.flat import check_packing, completion_hidden
from prefuse.models.head import check_head, head_of
from prefuse.models.probes import check_padded_trunk
from prefuse.models.rope import batch_dependent_ropes
from prefuse.models.trunk import UnsupportedModel
from prefuse.packing import Packed, Padded
from prefuse.preference import WORKSPACE
from prefuse.trl.batches import Collator, Microbatch, MicrobatchMetrics, ReferenceCache, TokenizedRow, counted


def _require_trl() -> None:
    wanted = "the trainers of prefuse for TRL need TRL 1.16 or later, below 2: pip install 'trl>=1.16,<2'"
    try:
        have = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"{wanted} (it is not installed)") from None
    if not (1, 16) <= tuple(int(part) for part in have.split(".")[:2]) < (2, 0):
        raise ImportError(f"{wanted} (this is TRL {have})")


_require_trl()

import trl  # noqa: E402, F401 (from here it comes to `trainers`, once it is known to be there)
from trl.trainer.utils import use_adapter  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# Losses by name


def loss_of_config(name: str, config: Any) -> Loss:
    """The loss of this name, its hyperparameters those of TRL's config."""
    # In TRL "sft" is a mean over all tokens of a microbatch.
    return prefuse.SFT() if name == "sft" else loss_from(config, name)


def check_trainer_loss(loss: Any, per: str, brings: set[str], trainer: str) -> None:
    """Raises unless it is a loss over what the trainer's rows are, and needs nothing but what they bring."""
    needs = needs_of(loss)
    if loss.per != per:
        raise ValueError(f"{type(loss).__name__} is a loss per {loss.per}: {trainer} takes losses per {per}")
    if needs - brings:
        missing = ", ".join(sorted(needs - brings))
        raise ValueError(f"{type(loss).__name__} needs {missing}, which the rows of {trainer} do not bring")


# ---------------------------------------------------------------------------------------------------------
# Models and configs for a while


def callable_inside(model: nn.Module) -> None:
    """Lets `model(prefuse=f)` be `f(model)`, run within all that wraps the model: adapters, DDP, autocast.

    A head that is called beside its model goes past the hooks of DDP, and the ranks drift apart.
    """
    if getattr(model, "_prefuse_inside", False):
        return
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, prefuse: Callable[[nn.Module], Any] | None = None, **kwargs):
        return original(*args, **kwargs) if prefuse is None else prefuse(self)

    model.forward = types.MethodType(forward, model)
    model._prefuse_inside = True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout and gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def changed(config: Any, **flags) -> Iterator[None]:
    """`config` with other values, for as long as TRL looks at it."""
    before = {name: getattr(config, name) for name in flags}
    for name, value in flags.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Takes accelerate's wrapper off the forward for a while: it runs in autocast and casts the result to float32."""
    wrapped = model.__dict__.pop("forward")
    try:
        yield
    finally:
        model.forward = wrapped


def _base_of(model: nn.Module) -> nn.Module:
    """The causal LM itself, adapters aside."""
    return model.get_base_model() if has_adapters(model) else model


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


# ---------------------------------------------------------------------------------------------------------
# The trainer


class FusedTrainer:
    """Stands before TRL's trainer class: collation, reference, the pass to the log-probabilities, metrics."""

    OUTPUTS: tuple[str, ...]  # what the head gives beside the log-probabilities
    CONFIG: type
    _uses_reference: bool

    def _start(
        self, positional: tuple, named: dict, padding_free: bool, workspace: int | None, gradient_tolerance: float
    ) -> dict[str, Any]:
        """TRL's arguments by name, once it is known that all of them can be honoured."""
        given = dict(inspect.signature(super().__init__).bind(*positional, **named).arguments)
        model = given.get("model")
        if given.get("args") is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            given["args"] = self.CONFIG(f"{path.split('/')[-1]}-{self._name}")
        self._refuse(given, given["args"])
        check_tolerance(gradient_tolerance)
        # TRL builds everything else in its own __init__, which may already ask for reference numbers.
        self._collate = Collator(given["args"].max_length, flat=padding_free)
        self._workspace = WORKSPACE if workspace is None else workspace
        self._tolerance = gradient_tolerance
        self._cache = ReferenceCache()
        self._rope_follows_batch = False  # then a row's reference numbers hold in its own batch alone
        self._window = {"train": MicrobatchMetrics(), "eval": MicrobatchMetrics()}
        self._checked: list[nn.Module] = []
        return given | {"data_collator": self._collate}

    def _finish(self) -> None:
        """After TRL's own __init__."""
        self._refuse_setting()
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)  # trained on, by this rank
        for model in filter(None, (self.model, self.ref_model)):
            self._ready(model)

    def _refuse(self, given: dict[str, Any], args: Any) -> None:
        """Raises for what TRL would take and this trainer cannot."""
        refused = {
            "data_collator": (given.get("data_collator"), "batches are flat, so they have a collator of their own"),
            "compute_metrics": (given.get("compute_metrics"), "it reads logits, which do not exist here"),
            "use_liger_kernel=True": (args.use_liger_kernel, "it is deprecated; the head is fused anyway"),
            "sync_ref_model=True": (args.sync_ref_model, "reference numbers are computed once for each row"),
            "torch_compile=True": (args.torch_compile, "the head's pass is no part of the compiled graph"),
            "dispatch_batches=True": (args.accelerator_config.dispatch_batches, "batches are objects, not tensors"),
            'truncation_mode="keep_end"': (
                getattr(args, "truncation_mode", "keep_start") != "keep_start",
                'it gives the sides of a pair two prompts; use "keep_start"',
            ),
        }
        for name, (present, reason) in refused.items():
            if present:
                raise ValueError(f"{self._title} does not take {name}: {reason}. Leave it out, or use {self._trls}")

    def _refuse_setting(self) -> None:
        """`_refuse` for what is known only after TRL has processed its arguments."""
        adapters = getattr(self.model, "peft_config", {}) if has_adapters(self.model) else {}
        refused = {
            "vision-language models": self._is_vlm or self._is_vision_dataset,
            "FSDP (prefuse train --parallel fsdp does)": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "tensor or context parallelism": self.accelerator.parallelism_config is not None,
            "prompt learning (adapters that prepend tokens)": any(c.is_prompt_learning for c in adapters.values()),
            "the router loss of mixtures of experts (router_aux_loss_coef=0.0 turns it off)": self.aux_loss_enabled,
        }
        for name, present in refused.items():
            if present:
                raise ValueError(f"{self._title} does not take {name}: use {self._trls}")

    @property
    def _title(self) -> str:
        return f"prefuse's {type(self).__name__}"

    @property
    def _trls(self) -> str:
        return f"trl.{self.CONFIG.__name__.removesuffix('Config')}Trainer"

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    # ------------------------------------------------------------------------------------------- models

    def _ready(self, model: nn.Module) -> nn.Module:
        """`model`, checked once: the fused head and flat batches must give the numbers of its own forward."""
        base = _base_of(model)
        if any(base is checked for checked in self._checked):
            return model
        callable_inside(base)
        self._checked.append(base)
        vocabulary = base.config.get_text_config().vocab_size
        probe = torch.randint(vocabulary, (1, 24), generator=torch.Generator().manual_seed(0)).to(base.device)
        with _evaluating(base):
            with _plain(base):
                check_head(base, probe)
            if self._collate.flat:
                self._check_flat(base)
            if not self._collate.flat:
                check_padded_trunk(base)
        self._rope_follows_batch |= any(True for _ in batch_dependent_ropes(base))
        return model

    def _check_flat(self, base: nn.Module) -> None:
        try:
            if not self.args.disable_dropout and getattr(base.config, "attention_dropout", 0.0):
                raise UnsupportedModel("flat batches have no attention dropout: leave disable_dropout at True")
            with self.accelerator.autocast():
                check_packing(base)
        except UnsupportedModel as error:
            self._collate.flat = False
            warnings.warn(f"{error}. Batches are padded, and prompts run once for each completion", stacklevel=2)

    def _log_probabilities(
        self, model: nn.Module, batch: Microbatch, ref_logps: Tensor | None, meter: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(N,) of the policy, with gradient, and what else its head tells of each token.

        Under a gradient_tolerance, `meter` is filled by the backward.
        """

        def run(base: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
            head, tokens = head_of(base), batch.tokens
            options = HeadOptions(head.softcap, head.logit_scale)
            hidden = completion_hidden(base, tokens)
            return logprobs_within(
                self._workspace, hidden, head.weight, tokens.targets, head.bias, options, self.OUTPUTS, "auto",
                gradient_tolerance=self._tolerance, guess=ref_logps, meter=meter,
            )  # fmt: skip

        with self.accelerator.autocast():
            return model(prefuse=run)

    def _quiet(self, model: nn.Module, tokens: Packed | Padded) -> Tensor:  # (N,)
        """Log-probabilities alone, without gradient. Bypasses DDP, so that ranks need not call it together."""

        def run(base: nn.Module) -> Tensor:
            head = head_of(base)
            hidden = completion_hidden(base, tokens)
            return prefuse.linear_logprobs(hidden, head.weight, tokens.targets, **head.options())

        with _evaluating(model), self.accelerator.autocast():
            return model(prefuse=run)

    # ---------------------------------------------------------------------------------------- reference

    def _reference(self, rows: Sequence[TokenizedRow], tokens: Packed | Padded) -> Tensor:  # (N,)
        """The reference's log-probabilities, from the cache where all rows are in it."""
        kept = None if self._rope_follows_batch else self._cache.get(rows)
        if kept is not None:
            return kept.to(tokens.targets.device)
        if self.precompute_ref_logps and not self._reference_at_hand:
            why = "a row came whose reference log-probabilities were not precomputed"
            if self._rope_follows_batch:
                why = "the model's rotary embedding depends on the longest row of a batch, so its numbers are not kept"
            raise RuntimeError(
                f"{why}, and the reference is gone: "
                "give its data set to the trainer at construction, or an explicit ref_model"
            )
        logps = self._reference_pass(tokens)
        self._cache.put(rows, logps)
        return logps

    def _reference_flags(self, given: dict[str, Any]) -> dict[str, bool]:
        """Settings with which TRL loads no reference model where the loss uses none."""
        if self._uses_reference:
            return {}
        if given.get("ref_model") is not None:
            raise ValueError("this loss uses no reference, so ref_model must be None")
        return {"precompute_ref_log_probs": True}

    @property
    def _reference_at_hand(self) -> bool:
        return self.ref_model is not None or has_adapters(self.model) or self._precomputing

    _precomputing = False

    def _reference_pass(self, tokens: Packed | Padded) -> Tensor:  # (N,)
        if self.ref_model is None and has_adapters(self.model):
            adapter = "ref" if "ref" in self.model.peft_config else None  # None: all of them off
            with use_adapter(self.model, adapter):
                return self._quiet(self._ready(self.model), tokens)
        return self._quiet(self._ready(self.ref_model or self.model), tokens)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """TRL adds columns of sums to the data set; here the numbers of each token go to the cache."""
        if not self._uses_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "precompute_ref_log_probs=True needs a data set with a length, got an IterableDataset: "
                "set precompute_ref_log_probs=False"
            )
        self._refuse_setting()
        self._ready(self.model)
        loader = DataLoader(
            dataset, batch_size, collate_fn=self._collate, num_workers=self.args.dataloader_num_workers, shuffle=False
        )
        self._precomputing = True
        try:
            for inputs in self.accelerator.prepare(loader):
                self._precompute(inputs["batch"])
        finally:
            self._precomputing = False
        self._cache.share(self._group)
        return dataset

    def _precompute(self, batch: Microbatch) -> None:
        self._reference(batch.rows, batch.tokens)

    # --------------------------------------------------------------------------------------------- steps

    def _compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool) -> Tensor:  # ()
        if return_outputs:
            raise ValueError(f"{self._title} has no logits to return: call compute_loss without return_outputs")
        mode = "train" if self.model.training else "eval"
        batch = inputs["batch"]
        ref_logps, z0 = self._before_policy(batch)
        meter = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        logps, extra = self._log_probabilities(model, batch, ref_logps, meter)
        loss, metrics = self._loss(logps, extra, ref_logps, z0, batch)
        metrics = metrics | {
            "entropy": counted(extra["entropy"]),
            "logits/chosen": counted(extra["mean_logits"], batch.preferred),
            "logits/rejected": counted(extra["mean_logits"], ~batch.preferred),
        }
        if "is_top1" in extra:
            metrics["mean_token_accuracy"] = counted(extra["is_top1"], batch.preferred)
        if self._tolerance > 0.0:
            metrics["head/skipped_mass"] = meter  # [0, 0], which nobody logs, until the backward has run
        self._window[mode].add(metrics)
        if mode == "train":
            self._tokens += inputs["num_tokens"].sum()
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        window = self._window[mode]
        if window.microbatches:
            self._cache.settle()
            means, self._total_train_tokens = window.take(self._tokens, self._group)
            self._metrics[mode] = defaultdict(list, num_tokens=[int(self._total_train_tokens)])
            for microbatch in means:
                for name, value in microbatch.items():
                    self._metrics[mode][name].append(value)
        super().log(logs, start_time)
