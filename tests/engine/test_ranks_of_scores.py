"""On two ranks: a scorer while training says what it says in one process, and reward heads under FSDP2 learn what one
process learns, also across a kill.
"""

import json

import pytest
import torch

import ranks
from prefuse.engine.model.reward_model import heads_of
from tiny_run import PAIRS, read_log, save_model, weights, write_rows

pytestmark = pytest.mark.slow

CLOCK = {"tokens_per_second", "samples_per_second", "pairs_per_second", "mfu", "tokens_saved"}
# The command line, but killed as the step KILL_AT begins.
PROGRAM = """
import os
from prefuse.engine import cli, train
real = train.optimizer_step

def optimizer_step(run, share, *rest):
    if share.step == int(os.environ.get("KILL_AT", -1)):
        os._exit(9)
    return real(run, share, *rest)

train.optimizer_step = optimizer_step
cli.program()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "program.py").write_text(PROGRAM)
    rows, held = write_rows(folder / "pairs.jsonl", PAIRS[:9]), write_rows(folder / "held.jsonl", PAIRS[9:])
    words = ["--model_name_or_path", save_model(folder / "model"), "--dataset_name", rows, "--eval_dataset", held,
             "--device", "cpu", "--max_length", 64, "--learning_rate", 1e-2, "--adam_epsilon", 1e-2, "--logging_steps",
             1, "--eval_steps", 2, "--max_steps", 4, "--per_device_eval_batch_size", 1]  # fmt: skip
    return folder / "program.py", words


def run(size, folder, files, command, *words, code=0):
    """`prefuse COMMAND` on so many ranks, eight pairs a step; returns what it said."""
    folder.mkdir(exist_ok=True)
    program, given = files
    words = [program, command, *given, "--per_device_train_batch_size", 8 // size, *words]
    (folder / "store").unlink(missing_ok=True)
    ended = ranks.finish(ranks.start(size, folder, *words))
    assert [one[0] for one in ended] == [code] * size, [err[-2000:] for *_, err in ended]
    return "".join(out for _, out, _ in ended)


def same_logs(first, second, but=()):
    for a, b in zip(read_log(first), read_log(second), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - CLOCK - set(but):
            assert a[key] == (b[key] if b[key] is None else pytest.approx(b[key], rel=1e-4, abs=2e-6)), key


def same_weights(first, second, share):
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=share * value.abs().max().item())


def test_a_scorer_while_training_on_two_ranks(files, tmp_path):
    """One rank looks, all decide by it: the same numbers, the same best checkpoint, and the run ends at one step."""
    words = ["--scorer", "regex=green|blue", "--gold_scorer", "length", "--num_prompts", 3, "--max_new_tokens", 6,
             "--temperature", 0, "--metric_for_best_model", "kl", "--greater_is_better", "true",
             "--load_best_model_at_end", "true", "--early_stopping_patience", 1, "--save_steps", 2]  # fmt: skip
    said = {}
    for size in (1, 2):
        said[size] = run(size, tmp_path / f"on {size}", files, "train", *words, "--output_dir", tmp_path / str(size))
    same_logs(tmp_path / "1", tmp_path / "2")
    looks = [row for row in read_log(tmp_path / "2") if "eval_gold_score" in row]
    assert [row["step"] for row in looks] == [0, 2, 4]
    assert looks[0]["eval_kl"] == pytest.approx(0, abs=1e-9)
    assert looks[1]["eval_kl"] > 1e-3
    same_weights(tmp_path / "1", tmp_path / "2", 1e-4)
    best = [[line for line in said[size].splitlines() if "best eval_kl" in line] for size in (1, 2)]
    assert len(best[0]) == len(best[1]) == 1  # the main rank alone speaks


def test_a_scorer_that_fails_ends_all_ranks_in_one_line(files, tmp_path):
    """And one that only misses some rows ends none."""
    (tmp_path / "f.py").write_text("def f(prompts, completions, **_):\n    raise RuntimeError('no')\n")
    words = ["--scorer", tmp_path / "none.py:f", "--num_prompts", 2, "--max_new_tokens", 2, "--output_dir"]
    run(2, tmp_path / "on 2", files, "train", *words, tmp_path / "a", code=2)
    words[1] = f"{tmp_path / 'f.py'}:f"
    said = run(2, tmp_path / "on 2", files, "train", *words, tmp_path / "b", "--max_steps", 1)
    assert "no score for" in said


def test_reward_heads_under_fsdp_learn_what_one_process_learns(files, tmp_path):
    words = ["--reward_heads", 3, "--save_steps", 2, "--output_dir"]
    run(1, tmp_path / "on 1", files, "reward", *words, tmp_path / "alone")
    fsdp = ["--parallel", "fsdp"]
    run(2, tmp_path / "on 2", files, "reward", *words, tmp_path / "both", *fsdp)
    same_logs(tmp_path / "alone", tmp_path / "both")
    same_weights(tmp_path / "alone", tmp_path / "both", 1e-4)
    assert heads_of(tmp_path / "both") == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILL_AT", "3")
        run(2, tmp_path / "killed", files, "reward", *words, tmp_path / "cut", *fsdp, code=9)
    assert not list((tmp_path / "cut").glob("*model.safetensors"))
    run(2, tmp_path / "resumed", files, "reward", *words, tmp_path / "cut", *fsdp, "--resume", "true")
    for key, value in weights(tmp_path / "both").items():
        assert torch.equal(weights(tmp_path / "cut")[key], value), key
    quality = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("both", "cut")]
    assert quality[0]["eval_head_spread"] == quality[1]["eval_head_spread"] > 0
