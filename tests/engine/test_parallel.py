"""The same run on 1 rank and on several, accumulated or not, sharded or not: the same gradients and metrics."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ranks
from prefuse.engine.data import Demonstration
from prefuse.engine.data.batches import examples_of
from prefuse.engine.errors import OtherRankFailed, UserError
from prefuse.engine.run.ranks import ALONE, Ranks, _buckets, share
from prefuse.engine.run.setup import _check_same_rows
from tiny_run import PAIRS, read_log, save_model, weights, write_rows

# 9 pairs in steps of 8: the second step has one pair, so one of two ranks has nothing to do in it. As KTO rows they are
# 18, in steps of 8, 8 and 2. Microbatches of 3 make a step of 8 into 3 + 3 + 2: two ranks cannot share those evenly.
DATA = {
    "num_train_epochs": 1.0,
    "save_steps": 1,
    "eval_steps": 2,
    "eval_fraction": 0.0,
    "adam_epsilon": 1e-2,
    "max_grad_norm": 0.5,
}
LOSSES = {
    "dpo": {"loss_type": "dpo"},
    "kto": {"loss_type": "kto"},
    "sft": {"command": "sft"},
    "tied": {"loss_type": "dpo", "model": "tied"},
    "reward": {"command": "reward"},
    "lora": {"loss_type": "dpo", "use_peft": True, "lora_r": 4, "lora_modules_to_save": ["norm"]},
}
CUTS = {  # (microbatch, accumulation) so that a step has 8 items
    1: {"whole": (8, 1), "accumulated": (1, 8)},
    2: {"ddp": (4, 1), "ddp accumulated": (2, 2), "ddp ones": (1, 4), "fsdp": (4, 1), "fsdp accumulated": (1, 4)},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model": save_model(folder / "model"),
        "tied": save_model(folder / "tied", tie_word_embeddings=True),
        "pairs": write_rows(folder / "pairs.jsonl", PAIRS[:9]),
        "held": write_rows(folder / "held.jsonl", PAIRS[9:]),
    }


def cases(size, files):
    made = {}
    for loss, about in LOSSES.items():
        for cut, (microbatch, accumulation) in CUTS[size].items():
            case = DATA | about | {"dataset_name": files["pairs"], "eval_dataset": files["held"]}
            case["model_name_or_path"] = files[case.pop("model", "model")]
            case |= {"per_device_train_batch_size": microbatch, "gradient_accumulation_steps": accumulation}
            # One pair or three: with two ranks one evaluates two batches, the other one.
            made[f"{loss} {cut}"] = case | {"parallel": cut.split()[0], "per_device_eval_batch_size": 1}
            if size == 1:
                made[f"{loss} {cut}"]["parallel"] = "ddp"
    if size == 2:
        made["dpo offload"] = made["dpo fsdp"] | {"fsdp_cpu_offload": True}
        made["dpo bf16 fsdp"] = made["dpo fsdp"] | {"bf16": True}
        checkpointed, compiled = {"gradient_checkpointing": True}, {"torch_compile": True}
        made["dpo fsdp checkpointed"] = made["dpo fsdp accumulated"] | checkpointed
        made["lora fsdp checkpointed"] = made["lora fsdp"] | checkpointed
        made["dpo fsdp compiled"] = made["dpo fsdp"] | checkpointed | compiled | {"torch_compile_backend": "aot_eager"}
        made["lora bf16 fsdp"] = made["lora fsdp"] | {"dtype": "bfloat16"}
    else:
        made["dpo sharded alone"] = made["dpo accumulated"] | {"parallel": "fsdp"}
        made["dpo bf16"] = made["dpo whole"] | {"bf16": True}
        made["lora bf16"] = made["lora whole"] | {"dtype": "bfloat16"}
    return made


QUICK = {  # the others are slow tests
    "dpo whole", "dpo ddp accumulated", "dpo fsdp accumulated", "kto whole", "kto ddp", "lora whole",
    "lora fsdp accumulated", "reward whole", "reward ddp",
}  # fmt: skip


def group(name):
    """The cases that run in one start of the processes."""
    return "quick" if name in QUICK else "compiled" if "compiled" in name else name.split()[0]


class Runs:
    """{case: folder}; the processes start once for a group of cases, when one of them is asked for."""

    def __init__(self, folder, files):
        self.folder, self.files, self.done = folder, files, {}

    def __getitem__(self, name):
        if name not in self.done:
            for size in (1, 2):
                made = {n: case for n, case in cases(size, self.files).items() if group(n) == group(name)}
                folder = self.folder / f"{group(name)} {size}"
                folder.mkdir()
                (folder / "cases.json").write_text(json.dumps(made))
                ranks.run(size, folder, ranks.LIB / "parallel_worker.py", "cases.json", "out", timeout=140)
                self.done |= {n: folder / "out" / n for n in made}
        return self.done[name]


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), files)


def marked(name, *values):
    return pytest.param(*values, name, marks=() if name in QUICK else pytest.mark.slow)


SAME = [marked(f"{loss} {cut}", loss) for loss in LOSSES for cut in ("accumulated", *CUTS[2])]
SAME += [marked("dpo offload", "dpo"), marked("dpo sharded alone", "dpo"), marked("dpo fsdp compiled", "dpo")]
SAME += [marked(f"{loss} fsdp checkpointed", loss) for loss in ("dpo", "lora")]


# What the clock and the cut decide.
RATES = {"tokens_per_second", "samples_per_second", "pairs_per_second", "tokens_saved", "mfu"}


@pytest.mark.parametrize(("loss", "name"), SAME)
def test_every_gradient_of_every_step_is_that_of_one_rank_in_one_go(loss, name, runs):
    """To rounding: sums of float32 in another order, through a few layers. A step of Adam passes it on to the next."""
    check_gradients(runs[name], runs[f"{loss} whole"], steps=3 if loss == "kto" else 2)


def check_gradients(folder, whole, steps):
    got, wanted = (load_file(out / "gradients.safetensors") for out in (folder, whole))
    assert got.keys() == wanted.keys()
    assert {key.split(".")[0] for key in got} == {str(step) for step in range(steps)}
    for step in range(steps):
        keys = [key for key in got if key.startswith(f"{step}.")]
        size = math.sqrt(sum(wanted[key].double().square().sum() for key in keys))
        assert size > 0
        for key in keys:
            error = (got[key].double() - wanted[key].double()).norm().item()
            assert error <= 1e-5 * wanted[key].double().norm().item() + 1e-6 * size, key


@pytest.mark.slow
def test_an_idle_rank_adds_nothing(files, tmp_path):
    """8 pairs in steps of 6 on 3 ranks: the second step has 2 pairs, and what the third rank repeats is one of them.
    (Of a step with a single pair a repetition would not show: its mean is the same.) In ones, 5 pairs are 2 + 2 + 1."""
    case = DATA | {"model_name_or_path": files["model"], "dataset_name": write_rows(tmp_path / "p.jsonl", PAIRS[:8])}
    few = case | {"dataset_name": write_rows(tmp_path / "few.jsonl", PAIRS[:5])}
    one = {"whole": case | {"per_device_train_batch_size": 6}, "few": few | {"per_device_train_batch_size": 6}}
    three = {cut: case | {"per_device_train_batch_size": 2, "parallel": cut} for cut in ("ddp", "fsdp")}
    ones = few | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    three |= {f"{cut} ones": ones | {"parallel": cut} for cut in ("ddp", "fsdp")}
    for size, made in (1, one), (3, three):
        (tmp_path / f"{size}").mkdir()
        (tmp_path / f"{size}/cases.json").write_text(json.dumps(made))
        ranks.run(size, tmp_path / f"{size}", ranks.LIB / "parallel_worker.py", "cases.json", "out", timeout=140)
    for name in three:
        folder, whole = tmp_path / "3/out" / name, tmp_path / "1/out" / ("few" if "ones" in name else "whole")
        check_gradients(folder, whole, steps=1 if "ones" in name else 2)
        last, wanted = (read_log(out / "run")[-1] for out in (folder, whole))
        for key in wanted.keys() - RATES:
            assert last[key] == pytest.approx(wanted[key], rel=1e-4, abs=2e-6), key


@pytest.mark.parametrize(("loss", "name"), SAME)
def test_metrics_and_final_weights_are_those_of_one_rank(loss, name, runs):
    wanted, got = (read_log(runs[run] / "run") for run in (f"{loss} whole", name))
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - RATES:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-6), key
    after, before = weights(runs[name] / "run"), weights(runs[f"{loss} whole"] / "run")
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) == (loss not in ("tied", "lora", "reward"))
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=2e-6 * value.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "lora"])
def test_bfloat16_layers_of_a_sharded_model_are_within_its_rounding_of_autocast(loss, runs):
    wanted, got = (load_file(runs[f"{loss} bf16{x}"] / "gradients.safetensors") for x in ("", " fsdp"))
    for key in (key for key in wanted if key.startswith("0.")):
        error = (got[key].double() - wanted[key].double()).norm()
        assert error <= 16 * torch.finfo(torch.bfloat16).eps * wanted[key].double().norm(), key
        assert got[key].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in weights(runs[f"{loss} bf16 fsdp"] / "run").values())


@pytest.mark.parametrize(
    "name", [marked(n) for n in ("dpo fsdp accumulated", "tied fsdp accumulated", "dpo ddp accumulated", "dpo offload")]
)
def test_the_model_and_every_checkpoint_load_as_transformers_models(name, runs):
    folder = runs[name] / "run"
    final = weights(folder)
    for path in (folder, folder / "checkpoint-2"):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == name.startswith("tied")
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in final.items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["dpo ddp accumulated", "dpo fsdp accumulated", "kto ddp"])
def test_the_ranks_share_the_rows_and_leave_none_out(name, runs):
    seen = json.loads((runs[name] / "rows.json").read_text())
    assert len(seen) == 2
    assert len(seen[0]) == len(seen[1])  # an idle rank too goes through the motions
    repeats = 1 if name.startswith("dpo") else 0  # where the last step has one pair, the other rank repeats it
    assert sum(len(rows) for part in seen for rows in part) == (9 if name.startswith("dpo") else 18) + repeats
    assert not set(seen[0][0]) & set(seen[1][0])


# ---------------------------------------------------------------------------------------------------------
# Who does what

TOKENS = st.lists(st.integers(1, 4000), min_size=1, max_size=60)


@given(TOKENS, st.integers(1, 8), st.integers(1, 9))
def test_a_share_has_every_example_once_and_ranks_keep_step(tokens, microbatch, size):
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    plan = [order[i : i + microbatch] for i in range(0, len(order), microbatch)]
    parts = share(plan, tokens, size)
    assert len(parts) == size
    assert sorted(i for part in parts for indices in part for i in indices) == sorted(order)
    assert all(len(indices) <= microbatch for part in parts for indices in part)
    counts = [len(part) for part in parts]
    whole = all(len(indices) == 1 for part in parts for indices in part)
    assert max(counts) - min(counts) <= (len(tokens) % size != 0 and whole)
    assert share(plan, tokens, size) == parts


@given(st.integers(2, 8), st.integers(1, 4), st.randoms(use_true_random=False))
def test_shares_are_even_in_tokens(size, rounds, random):
    """With many microbatches to deal out, nobody has more than the mean and the largest of them."""
    tokens = [random.randint(1, 4000) for _ in range(size * rounds * 3)]
    plan = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(size * rounds)]
    loads = [sum(tokens[i] for indices in part for i in indices) for part in share(plan, tokens, size)]
    assert max(loads) - min(loads) <= max(sum(tokens[i] for i in indices) for indices in plan)


def test_one_rank_does_what_is_planned_in_that_order():
    assert share([[3, 1], [2]], [9, 1, 5, 2], 1) == [[[3, 1], [2]]]


def test_a_microbatch_too_many_is_split_by_tokens():
    parts = share([[0, 1, 2], [3, 4, 5], [6, 7]], [9, 5, 4, 8, 2, 2, 1, 1], 2)
    assert sorted(map(sorted, (indices for part in parts for indices in part))) == [[0], [1, 2], [3, 4, 5], [6, 7]]


def test_buckets_hold_all_gradients_in_order_whatever_their_sizes(monkeypatch):
    monkeypatch.setattr("prefuse.engine.run.ranks.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n) for n in (3, 7, 1, 30, 2, 8)]
    buckets = list(_buckets(tensors))
    assert [[len(x) for x in bucket] for bucket in buckets] == [[3, 7], [1], [30], [2, 8]]


def test_one_process_needs_no_group():
    assert ALONE.sum_(torch.tensor([2.0])).item() == 2.0
    assert ALONE.texts("é") == ["é"]
    assert ALONE.from_main(lambda: {"a": 1}) == {"a": 1}
    assert list(Ranks().in_step([[1], [2]], [0])) == [([1], True), ([2], True)]


def test_ranks_that_read_different_rows_do_not_start():
    class Two(Ranks):
        def texts(self, text):
            return [text, "another"]

    examples = examples_of([Demonstration([1], [2], "r:1")])
    _check_same_rows(examples, None, ALONE)
    with pytest.raises(UserError, match="rank 1 read other rows than rank 0: the data changed while it was read"):
        _check_same_rows(examples, examples, Two(0, 2))


def test_what_fails_on_one_rank_fails_on_all_and_is_said_by_the_first():
    class Fake(Ranks):
        def texts(self, text):
            return [text if rank == self.rank else said for rank, said in enumerate(["", "no space", ""])]

    def full():
        raise OSError("no space")

    with pytest.raises(OtherRankFailed, match="no space"):
        Fake(0, 2).together(lambda: 1)
    with pytest.raises(OSError, match="no space"):
        Fake(1, 2).from_main(lambda: 1, meanwhile=full)
    with pytest.raises(OtherRankFailed):
        Fake(2, 3).together(full)


@pytest.mark.slow
def test_two_nodes_with_a_launchers_environment_are_one_run(files, tmp_path):
    """As torchrun starts one process on each of two machines: LOCAL_RANK is 0 on both, and they meet by TCP."""
    import os
    import socket
    import subprocess
    import sys

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": tmp_path / "run"}
    flags |= {"device": "cpu", "impl": "torch", "max_length": 64, "eval_fraction": 0, "save_steps": 1, "max_steps": 2}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    nodes = []
    for rank in range(2):
        about = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in about.items()}
        command = [sys.executable, "-m", "prefuse.engine", "train", *words]
        nodes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=250)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [row["step"] for row in read_log(tmp_path / "run") if "loss" in row] == [1, 2]
    assert (tmp_path / "run/checkpoint-2/manifest.json").exists()
    assert (tmp_path / "run/model.safetensors").exists()
