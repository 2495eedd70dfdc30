"""TRL's DPOTrainer and KTOTrainer on flat batches: their configs, data sets and logged names, this library's losses.

    from prefuse.trl import DPOTrainer

    DPOTrainer("path/to/model", args=DPOConfig(output_dir="out"), train_dataset=dataset).train()

What is TRL's stays TRL's: tokenization, the reference model, adapters, the loop, saving. What changes is a microbatch's
way to its loss: `[prompt | chosen | rejected]` in one row without padding, the head fused with the log-softmax, losses
from `prefuse.losses`, reference numbers kept per row, KTO's mismatches drawn per optimizer step, and metrics reduced
once per log line. Options that do not fit this are refused by name at construction.

N completion tokens of S sequences in a microbatch.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

import prefuse
from prefuse.losses.contract import Loss, is_batchwise, needs_of
from prefuse.losses.names import loss_from
from prefuse.mismatches import pair_mismatches
from prefuse.trl.base import FusedTrainer, changed, check_trainer_loss, has_adapters, loss_of_config, trl
from prefuse.trl.batches import Microbatch, TokenizedRow

# ---------------------------------------------------------------------------------------------------------
# DPO and its like


class DPOTrainer(FusedTrainer, trl.DPOTrainer):
    """`trl.DPOTrainer` on flat batches; takes its arguments, and a few more.

    Args:
        loss: any loss over pairs that `prefuse.linear_preference_loss` takes, instead of `args.loss_type`, which may
            name those of prefuse beside TRL's "sigmoid", "ipo" and "sft", or several with `args.loss_weights`. With
            "sigmoid", `args.label_smoothing` is cDPO's (TRL ignores it there).
        padding_free: False pads, as TRL does; a model that takes no flat batches is padded with a warning.
        workspace: bytes that may be kept from forward to backward, see `prefuse.linear_preference_loss`.
        gradient_tolerance: the share of the gradient's mass that the head's backward may skip, see
            `prefuse.linear_logprobs`; the measured share is logged as "head/skipped_mass".

    Raises ValueError for what cannot be had: see docs/trl_trainers.md.
    """

    OUTPUTS = ("entropy", "mean_logits", "is_top1")
    CONFIG = trl.DPOConfig

    def __init__(
        self, *args, loss: Loss | None = None, padding_free: bool = True, workspace: int | None = None,
        gradient_tolerance: float = 0.0, **kwargs,
    ):  # fmt: skip
        given = self._start(args, kwargs, padding_free, workspace, gradient_tolerance)
        config = given["args"]
        self._terms = self._terms_of(loss, config)
        self._weighs = config.use_weighting
        if self._weighs:
            self._check_weighting()
        # An SFT term trains without a reference, but where it stands alone TRL logs rewards all the same.
        preferences = [term for _, term in self._terms if term.per != "token"]
        self._uses_reference = not preferences or any("reference" in needs_of(term) for term in preferences)
        # `padding_free` means nothing to TRL any more, and it would say so.
        with changed(config, padding_free=False, **self._reference_flags(given)):
            super().__init__(**given)
        self.precompute_ref_logps = config.precompute_ref_log_probs
        self._finish()

    def _terms_of(self, loss: Loss | None, config: trl.DPOConfig) -> list[tuple[float, Loss]]:
        """(weight, loss) of each part of the mixture."""
        if loss is not None:
            if config.loss_type != ["sigmoid"] or _dpo_variant(config):
                raise ValueError(f"got both loss={loss!r} and loss_type={config.loss_type}: expected one of them")
            check_trainer_loss(loss, "pair", {"reference"}, "DPOTrainer")
            return [(1.0, loss)]
        terms = [_dpo_variant(config) or loss_of_config(name, config) for name in config.loss_type]
        for term in terms:
            if term.per != "token":
                check_trainer_loss(term, "pair", {"reference"}, "DPOTrainer")
        weights = config.loss_weights or [1.0] * len(terms)
        return list(zip(weights, terms, strict=True))

    def _check_weighting(self) -> None:
        unfit = [type(term).__name__ for _, term in self._terms if term.per != "pair" or is_batchwise(term)]
        if unfit:
            raise ValueError(f"use_weighting=True weighs losses pair by pair, and {unfit[0]} is none: leave one out")
        self.OUTPUTS = (*self.OUTPUTS, "log_sum_sq_probs")

    def _before_policy(self, batch: Microbatch) -> tuple[Tensor | None, None]:
        return (self._reference(batch.rows, batch.tokens) if self._uses_reference else None), None

    def _loss(
        self, logps: Tensor, extra: dict[str, Tensor], ref_logps: Tensor | None, z0: None, batch: Microbatch
    ) -> tuple[Tensor, dict]:
        total, metrics, weights = torch.zeros((), device=logps.device), None, None
        if self._weighs:
            weights = prefuse.wpo_weights(logps, extra["log_sum_sq_probs"], batch.tokens.cu_seqlens)
        for weight, loss in self._terms:
            if loss.per == "token":  # SFT, of the chosen side
                value = -torch.where(batch.preferred, logps, 0.0).sum() / batch.preferred.sum()
            else:
                out = self._pairs(logps, ref_logps, batch, loss, weights)
                value, metrics = out.loss, out.metrics if metrics is None else metrics
            total = total + weight * value
        if metrics is None:  # SFT alone; rewards are still worth a look
            metrics = self._pairs(logps.detach(), ref_logps, batch, prefuse.DPO(beta=self.beta)).metrics
        return total, metrics

    def _pairs(
        self, logps: Tensor, ref_logps: Tensor | None, batch: Microbatch, loss: Loss, weights: Tensor | None = None
    ) -> prefuse.PreferenceOutput:
        ref_logps = ref_logps if "reference" in needs_of(loss) else None
        return prefuse.preference_loss(logps, ref_logps, batch.tokens.cu_seqlens, loss, weights=weights)


def _dpo_variant(config: trl.DPOConfig) -> Loss | None:
    """The loss that `f_divergence_type` or `ld_alpha` makes of "sigmoid", if one of them is set."""
    variants = ["f_dpo"] if config.f_divergence_type != "reverse_kl" else []
    variants += ["ld_dpo"] if config.ld_alpha is not None else []
    if not variants:
        return None
    if len(variants) > 1 or config.loss_type != ["sigmoid"]:
        raise ValueError(
            f"f_divergence_type and ld_alpha are computed for loss_type sigmoid, one of them at a time, got loss_type "
            f"{config.loss_type}, f_divergence_type {config.f_divergence_type!r} and ld_alpha {config.ld_alpha}: drop "
            "one, or use trl.DPOTrainer"
        )
    return loss_from(config, variants[0])


# ---------------------------------------------------------------------------------------------------------
# KTO


class KTOTrainer(FusedTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer` on flat batches with KTO's sampling as its paper has it; takes its arguments, and a few more.

    Args:
        loss: any loss over single sequences that `prefuse.linear_preference_loss` takes and that needs labels (KTO, or
            one of your own), instead of what `args.loss_type` ("kto", or "apo_zero_unpaired": z0 = 0) says.
        sampling: "shuffled" shuffles the rows every epoch, pairs each prompt of an optimizer step with the completion
            of another one (never of the same prompt), and takes one z0 for the step, over its microbatches and ranks,
            so a microbatch of one row will do. "trl" is TRL's way: rows in their order, each with the completion before
            it in its microbatch, whatever its prompt, and a z0 for each microbatch.
        padding_free, workspace, gradient_tolerance: see `DPOTrainer`.

    Raises ValueError for what cannot be had: see docs/trl_trainers.md.
    """

    OUTPUTS = ("entropy", "mean_logits")
    CONFIG = trl.KTOConfig

    def __init__(
        self, *args, loss: Loss | None = None, sampling: Literal["shuffled", "trl"] = "shuffled",
        padding_free: bool = True, workspace: int | None = None, gradient_tolerance: float = 0.0, **kwargs,
    ):  # fmt: skip
        given = self._start(args, kwargs, padding_free, workspace, gradient_tolerance)
        config = given["args"]
        if sampling not in ("shuffled", "trl"):
            raise ValueError(f'sampling must be "shuffled" or "trl", got {sampling!r}')
        if config.loss_type not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f'loss_type must be "kto" or "apo_zero_unpaired", got {config.loss_type!r}')
        if loss is not None:
            check_trainer_loss(loss, "sequence", {"reference", "labels", "z0"}, "KTOTrainer")
            if config.loss_type != "kto":
                raise ValueError(f"got both loss={loss!r} and loss_type={config.loss_type!r}: expected one of them")
        self._term = loss or loss_of_config("kto", config)
        needs = needs_of(self._term)
        self._uses_reference, self._uses_z0 = "reference" in needs, "z0" in needs
        self._draws_z0, self._sampling = self._uses_z0 and config.loss_type == "kto", sampling
        flags = self._reference_flags(given)
        if sampling == "shuffled":
            self._check_reference_stays(given, config)
            flags["loss_type"] = "apo_zero_unpaired"  # so that TRL neither pairs completions nor insists on their order
            if config.train_sampling_strategy == "sequential":  # KTOConfig's default, for TRL's pairs
                config.train_sampling_strategy = "random"
        with changed(config, **flags):
            super().__init__(**given)
        self.loss_type = config.loss_type
        self.precompute_ref_logps = config.precompute_ref_log_probs
        self._finish()

    def _check_reference_stays(self, given: dict[str, Any], config: trl.KTOConfig) -> None:
        stays = given.get("ref_model") is not None or given.get("peft_config") is not None
        stays = stays or has_adapters(given["model"])
        if config.precompute_ref_log_probs and self._draws_z0 and self._uses_reference and not stays:
            raise ValueError(
                "precompute_ref_log_probs=True lets the reference go, but mismatched completions are drawn anew in "
                'every step: set it to False, give ref_model or peft_config, or sampling="trl"'
            )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """An optimizer step's microbatches, with the z0 they share."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._draws_z0 and self._sampling == "shuffled" and samples:
            z0 = self._drawn_z0([row for inputs in samples for row in inputs["batch"].rows], keep=False)
            samples = [inputs | {"batch": replace(inputs["batch"], z0=z0)} for inputs in samples]
        return samples, num_items

    def _drawn_z0(self, rows: list[TokenizedRow], keep: bool) -> Tensor:  # ()
        partners = pair_mismatches([row.prompt for row in rows])
        if None in partners and self._group is None:
            warnings.warn(
                f"all {len(rows)} row(s) of a step have the same prompt, so there is no mismatched completion to "
                "estimate KTO's reference point from: z0 is 0 there. Take more rows to a step",
                stacklevel=2,
            )
        pairs = [(row, rows[other]) for row, other in zip(rows, partners, strict=True) if other is not None]
        cut = self._collate.cut
        return self._z0(
            [TokenizedRow(row.prompt, [cut(row.prompt, other.completions[0])]) for row, other in pairs], keep
        )

    def _z0(self, mismatched: list[TokenizedRow], keep: bool) -> Tensor:  # ()
        """Over these completions of other prompts and those of the other ranks, a microbatch at a time.

        `keep`: whether the same rows will come again, so that the cache is to have them.
        """
        device, size = self.accelerator.device, self.args.per_device_train_batch_size
        none = torch.empty(0, device=device)
        logps, ref_logps, counts = [none], [none], []
        for start in range(0, len(mismatched), size):
            batch = self._collate.batch(mismatched[start : start + size]).to(device)
            rows, tokens = batch.rows, batch.tokens
            if self._uses_reference:
                ref_logps.append(self._reference(rows, tokens) if keep else self._reference_pass(tokens))
            logps.append(self._quiet(self.model, tokens))
            counts += [row.lengths[0] for row in rows]
        cu_seqlens = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device)
        reference = torch.cat(ref_logps) if self._uses_reference else None
        return prefuse.kto_reference_point(torch.cat(logps), reference, cu_seqlens, group=self._group)

    def _before_policy(self, batch: Microbatch) -> tuple[Tensor | None, Tensor | float | None]:
        ref_logps = self._reference(batch.rows, batch.tokens) if self._uses_reference else None
        if not self._draws_z0:
            return ref_logps, 0.0 if self._uses_z0 else None
        if batch.z0 is not None:
            return ref_logps, batch.z0
        if self._sampling == "shuffled":  # an evaluation's batch
            return ref_logps, self._drawn_z0(batch.rows, keep=True)
        return ref_logps, self._z0(_paired(batch), keep=True)

    def _precompute(self, batch: Microbatch) -> None:
        super()._precompute(batch)
        if self._draws_z0 and self._sampling == "trl":
            mismatched = self._collate.batch(_paired(batch)).to(self.accelerator.device)
            self._reference(mismatched.rows, mismatched.tokens)

    def _loss(
        self,
        logps: Tensor,
        extra: dict[str, Tensor],
        ref_logps: Tensor | None,
        z0: Tensor | float | None,
        batch: Microbatch,
    ) -> tuple[Tensor, dict]:
        labels = batch.labels if "labels" in needs_of(self._term) else None
        out = prefuse.preference_loss(logps, ref_logps, batch.tokens.cu_seqlens, self._term, labels, z0)
        return out.loss, out.metrics


def _paired(batch: Microbatch) -> list[TokenizedRow]:
    """The mismatched rows that TRL has chosen."""
    return [TokenizedRow(row.prompt, [row.other]) for row in batch.rows]
