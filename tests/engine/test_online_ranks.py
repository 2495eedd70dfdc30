"""`prefuse online` on two ranks learns what one process learns, and goes on after a kill with the same bits.

With one process one algorithm of each kind is compared: grpo (advantages over the groups of all ranks), iterative_dpo
(pairs), ppo (a value head, advantages whitened over all ranks), reinforce (advantages against the batch), kto (z0 over
both ranks); all weights and LoRA; ddp and fsdp. There the answers depend on their prompts alone: what is sampled
depends on the rank by design. After a cut every algorithm goes on to the same bits.
"""

import json

import pytest
import torch

import ranks
from online_runs import PROMPTS, write_rule
from tiny_run import read_log, save_model, weights, write_rows

pytestmark = pytest.mark.slow

CASES = {  # those of two ranks, against the same run in one process
    "grpo full ddp": {"algorithm": "grpo", "beta": 0.1}, "grpo lora fsdp": {"algorithm": "grpo", "beta": 0.1},
    "iterative_dpo full fsdp": {"algorithm": "iterative_dpo", "pairs": "all"},
    "iterative_dpo lora ddp": {"algorithm": "iterative_dpo"},
    "ppo full fsdp": {"algorithm": "ppo", "num_iterations": 2}, "ppo lora ddp": {"algorithm": "ppo"},
    "reinforce full ddp": {"algorithm": "reinforce"}, "rloo full fsdp": {"algorithm": "rloo"},
    "kto full ddp": {"algorithm": "kto"}, "online_dpo full ddp": {"algorithm": "online_dpo"},
    "best_of_n full fsdp": {"algorithm": "best_of_n"},
}  # fmt: skip
CLOCK = {"tokens_per_second", "samples_per_second", "pairs_per_second", "mfu"}
CUT = {"tokens_saved", "clip_ratio/low_min", "clip_ratio/high_max"}  # means over microbatches of their extremes


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model_name_or_path": save_model(folder / "model"), "dataset_name": write_rows(folder / "p.jsonl", PROMPTS),
        "scorer": [f"{write_rule(folder)}:vowels"], "num_generations": 4, "max_completion_length": 8, "max_steps": 2,
        "learning_rate": 3e-3, "adam_epsilon": 1e-3, "score_cache": "none", "eval_fraction": 0.25, "eval_steps": 2,
    }  # fmt: skip


def run(size, folder, cases):
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks.run(size, folder, ranks.LIB / "online_worker.py", "cases.json")


@pytest.fixture(scope="module")
def runs(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        made = {}
        for name, about in CASES.items():
            _, weighed, parallel = name.split()
            case = given | about | {"drawn": True, "output_dir": str(folder / f"{name} {size}")}
            case |= {"use_peft": True, "lora_r": 2} if weighed == "lora" else {}
            made[name] = case | {"per_device_train_batch_size": 16 // size, "parallel": parallel if size > 1 else "ddp"}
        run(size, folder / str(size), made)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_process_learns(name, runs):
    alone, both = (runs / f"{name} {size}" for size in (1, 2))
    for a, b in zip(read_log(both), read_log(alone), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - CLOCK - CUT:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-6), key
    before, after = weights(alone), weights(both)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-5 * value.abs().max().item())


KILLED = {"grpo": "ddp", "iterative_dpo": "fsdp", "ppo": "ddp"}  # each kill costs a launch of its own
STOPPED = {  # the others, within one launch: the fourth step raises on both ranks, and nothing more is written
    "rloo": "fsdp", "reinforce": "ddp", "online_dpo": "ddp", "kto": "fsdp", "best_of_n": "ddp"
}  # fmt: skip


@pytest.fixture(scope="module")
def cut_runs(given, tmp_path_factory):
    """The folder of each algorithm's run that was never cut off, and of one that was and has gone on."""
    folder = tmp_path_factory.mktemp("cut runs")
    cases, cut = {}, {}
    for algorithm, parallel in (KILLED | STOPPED).items():
        case = given | {"algorithm": algorithm, "parallel": parallel, "per_device_train_batch_size": 8}
        case |= {"num_iterations": 2, "max_steps": 5, "eval_fraction": 0.0}
        cases[algorithm] = case | {"output_dir": str(folder / f"{algorithm} whole")}
        cut[algorithm] = case | {"output_dir": str(folder / algorithm), "save_steps": 3}
    run(2, folder / "whole", cases | {f"{a} stopped": cut[a] | {"stop_at": 4} for a in STOPPED})
    for algorithm in KILLED:
        killed = folder / f"{algorithm} killed"
        killed.mkdir()
        (killed / "cases.json").write_text(json.dumps({"cut": cut[algorithm] | {"kill_at": 4}}))
        ended = ranks.finish(ranks.start(2, killed, ranks.LIB / "online_worker.py", "cases.json"))
        assert [code for code, *_ in ended] == [9, 9]
    assert not [name for name in cut if (folder / name / "model.safetensors").exists()]
    run(2, folder / "resumed", {name: case | {"resume": True} for name, case in cut.items()})
    return folder


@pytest.mark.parametrize("algorithm", KILLED | STOPPED)
def test_two_ranks_that_were_cut_off_go_on_to_the_same_bits(algorithm, cut_runs):
    """Within a round, after a checkpoint: both ranks' own samples are read again."""
    whole, again = cut_runs / f"{algorithm} whole", cut_runs / algorithm
    for x, y in zip(weights(whole).values(), weights(again).values(), strict=True):
        assert torch.equal(x, y)
    rounds = [sorted((folder / "samples").glob("*.jsonl")) for folder in (whole, again)]
    assert [path.name for path in rounds[0]] == [f"round-{n:05}.{r}-of-2.jsonl" for n in range(3) for r in (1, 2)]
    for one, other in zip(*rounds, strict=True):
        assert one.read_text() == other.read_text()
