"""Optimizers by name: what each is made of, what is said where it cannot be had, and checkpoints of any states."""

import shutil
import sys
import types
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

from prefuse.engine.errors import UserError
from prefuse.engine.run.optimizer import adamw_of, make_optimizer
from prefuse.engine.train import train
from tiny_run import PAIRS, save_model, settings, weights, write_rows


class Coarse(torch.optim.Optimizer):
    """Adam in the manner of bitsandbytes: codes of 8 bits into a table that all parameters share, a scale for each
    block, a count that is a plain number; small parameters have states of 32 bits."""

    BLOCK = 64
    made: ClassVar[list] = []

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, optim_bits=32, is_paged=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bits, self.is_paged, self.paged = optim_bits, is_paged, []
        self.table = torch.linspace(-1, 1, 256) ** 3
        self.made.append(self)

    def buffer(self, p, dtype):
        return torch.zeros_like(p, dtype=dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p)

    def update(self, group, p):
        state = self.state[p]
        coarse = self.bits == 8 and p.numel() >= 512
        dtype = torch.uint8 if coarse else torch.float32
        if not state:
            state["step"] = 0
            state["state1"], state["state2"] = (self.buffer(p, dtype) for _ in range(2))
            if coarse:
                state["qmap1"] = state["qmap2"] = self.table
                blocks = -(-p.numel() // self.BLOCK)
                state["absmax1"], state["absmax2"] = torch.zeros(blocks), torch.zeros(blocks)
        assert not self.is_paged or state["state1"].data_ptr() in self.paged
        state["step"] += 1
        assert type(state["step"]) is int
        moments = []
        for number, new, beta in ((1, p.grad, group["betas"][0]), (2, p.grad.square(), group["betas"][1])):
            moment = self.load(state, number, coarse)
            moment = torch.lerp(new, moment, beta)
            self.store(state, number, moment, coarse)
            moments.append(moment / (1 - beta ** state["step"]))
        p -= group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + group["eps"])

    def load(self, state, number, coarse):
        codes = state[f"state{number}"]
        if not coarse:
            return codes
        assert codes.dtype == torch.uint8
        values = state[f"qmap{number}"][codes.long()].flatten()
        scales = state[f"absmax{number}"].repeat_interleave(self.BLOCK)[: codes.numel()]
        return (values * scales).view(codes.shape)

    def store(self, state, number, moment, coarse):
        if not coarse:
            state[f"state{number}"].copy_(moment)
            return
        padded = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % self.BLOCK)).view(-1, self.BLOCK)
        scales = padded.abs().amax(1)
        state[f"absmax{number}"].copy_(scales)
        values = (padded / scales.clamp(min=1e-12)[:, None]).flatten()[: moment.numel()]
        middles = (self.table[1:] + self.table[:-1]) / 2
        state[f"state{number}"].copy_(torch.bucketize(values, middles).to(torch.uint8).view(moment.shape))


class Paged(Coarse):
    """States of its own making alone: what is loaded must have been asked for here."""

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        self.paged.append(buffer.data_ptr())
        return buffer

    buffer = get_state_buffer


def adamw(params, is_paged=False, **options):
    return (Paged if is_paged else Coarse)(params, is_paged=is_paged, **options)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW=adamw))
    Coarse.made.clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    data = write_rows(folder / "pairs.jsonl", PAIRS)
    return {"model_name_or_path": save_model(folder / "model"), "dataset_name": data, "save_steps": 2, "max_steps": 4}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_any_optimizers_states_are_resumed_bit_for_bit(optim, base, library, tmp_path):
    def config(name, **more):
        return settings(**base | {"optim": optim, "output_dir": str(tmp_path / name)} | more)

    train(config("straight"), "train")
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    (tmp_path / "again" / "model.safetensors").unlink()  # with a model the run would be finished
    train(config("again", resume=True), "train")
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "again")
    assert all(torch.equal(value, two[name]) for name, value in one.items())

    with safe_open(tmp_path / "again" / "checkpoint-4" / "optimizer-00001.safetensors", "pt") as tensors:
        dtypes = {key.split(".")[0]: tensors.get_tensor(key).dtype for key in tensors.keys() if "lm_head" in key}
    if "8bit" in optim:
        assert dtypes["state1"] == dtypes["state2"] == torch.uint8
        assert {"step", "qmap1", "absmax2"} < dtypes.keys()
        assert all(made.is_paged == ("paged" in optim) for made in Coarse.made)
    else:
        assert dtypes.keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_names_are_those_of_transformers(library):
    from transformers.training_args import OptimizerNames

    known = {str(name.value) for name in OptimizerNames}
    for name, bits, paged in ("adamw_8bit", 8, False), ("paged_adamw_8bit", 8, True), ("paged_adamw_32bit", 32, True):
        made = adamw_of(name)([torch.nn.Parameter(torch.ones(3))], lr=1.0)
        assert (made.bits, made.is_paged) == (bits, paged)
        assert name in known
    assert {"adamw_torch", "adamw_torch_fused"} <= known


def test_settings_reach_the_optimizer(base, library):
    model = torch.nn.Linear(3, 4)
    options = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_epsilon": 1e-4, "weight_decay": 0.2}
    for optim in ("adamw_torch", "adamw_torch_fused", "adamw_8bit"):
        made = make_optimizer(model, settings(**base | options | {"output_dir": "o", "optim": optim}))
        wanted = [([model.weight], 0.2), ([model.bias], 0.0)]
        for group, (parameters, decay) in zip(made.param_groups, wanted, strict=True):
            assert group["params"] == parameters
            assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.7), 1e-4)
            assert group["weight_decay"] == decay
        assert (made.defaults.get("fused") is True) == (optim == "adamw_torch_fused")


def test_a_library_that_is_absent_or_cannot_run_is_one_line(base, monkeypatch):
    config = settings(**base | {"output_dir": "o", "optim": "adamw_8bit"})
    model = torch.nn.Linear(3, 4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"optim adamw_8bit: .*pip install bitsandbytes, or take optim adamw_torch"):
        make_optimizer(model, config)

    class Broken(torch.optim.SGD):
        fails = True

        def __init__(self, params, lr, **options):
            super().__init__(params, lr=lr)

        def step(self):
            if self.fails:
                raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW=Broken))
    with pytest.raises(UserError, match="optim adamw_8bit cannot run on cpu: no kernel; take optim adamw_torch"):
        make_optimizer(model, config)
    Broken.fails = False
    with pytest.raises(UserError, match="optim adamw_8bit does not move a weight on cpu"):
        make_optimizer(model, config)
