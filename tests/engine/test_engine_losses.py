"""`prefuse train` and `prefuse eval` with the losses beside DPO, IPO and KTO."""

import math

import pytest

from prefuse.engine.config.settings import LOSS_TYPES
from prefuse.engine.errors import UserError
from prefuse.engine.evaluate import evaluate_command
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, write_rows

LN2 = math.log(2)
FIRST_LOSS = {  # of a policy that is its reference
    "sigmoid": LN2, "sigmoid_norm": LN2, "hinge": 1.0, "robust": LN2, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
    "exo_pair": -LN2 - 0.5 * math.log(1e-3 * (1 - 1e-3)), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5, "f_dpo": LN2, "ld_dpo": LN2, "una": LN2, "una_pair": 2 * LN2, "aot": LN2,
    "aot_unpaired": LN2, "beta_dpo": LN2,
}  # fmt: skip
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo", "slic")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def run(loss_type, model, pairs, out, **changes):
    defaults = {"max_steps": 2, "max_loss_ratio": 1e9}
    config = settings(
        model_name_or_path=model, dataset_name=pairs, output_dir=str(out), loss_type=loss_type, **defaults | changes
    )
    train(config, "train")
    return [row for row in read_log(out) if "loss" in row]


def test_every_loss_type_is_tried_here_or_with_dpo():
    """Those that rows must feed with more than text are tried in test_losses_learn.py alone."""
    fed = {"odpo", "modpo", "mo_kto", "una_score", "csft"}
    assert {*FIRST_LOSS, *WITHOUT_REFERENCE, *fed, "rpo", "dpo", "ipo", "kto", "ppo_clip"} == set(LOSS_TYPES)


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("loss_type", FIRST_LOSS)
def test_a_run_starts_at_the_loss_of_no_preference(loss_type, model, pairs, tmp_path, caplog):
    steps = run(loss_type, model, pairs, tmp_path / "run")
    first = FIRST_LOSS[loss_type]
    assert abs(steps[0]["loss"] - first) <= 1e-5 * max(1, first)
    assert steps[0]["rewards/margins"] == 0
    assert steps[1]["rewards/margins"] != 0
    assert "was expected" not in caplog.text


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("loss_type", [*WITHOUT_REFERENCE, "rpo"])
def test_likelihoods_rise_and_no_guard_mistakes_them_for_a_reference(loss_type, model, pairs, tmp_path, caplog):
    steps = run(loss_type, model, pairs, tmp_path / "run", max_steps=12, learning_rate=2e-2, eval_fraction=0.2)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[-1]["logps/chosen"] > steps[0]["logps/chosen"] or loss_type == "simpo"
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert "guard" not in caplog.text
    evaluations = [row for row in read_log(tmp_path / "run") if "eval_loss" in row]
    assert ("eval_kl_to_ref" in evaluations[-1]) == (loss_type == "rpo")


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("loss_type", "setting", "value"),
    [
        ("simpo", "beta", 0.5),
        ("simpo", "simpo_gamma", 0.1),
        ("simpo", "label_smoothing", 0.3),
        ("slic", "slic_delta", 30.0),
        ("slic", "nll_weight", 0.7),
        ("orpo", "nll_weight", 0.7),
        ("cpo", "nll_weight", 0.7),
        ("rpo", "nll_weight", 0.7),
        ("discopop", "discopop_tau", 0.5),
        ("exo_pair", "label_smoothing", 0.3),
    ],
)
def test_a_setting_reaches_the_loss(loss_type, setting, value, model, pairs, tmp_path):
    plain = run(loss_type, model, pairs, tmp_path / "plain")
    other = run(loss_type, model, pairs, tmp_path / "other", **{setting: value})
    assert any(a["loss"] != b["loss"] for a, b in zip(plain, other, strict=True))


ON_ROWS = [
    ("f_dpo", {"f_divergence_type": "forward_kl"}),
    ("ld_dpo", {"ld_alpha": 0.0}),
    ("una_pair", {"una_distance": "mse"}),
    ("ppo_clip", {"ppo_clip": 0.01}),
    ("kto", {"kto_value": "linear"}),
    ("kto", {"kto_reference_point": 2.0}),
]


@pytest.mark.parametrize(("loss_type", "change"), ON_ROWS, ids=str)
def test_a_setting_of_a_loss_that_rows_feed_reaches_it(loss_type, change):
    """Without a run: the loss that the settings name has the number, and no other loss takes it."""
    paths = {"model_name_or_path": "model", "dataset_name": "rows", "output_dir": "out"}
    config = settings(**paths, loss_type=loss_type, **change)
    assert config.loss() != settings(**paths, loss_type=loss_type).loss()
    with pytest.raises(UserError, match=f"{next(iter(change))} has a meaning only with loss_type .*{loss_type}"):
        settings(**paths, loss_type="ipo", **change)


def test_ppo_clip_learns_from_labels(model, pairs, tmp_path):
    steps = run("ppo_clip", model, pairs, tmp_path / "run", max_steps=6, learning_rate=2e-2)
    assert steps[-1]["rewards/margins"] > 0


def test_a_policy_without_reference_is_evaluated_against_a_model(model, pairs, tmp_path):
    run("simpo", model, pairs, tmp_path / "run")
    config = settings(
        "eval", model_name_or_path=str(tmp_path / "run"), ref_model_name_or_path=model, dataset_name=pairs,
        loss_type="simpo", eval_fraction=1.0,
    )  # fmt: skip
    metrics = evaluate_command(config)
    assert metrics["kl_to_ref"] > 0
    assert metrics["loss"] > 0
    assert metrics["rewards/chosen"] < 0  # beta times a mean log-probability
