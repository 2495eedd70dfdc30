"""QLoRA: adapters beside a base in 4 bits. What needs bitsandbytes is skipped where it is not installed."""

import importlib.util
import json
import math

import pytest
import torch

from prefuse.engine.cli import main
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_model
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, and bitsandbytes' own
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    shape = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 numbers share a scale
    return {"model_name_or_path": save_model(folder / "model", **shape),
            "dataset_name": write_rows(folder / "pairs.jsonl", PAIRS)}  # fmt: skip


def test_what_cannot_be(files, monkeypatch):
    with pytest.raises(UserError, match="give --use_peft true"):
        settings(**files, output_dir="-", load_in_4bit=True)
    with pytest.raises(UserError, match="bnb_4bit_quant_type has a meaning only with load_in_4bit true"):
        settings(**files, output_dir="-", bnb_4bit_quant_type="fp4")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    config = settings(**files, output_dir="-", load_in_4bit=True, use_peft=True)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_model(files["model_name_or_path"], config, torch.device("cpu"), trains=True)


@needs_bitsandbytes
def test_adapters_learn_beside_a_base_in_4_bits(files, tmp_path):
    run = tmp_path / "run"
    options = {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "use_bnb_nested_quant": True}
    config = settings(**files, output_dir=str(run), max_steps=8, **options)
    lm = load_model(files["model_name_or_path"], config, torch.device("cpu"), trains=True)
    kinds = {type(m).__name__ for m in lm.model.modules()}
    assert "Linear4bit" in kinds
    assert type(lm.model.lm_head).__name__ == "Linear"
    train(config, "train")
    losses = [row["loss"] for row in read_log(run) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the same base, adapters off
    assert losses[-1] < 0.6
    # Read again with the base in 4 bits, it is the model that was trained; on the whole base it is nearly that.
    common = ["eval", "--model_name_or_path", str(run), "--dataset_name", files["dataset_name"], "--device", "cpu",
              "--ref_model_name_or_path", files["model_name_or_path"], "--max_length", "64"]  # fmt: skip
    found = {}
    for name, more in ("4 bits", ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"]), ("whole", []):
        out = tmp_path / f"{name}.json"
        assert main([*common, *more, "--output_file", str(out)]) == 0
        found[name] = json.loads(out.read_text())["rewards/margins"]
    assert found["4 bits"] > 0
    assert found["whole"] == pytest.approx(found["4 bits"], rel=0.5)
