"""`gradient_tolerance` behind every door: `sequence_logps`, the losses of the Trainer, TRL's switch and trainers.

Values stay the exact ones, gradients are near them and not them, and the measured share is told and keeps the promise.
"""

import copy

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, KTOConfig

import prefuse
import prefuse.trl
import trainer_runs
from prefuse.bench.timing import peak_bytes
from prefuse.kernels import linear_kl, record_skipped_mass
from prefuse.transformers import fuse_loss, sequence_logps, sft_loss, token_logps
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers_cases import COEFFICIENTS, build, gradients, padded

TOLERANCE = 0.5  # of random models, whose softmax is flat: only much may be skipped


def sharp(model):
    """Logits as far apart as a trained model's."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    return model


def assert_near_and_not_equal(got, exact, record):
    assert 0 < record.share <= TOLERANCE
    assert record.blocks > record.exact_blocks
    assert got.keys() == exact.keys()
    assert any(not torch.equal(got[name], exact[name]) for name in exact)
    got, exact = (torch.cat([x.flatten() for x in grads.values()]) for grads in (got, exact))
    assert (got - exact).norm() <= TOLERANCE * exact.norm()


def loss_of(model, **how):
    return (sequence_logps(model, **padded(), impl="torch", **how) * COEFFICIENTS).sum()


def loss_of_tokens(model, **how):
    return token_logps(model, **padded(), impl="torch", **how).logps.sum()


def fused(model, **how):
    return fuse_loss(model, impl="torch", **how)(**padded()).loss


def from_outputs(model, **how):
    loss, batch = sft_loss(model.train(), impl="torch", **how), padded()
    return loss(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"])


@pytest.mark.parametrize("loss", [loss_of, loss_of_tokens, fused, from_outputs], ids=lambda loss: loss.__name__)
def test_of_a_model(loss):
    exact_model = sharp(build())
    model = copy.deepcopy(exact_model)
    expected = loss(exact_model, gradient_tolerance=0.0)
    exact = gradients(exact_model, expected)
    value = loss(model, gradient_tolerance=TOLERANCE)
    assert torch.equal(value, expected)
    with record_skipped_mass() as record:
        got = gradients(model, value)
    assert_near_and_not_equal(got, exact, record)


@pytest.mark.parametrize("door", [fuse_loss, sft_loss, lambda model, **how: prefuse.trl.enable(**how)])
def test_what_no_head_has_is_refused_at_once(door):
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\)"):
        door(build(), gradient_tolerance=1.5)
    with pytest.raises(ValueError, match=r'impl="reference" is exact: set gradient_tolerance to 0\.0'):
        door(build(), gradient_tolerance=0.5, impl="reference")
    assert not prefuse.trl.is_enabled()


def test_linear_kl_takes_none():
    with pytest.raises(TypeError, match="gradient_tolerance"):
        linear_kl(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, 2), torch.zeros(3, 2), gradient_tolerance=0.5)


# (Dynamo looks at what crosses the break.)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compile_breaks_its_graph_and_gets_the_same_numbers():
    hidden, weight, targets = torch.randn(40, 16), 2.0 * torch.randn(200, 16), torch.randint(200, (40,))

    def step(hidden, weight):
        return (
            2.0
            * prefuse.linear_logprobs(2.0 * hidden, weight, targets, impl="torch", gradient_tolerance=TOLERANCE).sum()
        )

    grads = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        run(h, w).backward()
        grads.append((h.grad, w.grad))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---------------------------------------------------------------------------------------------------------
# TRL


def test_the_switch_hands_it_to_every_trainer():
    from trl.trainer import utils

    hidden, weight, targets = torch.randn(40, 16), 2.0 * torch.randn(200, 16), torch.randint(200, (40,))
    results = []
    for tolerance in (0.0, TOLERANCE):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        with prefuse.trl.enabled(impl="torch", gradient_tolerance=tolerance), record_skipped_mass() as record:
            logps, entropy, *_ = utils._ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 64)
            logps.sum().backward()  # (the entropy is a metric here)
        results.append((logps.detach(), entropy.detach(), {"hidden": h.grad, "weight": w.grad}))
    (*values, exact), (*others, got) = results
    assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))
    assert_near_and_not_equal(got, exact, record)


def test_the_switch_holds_no_more_with_a_tolerance_than_the_kept_rows_of_the_head():
    """TRL on a CPU hands over every position, prompts and padding too, whose log-probabilities it masks afterwards."""
    from trl.trainer import utils

    torch.manual_seed(0)
    n, d, v = 512, 32, 6000
    x, weight, mask = torch.randn(n, d), 1.5 * torch.randn(v, d), torch.arange(n) % 4 == 0
    trunk = torch.nn.Sequential(*[torch.nn.Linear(d, d), torch.nn.SiLU()] * 4, torch.nn.Linear(d, d))
    targets = torch.where(mask, (trunk(x) @ weight.T).argmax(-1), 0)
    peaks = []
    for tolerance in (0.0, TOLERANCE):

        def step(tolerance=tolerance):
            with prefuse.trl.enabled(impl="torch", gradient_tolerance=tolerance):
                logps = utils._ChunkedLogProbFunction.apply(trunk(x), weight, None, targets, 1.0, 64)[0]
            torch.where(mask, logps, 0.0).sum().backward()

        peaks.append(peak_bytes(step))
    blocks = 2
    assert peaks[1] <= peaks[0] + 4 * d * v + 4 * v * (2 * blocks + 8)


def run(trainer, config, rows, folder, **options):
    model = sharp(trainer_runs.transformers.AutoModelForCausalLM.from_config(trainer_runs.MODELS["llama"]()))
    made = trainer(
        model=model, args=trainer_runs.arguments(config, folder, max_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tiny_tokenizer(chat_template=CHATML), ref_model=copy.deepcopy(model), **options,
    )  # fmt: skip
    made.train()
    return [row for row in trainer_runs.log_of(made) if "loss" in row], made.state.log_history


@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("trainer", "config", "rows"),
    [(DPOTrainer, DPOConfig, trainer_runs.ROWS), (KTOTrainer, KTOConfig, trainer_runs.LABELLED)],
    ids=["dpo", "kto"],
)
def test_the_trainers_log_what_was_skipped(trainer, config, rows, tmp_path):
    losses, everything = run(trainer, config, rows, tmp_path, gradient_tolerance=TOLERANCE)
    shares = [row["head/skipped_mass"] for row in losses]
    assert all(0 <= share <= TOLERANCE for share in shares)
    assert any(shares)  # (a block beyond the promise is exact)
    assert not any("eval_head/skipped_mass" in row for row in everything)  # no backward, nothing skipped
    with pytest.raises(ValueError, match="gradient_tolerance must be in"):
        run(trainer, config, rows, tmp_path, gradient_tolerance=-1.0)
