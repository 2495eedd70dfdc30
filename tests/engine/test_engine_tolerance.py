"""`gradient_tolerance` in a run: the skipped share stands in the log with the other metrics and keeps the promise.

It decides the weights, so a resumed run must have the same.
"""

import pytest
import torch

from prefuse.engine.errors import UserError
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows

TOLERANCE = 0.5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Logits as far apart as a trained model's: else nothing can be skipped."""
    folder = tmp_path_factory.mktemp("base")
    return {"model_name_or_path": save_model(folder / "model", initializer_range=0.6), "max_steps": 2}


ROWS = {
    "dpo": ("train", PAIRS, {"loss_type": "dpo"}),
    "kto": ("train", LABELLED, {"loss_type": "kto"}),
    "sft": ("sft", [{"prompt": x["prompt"], "completion": x["chosen"]} for x in PAIRS], {}),
    "lora": ("train", PAIRS, {"use_peft": True, "lora_r": 2}),
}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("kind", ROWS)
def test_a_run_logs_what_its_head_skipped(kind, base, tmp_path):
    command, rows, options = ROWS[kind]
    more = {"dataset_name": write_rows(tmp_path / "rows.jsonl", rows), "eval_fraction": 0.2, "eval_steps": 2}
    for tolerance in (0.0, TOLERANCE):
        changes = base | more | options | {"gradient_tolerance": tolerance}
        train(settings(command, **changes, output_dir=str(tmp_path / f"{tolerance}")), command)
    exact, sparse = (read_log(tmp_path / f"{tolerance}") for tolerance in (0.0, TOLERANCE))
    assert not any("head/skipped_mass" in row for row in exact)
    steps = [row for row in sparse if "loss" in row]
    assert len(steps) == 2
    shares = [row["head/skipped_mass"] for row in steps]
    assert all(0 <= share <= TOLERANCE for share in shares)
    assert any(shares)  # (a block beyond the promise is exact)
    assert not any("eval_head/skipped_mass" in row for row in sparse)
    assert steps[0]["loss"] == next(row for row in exact if "loss" in row)["loss"]
    a, b = (weights(tmp_path / f"{tolerance}") for tolerance in (0.0, TOLERANCE))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_it_decides_the_weights(base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    changes = base | {"dataset_name": rows, "output_dir": str(tmp_path / "run"), "save_steps": 1}
    train(settings(**changes, gradient_tolerance=TOLERANCE), "train")
    longer = changes | {"max_steps": 3, "resume": True}
    with pytest.raises(UserError, match=r"gradient_tolerance was 0\.5 and is now 0\.0"):
        train(settings(**longer), "train")
    train(settings(**longer, gradient_tolerance=TOLERANCE), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_tolerance": 1.0}, "gradient_tolerance must be at least 0 and below 1, got 1.0"),
        ({"gradient_tolerance": -0.1}, "gradient_tolerance must be at least 0 and below 1, got -0.1"),
        ({"gradient_tolerance": 0.1, "impl": "reference"}, "impl reference is exact: set gradient_tolerance to 0"),
    ],
)
def test_what_no_head_has_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        settings(model_name_or_path="m", dataset_name="d", output_dir="o", **change)
