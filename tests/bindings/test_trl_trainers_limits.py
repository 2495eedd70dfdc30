"""Where trainers for TRL on flat batches run, what they save, and what they refuse by name."""

import copy
import importlib.metadata
import math
import re

import datasets
import pytest
import torch
import transformers
import trl
from peft import PromptTuningConfig

import prefuse
import trainer_runs
from prefuse.trl import base as trl_base
from prefuse.trl.batches import Collator
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import LABELLED, ROWS, assert_same_log, assert_same_weights, build, log_of, weights_of
from trl_trainer_cases import KINDS, LORA, Likelihood, _quiet, compare  # noqa: F401

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_loaded_without_this_library_and_a_run_goes_on(kind, models, tmp_path):
    _, ours, config, rows, _ = KINDS[kind]
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "per_device_train_batch_size": 3}
    whole = build(ours, models["llama"], rows, tmp_path / "whole", config, {}, **changes)
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-2"
    assert "prefuse" not in (saved / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.config._attn_implementation == "sdpa"

    resumed = build(ours, models["llama"], rows, tmp_path / "resumed", config, {}, **changes)
    resumed.train(resume_from_checkpoint=str(saved))
    # (Tokens are counted from the start of a process, as in TRL.)
    logs = [[{k: v for k, v in row.items() if k != "num_tokens"} for row in log_of(run)] for run in (resumed, whole)]
    assert_same_log(logs[0][2:5], logs[1][2:5])
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    whole.save_model(str(tmp_path / "end"))
    end = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert_same_weights(weights_of(end), weights_of(whole.model))


# ---- what it runs on -----------------------------------------------------------------------------


def test_half_precision_computes_and_float32_weights_learn(models, tmp_path):
    """Under bfloat16's autocast too, the policy is its reference until it has moved."""
    for ours, config, rows in (DPOTrainer, trl.DPOConfig, ROWS), (KTOTrainer, trl.KTOConfig, LABELLED):
        trainer = build(ours, models["llama"], rows, tmp_path, config, {}, bf16=True)
        trainer.train()
        first, *_, last = log_of(trainer)[:5]
        assert first["loss"] == pytest.approx(math.log(2) if ours is DPOTrainer else 0.5, abs=1e-7)
        assert first["rewards/chosen"] == 0.0
        assert last["loss"] < first["loss"]
        assert trainer.model.dtype == torch.float32


def test_batches_come_from_workers_and_from_streams(models, tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    logs = []
    for train, changes in (rows, {}), (rows, {"dataloader_num_workers": 1}), (rows.to_iterable_dataset(), {}):
        args = trainer_runs.arguments(
            trl.DPOConfig, tmp_path, train_sampling_strategy="sequential", max_steps=2, **changes
        )
        tokenizer = trainer_runs.tiny_tokenizer()
        trainer = DPOTrainer(models["llama"], args=args, train_dataset=train, processing_class=tokenizer)
        trainer.train()
        logs.append([{k: v for k, v in row.items() if k != "epoch"} for row in log_of(trainer)])
    assert_same_log(logs[1], logs[0])
    assert_same_log(logs[2][:2], logs[0][:2])


def test_predict_has_metrics_and_no_predictions(models, tmp_path):
    trainer = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {"eval_rows": ROWS[:4]})
    out = trainer.predict(trainer.eval_dataset)
    assert out.predictions is None
    assert out.metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="no logits to return"):
        trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)), return_outputs=True)


# ---- what it refuses -----------------------------------------------------------------------------


SETTINGS_REFUSED = {
    "use_liger_kernel=True": {"use_liger_kernel": True},
    "sync_ref_model=True": {"sync_ref_model": True},
    "torch_compile=True": {"torch_compile": True},
    "dispatch_batches=True": {"accelerator_config": {"dispatch_batches": True}},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in SETTINGS_REFUSED],
)
def test_settings_that_cannot_be_had_are_refused_by_name(kind, name, models, tmp_path):
    _, ours, config, rows, _ = KINDS[kind]
    changes = SETTINGS_REFUSED[name]
    with pytest.raises(
        ValueError, match=rf"prefuse's {ours.__name__} does not take {re.escape(name)}: .*trl\.{ours.__name__}"
    ):
        build(ours, models["llama"], rows, tmp_path, config, {}, **changes)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
def test_truncation_at_the_start_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match='does not take truncation_mode="keep_end": it gives the sides of a pair two'):
        build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {}, truncation_mode="keep_end")


def test_objects_that_cannot_be_had_are_refused_by_name(models, tmp_path):
    for name in "data_collator", "compute_metrics":
        with pytest.raises(ValueError, match=f"does not take {name}: "):
            build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {name: print})


REFUSED_LOSSES = [
    ({"loss": prefuse.DPO}, {}, TypeError, "loss must be an instance such as prefuse.DPO"),
    ({"loss": prefuse.KTO()}, {}, ValueError, "KTO is a loss per sequence: DPOTrainer takes losses per pair"),
    ({"loss": prefuse.SFT()}, {}, ValueError, "SFT is a loss per token: DPOTrainer takes losses per pair"),
    (
        {"loss": prefuse.IPO()},
        {"loss_type": "ipo"},
        ValueError,
        "got both loss=IPO.* and loss_type=.'ipo'.: expected one",
    ),
    ({}, {"loss_type": "ipo", "ld_alpha": 0.5}, ValueError, "ld_alpha are computed for loss_type sigmoid"),
    ({}, {"f_divergence_type": "forward_kl", "ld_alpha": 0.5}, ValueError, "one of them at a time"),
    ({}, {"loss_type": ["sigmoid", "sft"], "use_weighting": True}, ValueError, "use_weighting=True weighs .* SFT"),
    ({}, {"loss_type": "kto"}, ValueError, "KTO is a loss per sequence: DPOTrainer takes losses per pair"),
    ({}, {"loss_type": "nonsense"}, ValueError, "loss.*'nonsense'.*(expected one of|did you mean)"),
    ({"loss": Likelihood(), "ref_model": "another"}, {}, ValueError, "uses no reference, so ref_model must be None"),
]


@pytest.mark.parametrize(("options", "changes", "error", "message"), REFUSED_LOSSES)
def test_losses_that_do_not_fit_are_refused(options, changes, error, message, models, tmp_path):
    with pytest.raises(error, match=message):
        build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, options, **changes)


REFUSED_OF_KTO = [
    ({"loss": prefuse.DPO()}, {}, ValueError, "DPO is a loss per pair: KTOTrainer takes losses per sequence"),
    ({"loss": prefuse.KTO()}, {"loss_type": "apo_zero_unpaired"}, ValueError, "got both loss=KTO"),
    ({}, {"loss_type": "bco"}, ValueError, 'loss_type must be "kto" or "apo_zero_unpaired", got \'bco\''),
    ({"sampling": "batch"}, {}, ValueError, 'sampling must be "shuffled" or "trl", got \'batch\''),
    ({}, {"precompute_ref_log_probs": True}, ValueError, "mismatched completions are drawn anew in every step"),
]


@pytest.mark.parametrize(("options", "changes", "error", "message"), REFUSED_OF_KTO)
def test_what_kto_refuses(options, changes, error, message, models, tmp_path):
    with pytest.raises(error, match=message):
        build(KTOTrainer, models["llama"], LABELLED, tmp_path, trl.KTOConfig, options, **changes)


def test_kto_takes_precomputed_numbers_where_the_reference_stays(models, tmp_path):
    for options in (
        {"peft_config": LORA},
        {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(models["other"])},
    ):
        changes = {"precompute_ref_log_probs": True, "max_steps": 2}
        trainer = build(KTOTrainer, models["llama"], LABELLED, tmp_path, trl.KTOConfig, options, **changes)
        assert len(trainer._cache) == len({(row["prompt"], row["completion"]) for row in LABELLED})
        trainer.train()


def test_adapters_that_prepend_tokens_are_refused(models, tmp_path):
    options = {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match=r"does not take prompt learning .*: use trl.DPOTrainer"):
        build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, options)


def test_a_head_that_is_no_plain_matrix_is_refused(models, tmp_path):
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    model.lm_head.__class__ = Twice
    options = {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(models["llama"])}
    with pytest.raises(ValueError, match=r"the head of LlamaForCausalLM is a .*Twice, expected torch.nn.Linear"):
        build(DPOTrainer, model, ROWS, tmp_path, trl.DPOConfig, options)


def test_the_router_loss_of_experts_is_refused_until_it_is_turned_off(tmp_path):
    config = transformers.MixtralConfig(
        **trainer_runs.SETTINGS | trainer_runs.SHAPE, num_local_experts=2, router_aux_loss_coef=0.1
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    options = {"ref_model": copy.deepcopy(model)}
    with pytest.raises(ValueError, match=r"does not take the router loss .*router_aux_loss_coef=0.0 turns it off"):
        build(DPOTrainer, model, ROWS, tmp_path, trl.DPOConfig, options)
    compare("dpo", model, tmp_path, options=options, router_aux_loss_coef=0.0)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="a prompt of 3 tokens leaves no room for a completion within max_length = 3"):
        Collator(max_length=3)([{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}])


@pytest.mark.parametrize("have", [None, "1.15.2", "2.0.0"])
def test_another_trl_is_refused_with_what_to_install(have, monkeypatch):
    def version(name):
        if have is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return have

    monkeypatch.setattr(trl_base, "version", version)
    with pytest.raises(ImportError, match=r"need TRL 1.16 or later, below 2: pip install 'trl>=1.16,<2'"):
        trl_base._require_trl()
