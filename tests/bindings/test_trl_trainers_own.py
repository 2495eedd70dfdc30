"""What trainers for TRL on flat batches do beyond TRL's: shared prompts, kept references, KTO's sampling, any loss."""

import functools
import math
from dataclasses import dataclass
from itertools import chain

import pytest
import torch
import transformers
import trl
from hypothesis import given
from hypothesis import strategies as st

import prefuse
import trainer_runs
from prefuse.kernels.cost import count_cost
from prefuse.mismatches import pair_mismatches
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import AGAIN, LABELLED, ROWS, assert_same_log, assert_same_weights, build, log_of, weights_of
from trl_trainer_cases import LORA, Likelihood, _quiet, compare  # noqa: F401

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


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
    partners = pair_mismatches(prompts)
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
            partners = pair_mismatches([row.prompt for row in rows])
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
