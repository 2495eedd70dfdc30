"""`prefuse.transformers.fuse_loss` and `sft_loss` in transformers' Trainer: the same numbers, without the logits."""

import copy
import inspect

import pytest
import torch
import transformers

import wrapped_worker
from largest_tensor import LargestTensor
from prefuse.transformers import (
    UnsupportedModel,
    fuse_loss,
    sequence_logps,
    sft_loss,
)
from transformers_cases import TRUNK, V, assert_same_gradients, build, gradients, lora, padded

# PEFT itself still calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


# ---------------------------------------------------------------------------------------------------------
# The loss of the Trainer


def batches(count=8):
    """Rows for a Trainer, whose numbers of labels differ so that a mean of means is another number."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(3, V, (12,), generator=g)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
        made[-1]["labels"][: 1 + (5 * i) % 11] = -100
    return made


def trainer(model, folder, **options):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
                "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
                "disable_tqdm": True, "lr_scheduler_type": "constant", "optim": "sgd"}  # fmt: skip
    settings |= {"max_grad_norm": 1e9} | options.pop("settings", {})
    args = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model=model, args=args, train_dataset=batches(), eval_dataset=batches(3), **options)


WAYS = {
    "fuse_loss": lambda model, **how: (fuse_loss(model, **how), {}),
    "compute_loss_func": lambda model, **how: (model, {"compute_loss_func": sft_loss(model, **how)}),
}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("kind", ["Llama", "tied", "lora on the head", "bf16", "checkpointed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_has_the_loss_it_had(way, kind, tmp_path):
    """Steps of two accumulated microbatches: losses, gradient norms and weights; in bf16 to its rounding."""
    make = {"tied": lambda: build("Qwen3"), "lora on the head": lambda: lora(*TRUNK, "lm_head")}.get(kind, build)
    settings = {"bf16": {"bf16": True}, "checkpointed": {"activation_checkpointing": True}}.get(kind, {})
    seen, tolerance = [], 2e-2 if kind == "bf16" else 1e-5
    for fused in (False, True):
        torch.manual_seed(3)
        model, options = WAYS[way](make()) if fused else (make(), {})
        run = trainer(model, tmp_path, settings=settings, **options)
        run.train()
        logs = [row for row in run.state.log_history if "loss" in row]
        seen.append((logs, dict(model.named_parameters()), run.evaluate()["eval_loss"]))
    (logs, weights, evaluated), (got, found, also) = seen
    assert len(got) == len(logs) == 4
    for a, b in zip(got, logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert also == pytest.approx(evaluated, rel=tolerance)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Cohere", "Granite", "Phi"])
def test_fuse_loss_is_the_models_loss(name):
    plain, fused = build(name).double(), fuse_loss(build(name).double())
    fused.load_state_dict(plain.state_dict())
    batch = padded()
    for more in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)},
                 {"shift_labels": batch["labels"].roll(-3, 1)}):  # fmt: skip
        wanted, got = plain(**batch, **more), fused(**batch, **more)
        assert got.logits is None
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=1e-6)  # both float32
        expected = gradients(plain, wanted.loss)
        for workspace in (None, 0):
            again = fuse_loss(copy.deepcopy(plain), workspace=workspace)
            assert_same_gradients(gradients(again, again(**batch, **more).loss), expected, rtol=1e-6)


def test_without_labels_the_model_does_what_it_did():
    plain, fused = build(), fuse_loss(build())
    fused.load_state_dict(plain.state_dict())
    batch = padded()
    ids = batch["input_ids"][:, :4]
    assert torch.equal(fused(ids).logits, plain(ids).logits)
    written = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (plain, fused)]
    assert torch.equal(*written)
    assert torch.equal(sequence_logps(fused, **batch), sequence_logps(plain, **batch))
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    del fused.forward
    assert torch.equal(fused(**batch).loss, plain(**batch).loss)


def test_a_copy_of_a_fused_model_computes_with_its_own_weights():
    model = fuse_loss(build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    batch = padded()
    assert (twin(**batch).loss - model(**batch).loss).abs() > 1e-3
    gradients(twin, twin(**batch).loss)
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_of_a_model_in_training_with_a_fused_loss(way):
    model = build().train()
    wanted = sequence_logps(model, **padded())
    WAYS[way](model)
    assert torch.equal(sequence_logps(model, **padded()), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_no_logits_are_made_for_a_loss(way):
    model, options = WAYS[way](build(vocab_size=4000).train(), workspace=0)
    ids = torch.randint(0, 4000, (3, 110))
    with LargestTensor() as ours:
        if options:
            loss = options["compute_loss_func"](model(ids), ids, num_items_in_batch=100)
        else:
            loss = model(ids, labels=ids, num_items_in_batch=100).loss
        loss.backward()
    assert ours.largest <= 4 * 256 * 2048 + 1  # a tile of the portable head; the logits have 4 * 330 * 4000 bytes


def test_logits_in_eval_are_there_where_asked_for():
    batch = padded()
    model = fuse_loss(build(), logits_in_eval=True)
    assert model(**batch).logits.shape == (4, 15, V)
    assert model.train()(**batch).logits is None
    assert isinstance(fuse_loss(build())(**batch, return_dict=False), tuple)


def test_no_label_at_all_is_a_loss_of_zero():
    batch = padded()
    batch["labels"].fill_(-100)
    model = fuse_loss(build())
    loss = model(**batch).loss
    assert loss.item() == 0  # transformers' is nan
    assert set(gradients(model, loss)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("install", [fuse_loss, sft_loss])
def test_a_loss_of_the_models_own_is_refused(install):
    def own_loss(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    model = build()
    model.loss_function = own_loss
    with pytest.raises(UnsupportedModel, match=r"the loss of LlamaForCausalLM is own_loss, expected .*ForCausalLMLoss"):
        install(model)


def test_labels_of_another_shape():
    model = fuse_loss(build())
    with pytest.raises(ValueError, match=r"for each of the labels \(4, 15\), got \(4, 3, 32\): give labels"):
        model(**padded(), logits_to_keep=3)


def test_compute_loss_func_under_fully_shard_names_the_other_way(alone):
    model = wrapped_worker.llama().train()
    sft_loss(model)
    with pytest.raises(UnsupportedModel, match=r"use prefuse\.transformers\.fuse_loss\(model\), and no"):
        wrapped_worker.fsdp(model)(padded()["input_ids"])


@pytest.mark.parametrize("find_unused", [True, False])
def test_compute_loss_func_under_ddp(find_unused, alone):
    """The Trainer has it look for parameters that are not used, unless told otherwise: the head is used."""
    batch = padded()
    labels = batch.pop("labels")
    plain = wrapped_worker.llama().train()
    expected = gradients(plain, plain(**batch, labels=labels).loss)
    model = wrapped_worker.llama().train()
    loss = sft_loss(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    assert_same_gradients(gradients(model, loss(wrapped(**batch), labels)), expected)
