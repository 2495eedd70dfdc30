"""A loss of the test's own, with labels, runs wherever a loss of the library does: it is asked what it needs.

`preference_loss`, `linear_preference_loss` in one piece and in groups, a run of the engine with its evaluation, and
TRL's KTOTrainer; with z0 and without, with a reference and without.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import kind_of
from prefuse.engine.train import train
from prefuse.losses import needs_of
from tiny_run import LABELLED, read_log, save_model, settings, write_rows

pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


@dataclass(frozen=True)
class Logistic:
    """log(1 + exp(-s (beta r - shift))) with s = 1 for a good row and -1 for a bad one: a binary classifier."""

    beta: float = 0.5
    per = "sequence"
    needs = frozenset({"reference", "labels"})

    def losses(self, seq):
        signs = torch.where(seq.labels, 1.0, -1.0)
        return torch.nn.functional.softplus(-signs * (self.beta * seq.ratios - self.shift(seq)))

    def shift(self, seq):
        return 0.0

    def rewards(self, seq):
        return self.beta * seq.ratios


@dataclass(frozen=True)
class Shifted(Logistic):
    needs = frozenset({"reference", "labels", "z0"})

    def shift(self, seq):
        return self.beta * seq.z0


@dataclass(frozen=True)
class Unreferenced(Logistic):
    needs = frozenset({"labels"})


OWN = [Logistic(), Shifted(), Unreferenced()]
LENGTHS = [3, 1, 4, 2]
LABELS = torch.tensor([True, False, False, True])
CU_SEQLENS = torch.tensor([0, 3, 4, 8, 10], dtype=torch.int32)


def arguments(loss, z0=0.3) -> dict:
    generator = torch.Generator().manual_seed(0)
    needs = needs_of(loss)
    return {
        "ref_logps": -torch.rand(10, generator=generator) if "reference" in needs else None,
        "labels": LABELS if "labels" in needs else None,
        "z0": z0 if "z0" in needs else None,
        "loss": loss,
    }


def expected_losses(loss, logps, given) -> list[float]:
    """In plain Python, a row at a time."""
    refs = torch.zeros(10) if given["ref_logps"] is None else given["ref_logps"]
    ratios = [x.sum().item() for x in (logps.detach().double() - refs.double()).split(LENGTHS)]
    shift = loss.beta * (given["z0"] or 0.0)
    return [
        math.log1p(math.exp(-(1 if good else -1) * (loss.beta * ratio - shift)))
        for ratio, good in zip(ratios, LABELS.tolist(), strict=True)
    ]


@pytest.mark.parametrize("loss", OWN, ids=lambda loss: type(loss).__name__)
def test_the_functions_take_it(loss):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    targets, given = torch.randint(40, (10,)), arguments(loss)
    logps = prefuse.linear_logprobs(hidden, weight, targets, impl="torch")
    out = prefuse.preference_loss(logps, cu_seqlens=CU_SEQLENS, **given)
    wanted = torch.tensor(expected_losses(loss, logps, given))
    torch.testing.assert_close(out.losses, wanted, rtol=1e-5, atol=0)
    assert {"rewards/chosen", "rewards/rejected"} <= out.metrics.keys()
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    # In one piece, and with gradients made in the forward for some whole sequences at a time.
    for workspace in (0, 1 << 30, 40 * 4 * 5 + 40 * 6 * 4):
        fused = prefuse.linear_preference_loss(
            hidden, weight, targets, CU_SEQLENS, **given, workspace=workspace, impl="torch"
        )
        torch.testing.assert_close(fused.losses, out.losses, rtol=1e-6, atol=0)
        for got, other in zip(torch.autograd.grad(fused.loss, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", OWN, ids=lambda loss: type(loss).__name__)
def test_what_it_needs_is_asked_for_and_nothing_else_is_taken(loss):
    logps, given = torch.zeros(10), arguments(loss)
    brought = {"reference": "ref_logps", "labels": "labels", "z0": "z0"}
    for need, name in brought.items():
        if need in loss.needs:
            with pytest.raises(ValueError, match=f"{type(loss).__name__} needs .*{name}"):
                prefuse.preference_loss(logps, cu_seqlens=CU_SEQLENS, **{**given, name: None})
        else:
            extra = torch.zeros(10) if name == "ref_logps" else 0.0
            with pytest.raises(ValueError, match=f"{type(loss).__name__} (takes no|uses no)"):
                prefuse.preference_loss(logps, cu_seqlens=CU_SEQLENS, **{**given, name: extra})


def test_a_need_that_nobody_knows_is_refused():
    @dataclass(frozen=True)
    class Odd(Logistic):
        needs: ClassVar = frozenset({"labels", "reward"})

    with pytest.raises(ValueError, match=r"Odd.needs names reward; expected some of reference, labels, z0"):
        prefuse.preference_loss(torch.zeros(10), None, CU_SEQLENS, Odd(), LABELS)


def test_uses_reference_says_the_same_as_needs():
    """What a loss said before there was `needs`, and what a subclass may change alone."""

    @dataclass(frozen=True)
    class Alone(prefuse.DPO):
        uses_reference = False

    class Old:
        per, uses_reference = "pair", True

        def losses(self, seq):
            return seq.chosen

    assert needs_of(Alone()) == frozenset()
    assert needs_of(Old()) == {"reference"}
    assert needs_of(prefuse.KTO()) == {"reference", "labels", "z0"}
    assert prefuse.SimPO().uses_reference is False
    assert prefuse.KTO().uses_reference is True


# ---- the engine ----------------------------------------------------------------------------------


def test_its_rows_follow_from_what_it_needs():
    assert [kind_of(loss) for loss in (*OWN, prefuse.SFT(), prefuse.DPO())] == ["labelled"] * 3 + ["sft", "pair"]


@pytest.mark.parametrize("loss", OWN, ids=lambda loss: type(loss).__name__)
def test_the_engine_trains_with_it_and_evaluates(loss, tmp_path, monkeypatch, caplog):
    """Only the name of a loss is a setting, so the test puts its own in the place of the one that is named."""
    config = settings(
        model_name_or_path=save_model(tmp_path / "model"), dataset_name=write_rows(tmp_path / "rows.jsonl", LABELLED),
        output_dir=str(tmp_path / "run"), loss_type="kto", max_steps=4, eval_fraction=0.3, learning_rate=2e-2,
    )  # fmt: skip
    monkeypatch.setattr(Config, "loss", lambda self: loss)
    train(config, "train")
    first, *_, last = (row for row in read_log(tmp_path / "run") if "loss" in row)
    log = {name: value for row in read_log(tmp_path / "run") for name, value in row.items()}
    assert ("kl" in log) == ("z0" in loss.needs)
    assert ("eval_kl_to_ref" in log) == ("reference" in loss.needs)
    assert "eval_loss" in log
    assert "eval_rewards/margins" in log
    if "reference" in loss.needs:  # the first loss is that of log-ratio 0, and no warning says otherwise
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert "first loss" not in caplog.text
    assert last["loss"] < first["loss"]


# ---- TRL's trainer -------------------------------------------------------------------------------


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("loss", OWN, ids=lambda loss: type(loss).__name__)
def test_the_trainer_for_trl_trains_with_it(loss, tmp_path):
    trl = pytest.importorskip("trl")
    from prefuse.trl import KTOTrainer
    from trainer_runs import LABELLED as ROWS
    from trainer_runs import build, log_of, save

    model = save(tmp_path, "llama")
    trainer = build(KTOTrainer, model, ROWS, tmp_path, trl.KTOConfig, {"loss": loss}, max_steps=2)
    assert (trainer.ref_model is None) == ("reference" not in loss.needs)
    trainer.train()
    first, second, *_ = log_of(trainer)
    assert ("kl" in first) == ("z0" in loss.needs)
    if "reference" in loss.needs:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] != first["loss"]


def test_the_trainer_for_trl_takes_a_reference_free_kto(tmp_path):
    """Its z0 is the mean log-probability of mismatched completions, which is below 0."""
    trl = pytest.importorskip("trl")
    from prefuse.trl import KTOTrainer
    from trainer_runs import LABELLED as ROWS
    from trainer_runs import build, log_of, save

    loss = prefuse.KTO(reference_free=True)
    trainer = build(KTOTrainer, save(tmp_path, "llama"), ROWS, tmp_path, trl.KTOConfig, {"loss": loss}, max_steps=1)
    assert trainer.ref_model is None
    trainer.train()
    first = log_of(trainer)[0]
    assert first["kl"] < -1.0
    assert first["logps/chosen"] / 2 > first["kl"] > 2 * first["logps/chosen"]


def test_a_trainer_for_pairs_refuses_it(tmp_path):
    trl = pytest.importorskip("trl")
    from prefuse.trl import DPOTrainer
    from trainer_runs import ROWS, build, save

    @dataclass(frozen=True)
    class Labelled(prefuse.DPO):
        needs = frozenset({"reference", "labels"})

    for loss, message in (
        (Logistic(), "Logistic is a loss per sequence: DPOTrainer takes losses per pair"),
        (Labelled(), "Labelled needs labels, which the rows of DPOTrainer do not bring"),
    ):
        with pytest.raises(ValueError, match=message):
            build(DPOTrainer, save(tmp_path, "llama"), ROWS, tmp_path, trl.DPOConfig, {"loss": loss})
