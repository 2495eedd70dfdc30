"""The trainers for TRL do what TRL's own do, number by number, on flat batches; KTO samples as its paper has it."""

import copy
import functools
import importlib.metadata
import json
import math
import re
import socket
import sys
from dataclasses import dataclass
from itertools import chain, product

import datasets
import pytest
import torch
import transformers
import trl
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import prefuse
import ranks
import trainer_runs
from prefuse.kernels.cost import count_cost
from prefuse.trl import base as trl_base
from prefuse.trl.batches import Collator, mismatches
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import AGAIN, CHATS, LABELLED, ROWS, assert_same_log, assert_same_weights, build, log_of, weights_of

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
KINDS = {
    "dpo": (trl.DPOTrainer, DPOTrainer, trl.DPOConfig, ROWS, {}),
    "kto": (trl.KTOTrainer, KTOTrainer, trl.KTOConfig, LABELLED, {"sampling": "trl"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> folder"""
    folder = tmp_path_factory.mktemp("models")
    return {name: trainer_runs.save(folder, name) for name in trainer_runs.MODELS} | {
        "other": trainer_runs.save(tmp_path_factory.mktemp("other"), "llama", seed=1)
    }


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # accelerate's at the start of each run takes most of its time
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def compare(kind, model, tmp_path, rows=None, options=None, mine=None, **changes):
    """TRL's trainer and this one on the same rows: the same log, the same weights. Returns this one."""
    theirs, ours, config, default_rows, ours_alone = KINDS[kind]
    rows = default_rows if rows is None else rows
    expected = build(theirs, model, rows, tmp_path / "trl", config, options or {}, **changes)
    expected.train()
    got = build(ours, model, rows, tmp_path / "prefuse", config, (options or {}) | ours_alone | (mine or {}), **changes)
    before = weights_of(got.model)
    got.train()
    assert_same_log(log_of(got), log_of(expected))
    after = weights_of(got.model)
    assert_same_weights(after, weights_of(expected.model))
    moved = max((after[name] - before[name]).abs().max().item() for name in after)
    assert moved > 1e-3  # or equal weights would say nothing
    return got


def models_and(first, *others):
    """Every kind of model with the loss `first`, and one of them with the `others`; the rest of the pairs are slow."""
    names = [*trainer_runs.MODELS, "lora"]
    slow = [pytest.param(name, other, marks=pytest.mark.slow) for name in names[1:] for other in others]
    return [(name, first) for name in names] + [(names[0], other) for other in others] + slow


def test_they_stand_in_prefuse_trl():
    from prefuse import trl as door

    assert (door.DPOTrainer, door.KTOTrainer) == (DPOTrainer, KTOTrainer)


# ---- DPO equals TRL's ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "loss_type"), models_and("sigmoid", "ipo"))
def test_dpo_trains_and_logs_as_trls_trainer(name, loss_type, models, tmp_path):
    options = {"peft_config": LORA} if name == "lora" else {}
    model = models["llama" if name == "lora" else name]
    got = compare("dpo", model, tmp_path, options=options, loss_type=loss_type, beta=0.5)
    assert got._collate.flat
    first = log_of(got)[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0


TRLS_OTHERS = ["hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
               "apo_down", "discopop", "sigmoid_norm"]  # fmt: skip


@pytest.mark.parametrize("loss_type", TRLS_OTHERS)
def test_dpo_has_trls_other_losses(loss_type, models, tmp_path):
    smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    settings = {"beta": 0.5, "label_smoothing": smoothing, "discopop_tau": 0.3}
    compare("dpo", models["llama"], tmp_path, loss_type=loss_type, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"use_weighting": True},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_dpo_has_trls_divergences_and_weights(settings, models, tmp_path):
    compare("dpo", models["llama"], tmp_path, beta=0.5, **settings)


def test_ld_dpo_trains_as_trls(models, tmp_path, monkeypatch):
    """TRL logs log-probabilities with the weighed tail in them; here `logps/*` stay those of the completions."""

    def without_logps(trainer):
        rows = trainer_runs.log_of(trainer)
        return [{name: value for name, value in row.items() if not name.startswith("logps/")} for row in rows]

    monkeypatch.setattr(sys.modules[__name__], "log_of", without_logps)
    compare("dpo", models["llama"], tmp_path, beta=0.5, ld_alpha=0.4)


def test_conversations(models, tmp_path):
    compare("dpo", models["llama"], tmp_path, rows=CHATS)


UNCHECKPOINTED = {"activation_checkpointing": False, "gradient_checkpointing": False}
# One thing each that changes what a microbatch or a log line is.
CHANGES = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2},
    "a last step of fewer": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 4},
    "truncated": {"max_length": 12},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "no checkpointing": UNCHECKPOINTED,
    "clipped": {"max_grad_norm": 0.1},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_mean_what_they_mean_in_trl(kind, change, models, tmp_path):
    compare(kind, models["llama"], tmp_path, **CHANGES[change])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(kind, models, tmp_path):
    """Before, during and after training, on data sets given at construction and later."""
    theirs, ours, config, rows, ours_alone = KINDS[kind]
    logs = []
    for trainer, more in (theirs, {}), (ours, ours_alone):
        changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "logging_steps": 3}
        options = {"eval_rows": rows[4:11]} | more
        run = build(trainer, models["llama"], rows[:8], tmp_path / trainer.__module__, config, options, **changes)
        metrics = [run.evaluate()]
        run.train()
        metrics.append(run.evaluate(trainer_runs.Dataset.from_list(rows[1:4])))
        keep = [
            {k: v for k, v in m.items() if k not in trainer_runs.TIMES} | {"step": i} for i, m in enumerate(metrics)
        ]
        logs.append(log_of(run) + keep)
    assert any("eval_rewards/margins" in row for row in logs[0])
    assert_same_log(logs[1], logs[0])


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["explicit", "lora", "trained adapter"])
def test_every_kind_of_reference(reference, kind, precompute, models, tmp_path):
    model, options = models["llama"], {}
    if reference == "explicit":
        options = {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(models["other"])}
    elif reference == "lora":
        options = {"peft_config": LORA}
    else:
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), LORA)
        with torch.no_grad():  # the reference is this adapter's copy, not the model without it
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    got = compare(kind, model, tmp_path, options=options, precompute_ref_log_probs=precompute)
    first = log_of(got)[0]
    assert abs(first["rewards/chosen"]) > 1e-3 if reference == "explicit" else abs(first["rewards/chosen"]) < 1e-5


def test_mixtures_of_losses(models, tmp_path):
    for loss_type, weights in (["sigmoid", "sft"], [0.8, 0.3]), (["ipo", "sigmoid"], None), (["sft"], None):
        compare("dpo", models["llama"], tmp_path, loss_type=loss_type, loss_weights=weights)


@pytest.mark.parametrize(("name", "loss_type"), models_and("kto", "apo_zero_unpaired"))
def test_kto_trains_and_logs_as_trls_trainer_where_it_samples_alike(name, loss_type, models, tmp_path):
    options = {"peft_config": LORA} if name == "lora" else {}
    model = models["llama" if name == "lora" else name]
    changes = {"loss_type": loss_type, "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    got = compare("kto", model, tmp_path, options=options, **changes)
    log = [row for row in log_of(got) if "kl" in row]
    assert any(row["kl"] > 0 for row in log) == (loss_type == "kto")
    assert any("rewards/margins" in row for row in log)


def test_unpaired_rows_come_from_pairs_too(models, tmp_path):
    """TRL puts all desirable rows first, so microbatches have one class; margins are logged where both are there."""
    got = compare("kto", models["llama"], tmp_path, rows=ROWS, per_device_train_batch_size=5)
    assert [("rewards/margins" in row) for row in log_of(got)[:5]] == [False, False, True, False, False]


# ---- what this trainer adds ----------------------------------------------------------------------


def test_a_prompt_runs_once_for_all_of_its_completions(models, tmp_path):
    rows = [ROWS[0], ROWS[1], AGAIN[0], ROWS[2]]  # the third one has the first one's prompt
    trainer = build(DPOTrainer, models["llama"], rows, tmp_path, trl.DPOConfig, {})
    inputs = trainer.data_collator(list(trainer.train_dataset))
    tokenized = list(trainer.train_dataset)
    lengths = [[len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in tokenized]
    assert tokenized[0]["prompt_ids"] == tokenized[2]["prompt_ids"]
    assert inputs["input_ids"].shape == (1, sum(map(sum, lengths)) - lengths[2][0])
    assert inputs["num_tokens"].tolist() == [2 * p + c + r for p, c, r in (lengths[i] for i in (0, 2, 1, 3))]


def test_padded_batches_train_the_same(models, tmp_path):
    logs = []
    for padding_free in (True, False):
        options = {"padding_free": padding_free}
        trainer = build(DPOTrainer, models["gemma2"], ROWS, tmp_path, trl.DPOConfig, options, loss_type="ipo")
        trainer.train()
        assert trainer._collate.flat == padding_free
        logs.append(log_of(trainer))
    assert_same_log(logs[1], logs[0])


def test_a_model_that_takes_no_flat_batches_is_padded_and_says_so(models, tmp_path):
    config = transformers.LlamaConfig.from_pretrained(models["llama"])
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = transformers.AutoModelForCausalLM.from_config(config)
    options = {"ref_model": transformers.AutoModelForCausalLM.from_config(config)}
    with pytest.warns(UserWarning, match=r"dynamic rotary embedding.*Batches are padded") as caught:
        got = compare("dpo", model, tmp_path, options=options)
    assert not got._collate.flat
    assert len([w for w in caught if "Batches are padded" in str(w.message)]) == 1


def test_the_reference_runs_once_for_each_row(models, tmp_path, monkeypatch):
    """Over epochs and evaluations; and its numbers are the model's own."""
    rows = []
    run = DPOTrainer._reference_pass

    def counting(self, tokens):
        rows.append(len(tokens.cu_seqlens) - 1)
        return run(self, tokens)

    monkeypatch.setattr(DPOTrainer, "_reference_pass", counting)
    options = {"eval_rows": ROWS[8:]}  # some of them are trained on
    changes = {"max_steps": 9, "eval_strategy": "epoch"}
    trainer = build(DPOTrainer, models["llama"], ROWS[:10], tmp_path, trl.DPOConfig, options, **changes)
    trainer.train()
    assert trainer.state.epoch == 3.0
    # Four rows are evaluated together, of which two are known: one pass more for them.
    assert sum(rows) == 2 * (10 + 4)
    assert len(trainer._cache) == 12

    reference = transformers.AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float64)
    batch = trainer.data_collator(list(trainer.train_dataset))["batch"]
    kept = trainer._cache.get(batch.rows).split([sum(row.lengths) for row in batch.rows])
    for row, values in zip(batch.rows, kept, strict=True):
        expected = [token_logps(reference, row.prompt, completion) for completion in row.completions]
        torch.testing.assert_close(values.double(), torch.cat(expected), rtol=0, atol=1e-5)


@torch.no_grad()
def token_logps(model, prompt, completion):
    """(n,) log-probabilities of a completion, from the logits."""
    ids = torch.tensor([prompt + completion])
    logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def test_precomputed_references_are_shared_by_tokens_and_asked_for_by_name(models, tmp_path):
    changes = {"precompute_ref_log_probs": True}
    trainer = build(DPOTrainer, models["llama"], ROWS[:4], tmp_path, trl.DPOConfig, {}, **changes)
    assert trainer.ref_model is None
    assert len(trainer._cache) == 4
    other = build(DPOTrainer, models["llama"], ROWS[4:6], tmp_path, trl.DPOConfig, {})
    batch = other.data_collator(list(other.train_dataset))["batch"]
    with pytest.raises(RuntimeError, match="not precomputed, and the reference is gone"):
        trainer._reference(batch.rows, batch.tokens)


def test_the_first_loss_is_ln_2_and_the_first_rewards_are_zero(models, tmp_path):
    for options in {}, {"peft_config": LORA}:
        changes = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
        trainer = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, options, **changes)
        trainer.train()
        first = log_of(trainer)[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/accuracies"] == 0.0


@pytest.mark.parametrize(("options", "units"), [({"peft_config": LORA}, 2), ({}, 3), ({"workspace": 0}, 4)])
def test_what_the_head_costs(options, units, models, tmp_path):
    """A frozen head takes 2 units, with all that is logged; a trainable one 3, or 4 without a workspace."""
    trainer = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, options)
    inputs = trainer.data_collator(list(trainer.train_dataset)[:4])
    trainer._reference(inputs["batch"].rows, inputs["batch"].tokens)  # known from now on
    trainer.model.train()
    with count_cost() as cost:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert cost.launches == {"product": units}  # the vocabulary is one tile


@dataclass(frozen=True)
class Margin(prefuse.DPO):
    """A loss that nobody knows by name: DPO with a margin of one."""

    def losses(self, seq):
        return -torch.nn.functional.logsigmoid(self.beta * (seq.chosen - seq.rejected) - 1.0)


@dataclass(frozen=True)
class Likelihood(prefuse.DPO):
    """One without a reference."""

    uses_reference = False


def test_any_loss_over_pairs(models, tmp_path):
    run = functools.partial(build, DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, max_steps=1)
    first = {}
    for loss in prefuse.DPO(beta=0.3, label_smoothing=0.2), Margin(beta=0.3), Likelihood(beta=0.3):
        trainer = run({"loss": loss})
        trainer.train()
        first[type(loss)] = log_of(trainer)[0]
        assert (trainer.ref_model is None) == (not loss.uses_reference)
    assert first[prefuse.DPO]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first[Margin]["loss"] == pytest.approx(math.log(1 + math.e), abs=1e-6)
    assert first[Likelihood]["rewards/chosen"] == pytest.approx(0.3 * first[Likelihood]["logps/chosen"], abs=1e-5)


def test_label_smoothing_is_cdpo(models, tmp_path):
    changes = {"label_smoothing": 0.2, "beta": 0.5}
    named = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {}, **changes)
    given = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {"loss": prefuse.DPO(0.5, 0.2)})
    plain = build(DPOTrainer, models["llama"], ROWS, tmp_path, trl.DPOConfig, {}, beta=0.5)
    logs = []
    for trainer in named, given, plain:
        trainer.train()
        logs.append(log_of(trainer))
    assert logs[0] == logs[1]
    assert logs[0][2]["loss"] > logs[2][2]["loss"] + 1e-3


# ---- KTO's sampling ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=12))
def test_mismatches_are_of_other_prompts_and_each_completion_once_where_that_can_be(prompts):
    prompts = [[prompt] for prompt in prompts]
    partners = mismatches(prompts)
    assert len(partners) == len(prompts)
    counts = [prompts.count(prompt) for prompt in prompts]
    for prompt, other in zip(prompts, partners, strict=True):
        assert (other is None) == all(p == prompt for p in prompts)
        assert other is None or prompts[other] != prompt
    if 2 * max(counts, default=0) <= len(prompts):
        assert sorted(partners) == list(range(len(prompts)))


def recorded_steps(monkeypatch):
    """Of every optimizer step its microbatches, and the z0 of each."""
    steps = []
    get = KTOTrainer.get_batch_samples

    def recording(self, *args):
        samples, num_items = get(self, *args)
        steps.append([inputs["batch"] for inputs in samples])
        return samples, num_items

    monkeypatch.setattr(KTOTrainer, "get_batch_samples", recording)
    return steps


KTO_ROWS = [
    *LABELLED,
    *({"prompt": f"tell me {i}", "completion": f"{i} " * i, "label": i % 2 == 0} for i in range(1, 5)),
]


def test_a_step_has_one_z0_from_completions_of_other_prompts(models, tmp_path, monkeypatch):
    """Against float64: the mean log-ratio of the step's completions after other prompts of it, clamped at zero."""
    steps = recorded_steps(monkeypatch)
    policy = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    reference = transformers.AutoModelForCausalLM.from_pretrained(models["other"])
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 0.0, "max_steps": 4}
    z0s = []
    for first, second in (policy, reference), (reference, policy):
        trainer = build(KTOTrainer, first, KTO_ROWS, tmp_path, trl.KTOConfig, {"ref_model": second}, **changes)
        trainer.train()
        for batches, line in zip(steps, log_of(trainer), strict=False):
            rows = [row for batch in batches for row in batch.rows]
            assert len(rows) == 8
            partners = mismatches([row.prompt for row in rows])
            ratios = []
            for row, other in zip(rows, partners, strict=True):
                completion = rows[other].completions[0]
                own, ref = (token_logps(model.double(), row.prompt, completion).sum() for model in (first, second))
                ratios.append((own - ref).item())
            expected = max(0.0, sum(ratios) / len(rows))
            z0s.append(expected)
            assert len({batch.z0.item() for batch in batches}) == 1
            assert batches[0].z0.item() == pytest.approx(expected, abs=1e-4)
            assert not batches[0].z0.requires_grad
            assert line["kl"] == pytest.approx(expected, abs=1e-4)
        steps.clear()
        first.float(), second.float()
    assert max(z0s) > 0.1
    assert min(z0s) == 0.0  # clamped: one of the two directions lies below


def test_rows_are_shuffled_anew_each_epoch_and_the_same_by_the_same_seed(models, tmp_path, monkeypatch):
    orders = []
    for seed in (1, 1, 2):
        steps = recorded_steps(monkeypatch)
        changes = {"seed": seed, "max_steps": 8, "per_device_train_batch_size": 4}
        build(KTOTrainer, models["llama"], KTO_ROWS, tmp_path, trl.KTOConfig, {}, **changes).train()
        orders.append([[tuple(row.prompt) for row in batch.rows] for step in steps for batch in step])
        labels = [{row.label for batch in step for row in batch.rows} for step in steps]
        assert sum(both == {True, False} for both in labels) >= 5  # TRL's order of pairs made into rows has none
    assert orders[0] == orders[1] != orders[2]
    first, second = orders[0][:4], orders[0][4:]
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second))


def test_accumulation_changes_no_step_of_kto(models, tmp_path):
    """Not even down to microbatches of one row, where TRL's pairs are impossible."""
    ends = []
    for size in (8, 4, 1):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 4}
        trainer = build(KTOTrainer, models["llama"], KTO_ROWS, tmp_path, trl.KTOConfig, {}, **changes)
        trainer.train()
        ends.append((weights_of(trainer.model), [(row["loss"], row["kl"]) for row in log_of(trainer)[:4]]))
    assert max(kl for _, kl in ends[0][1]) > 0
    for weights, log in ends[1:]:
        assert_same_weights(weights, ends[0][0])
        torch.testing.assert_close(torch.tensor(log), torch.tensor(ends[0][1]), rtol=0, atol=1e-5)


def test_a_step_of_one_prompt_has_no_mismatch_and_says_so(models, tmp_path):
    rows = [LABELLED[0] | {"completion": text} for text in ("yes", "no", "maybe", "never")]
    trainer = build(KTOTrainer, models["llama"], rows, tmp_path, trl.KTOConfig, {}, max_steps=2)
    with pytest.warns(UserWarning, match=r"all 4 row\(s\) of a step have the same prompt"):
        trainer.train()
    assert [row["kl"] for row in log_of(trainer)[:2]] == [0.0, 0.0]


def test_an_evaluation_of_kto_has_a_z0_of_its_own_and_repeats_no_reference(models, tmp_path, monkeypatch):
    passes = []
    run = KTOTrainer._reference_pass

    def counting(self, tokens):
        passes.append(tokens)
        return run(self, tokens)

    monkeypatch.setattr(KTOTrainer, "_reference_pass", counting)
    options = {"eval_rows": KTO_ROWS[:8]} | {
        "ref_model": transformers.AutoModelForCausalLM.from_pretrained(models["other"])
    }
    trainer = build(KTOTrainer, models["llama"], KTO_ROWS, tmp_path, trl.KTOConfig, options)
    first = {name: value for name, value in trainer.evaluate().items() if name not in trainer_runs.TIMES}
    assert len(passes) == 4  # two batches, and the mismatches of each
    second = trainer.evaluate()
    assert len(passes) == 4
    assert first["eval_kl"] > 0.1
    assert first == {name: second[name] for name in first}


def test_a_mismatched_completion_is_cut_at_max_length(models, tmp_path, monkeypatch):
    steps = recorded_steps(monkeypatch)
    seen = []
    quiet = KTOTrainer._quiet

    def recording(self, model, tokens):
        seen.append(max(sum(pair) for group in tokens.segments.lengths for pair in ((group[0], c) for c in group[1:])))
        return quiet(self, model, tokens)

    monkeypatch.setattr(KTOTrainer, "_quiet", recording)
    changes = {"max_length": 14, "max_steps": 2, "per_device_train_batch_size": 8}
    build(KTOTrainer, models["llama"], KTO_ROWS, tmp_path, trl.KTOConfig, {}, **changes).train()
    assert max(seen) == 14
    assert steps


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


# ---- several ranks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """name -> (log, reductions, weights) of each of two ranks, for all cases in one pair of processes."""
    settings = {
        "plain": {"per_device_train_batch_size": 3},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2} | UNCHECKPOINTED,
        "precomputed": {},
    }
    cases = {}
    for kind, (name, changes) in product(("trl dpo", "dpo", "trl kto", "kto"), settings.items()):
        options = {"sampling": "trl"} if kind == "kto" else {}
        if name == "precomputed":  # which TRL's own cannot, on several ranks, for a data set in memory
            options["reference"] = models["other"]
            changes = {"max_steps": 3} | ({} if kind.startswith("trl") else {"precompute_ref_log_probs": True})
        cases[f"{kind} {name}"] = {"trainer": kind, "settings": changes, "options": options}
    for kind in "trl dpo", "dpo":
        cases[f"{kind} lora"] = {"trainer": kind, "settings": {}, "options": {"lora": True}}
    cases["dpo gone"] = {"trainer": "dpo", "settings": {"precompute_ref_log_probs": True}}
    cases["kto shuffled"] = {"trainer": "kto", "settings": settings["accumulated"]}
    for case in cases.values():
        case["model"] = models["llama"]
        case["settings"] = {"per_device_train_batch_size": 3} | case["settings"]
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(key, value)
        ranks.run(2, folder, ranks.LIB / "trainer_worker.py", folder / "cases.json", folder / "out")
    return {name: [rank_of(folder / "out" / name, rank) for rank in range(2)] for name in cases}


def rank_of(out, rank):
    written = json.loads((out / f"log.{rank}.json").read_text())
    return written["log"], written["reductions"], load_file(out / f"weights.{rank}.safetensors")


CASES_OF_RANKS = [(kind, name) for kind in KINDS for name in ("plain", "accumulated", "evaluated", "precomputed")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [*CASES_OF_RANKS, ("dpo", "lora")])
def test_two_ranks_train_and_log_as_trls_trainer_on_two_ranks(kind, name, two_ranks):
    expected, got = two_ranks[f"trl {kind} {name}"], two_ranks[f"{kind} {name}"]
    for (log, _, weights), (trls_log, _, trls_weights) in zip(got, expected, strict=True):
        assert_same_log(log, trls_log)
        assert_same_weights(weights, trls_weights)
    for key, value in got[0][2].items():
        assert torch.equal(value, got[1][2][key])


@pytest.mark.slow
def test_each_rank_has_the_reference_numbers_of_all(two_ranks):
    """Rows change ranks as they are shuffled, and nobody keeps a reference model."""
    for (log, _, weights), (trls_log, _, trls_weights) in zip(
        two_ranks["dpo gone"], two_ranks["trl dpo plain"], strict=True
    ):
        assert_same_log(log, trls_log)
        assert_same_weights(weights, trls_weights)


@pytest.mark.slow
def test_metrics_are_reduced_once_for_each_log_line(two_ranks):
    for name in "plain", "accumulated", "evaluated", "precomputed", "lora":
        log, reductions, _ = two_ranks[f"dpo {name}"][0]
        assert reductions == sum("entropy" in row or "eval_entropy" in row for row in log)


@pytest.mark.slow
def test_ranks_share_the_z0_of_a_step(two_ranks):
    (log, reductions, weights), (_, _, other) = two_ranks["kto shuffled"]
    assert max(row.get("kl", 0.0) for row in log) > 0
    assert reductions == 5 + 2 + 1  # one z0 for each step; log lines after steps 2 and 4, and of the end
    for key, value in weights.items():
        assert torch.equal(value, other[key])
