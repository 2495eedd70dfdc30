"""Ranks that die, drift apart, are told to stop alone, or live on two days: all end, and a resumed run ends alike."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kill_resume import LAUNCHERS_GRACE, Server, command, kill_trials, result
from prefuse.engine.data.cache import FEWEST_BYTES
from prefuse.engine.run.checkpoint import latest_checkpoint
from tiny_run import PAIRS, save_model, weights, write_rows
from tiny_tokenizer import CHATML


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_ranks_agree_to_stop_when_one_is_told_and_go_on_alike(files, server, tmp_path):
    argv = lambda name: command(files, tmp_path / name, save_steps=3, save_total_limit=0)  # noqa: E731
    assert server.run(argv("straight"), 2, tmp_path / "log", noise=True) == [0, 0]
    pids = server.start(argv("told"), 2, tmp_path / "log", noise=True, slow=0.1)
    wait_for(tmp_path / "told/checkpoint-3/manifest.json")
    os.kill(pids[1], signal.SIGUSR1)
    codes = server.wait(pids, LAUNCHERS_GRACE)
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGUSR1]  # rank 0 knows only that some rank was told
    assert "--resume goes on from there" in (tmp_path / "log.0").read_text()
    assert not (tmp_path / "told/model.safetensors").exists()
    newest = latest_checkpoint(tmp_path / "told").name
    states = load_file(tmp_path / "told" / newest / "rng.safetensors")["cpu"]
    assert len(states) == 2
    assert not torch.equal(states[0], states[1])  # each rank's own, or the noise could not tell
    assert server.run([*argv("told"), "--resume"], 2, tmp_path / "log", noise=True) == [0, 0]
    assert f"from {tmp_path / 'told' / newest}" in (tmp_path / "log.0").read_text()
    assert result(tmp_path / "told") == result(tmp_path / "straight")


def chat(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.mark.slow
def test_the_first_day_of_a_run_holds_on_a_rank_behind_midnight_and_after_a_resume(server, tmp_path):
    """The template prints the date. `days`: what the calendars of both ranks show."""
    rows = [
        {"prompt": chat("user", x["prompt"])} | {side: chat("assistant", x[side]) for side in ("chosen", "rejected")}
        for x in PAIRS
    ]
    model = save_model(tmp_path / "model", chat_template="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    dated = {"model": model, "pairs": write_rows(tmp_path / "rows.jsonl", rows)}
    with open(dated["pairs"], "a") as file:
        file.write(" " * FEWEST_BYTES)  # blanks make it long enough to be cached
    caches = {"dataset_cache": tmp_path / "ids", "reference_cache": tmp_path / "logps", "max_length": 128}

    def argv(name, **changes):
        return command(dated, tmp_path / name, save_total_limit=0, max_steps=4, **caches, **changes)

    assert server.run(argv("first", template_date="2026-02-28"), 2, tmp_path / "log") == [0, 0]
    pids = server.start(argv("run"), 2, tmp_path / "log", slow=0.1, days=["2026-02-28", "2026-03-01"])
    wait_for(tmp_path / "run/checkpoint-2/manifest.json")
    os.kill(pids[0], signal.SIGTERM)
    assert 0 not in server.wait(pids, LAUNCHERS_GRACE)
    assert not (tmp_path / "run/model.safetensors").exists()
    next_day = ["2026-03-01", "2026-03-01"]
    assert server.run([*argv("run"), "--resume"], 2, tmp_path / "log", days=next_day) == [0, 0]
    assert result(tmp_path / "run") == result(tmp_path / "first")
    assert "template_date: '2026-02-28'" in (tmp_path / "run/config.yaml").read_text()
    assert len(list((tmp_path / "ids").iterdir())) == 1  # read once: the day is a part of the key, the clock is not

    assert server.run(argv("next"), 2, tmp_path / "log", days=next_day) == [0, 0]
    assert result(tmp_path / "next") != result(tmp_path / "first")  # or the date would not be seen at all
    assert len(list((tmp_path / "ids").iterdir())) == 2


def test_a_rank_left_alone_ends_with_a_message(files, server, tmp_path):
    pids = server.start(command(files, tmp_path / "run"), 2, tmp_path / "log", slow=0.1)
    wait_for(tmp_path / "run/checkpoint-2/manifest.json")
    os.kill(pids[1], signal.SIGKILL)
    assert server.wait(pids, LAUNCHERS_GRACE) == [75, -9]
    said = (tmp_path / "log.0").read_text()
    assert "prefuse: rank 0 lost another rank, which has died or is stuck" in said
    assert "--resume goes on from it" in said
    assert "Traceback" not in said


def test_an_error_on_one_rank_is_said_once_and_ends_all(files, server, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert server.run(command(files, tmp_path / "run"), 2, tmp_path / "log") == [2, 2]
    assert "prefuse: error: output_dir" in (tmp_path / "log.0").read_text()
    assert "error" not in (tmp_path / "log.1").read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "ddp"), (2, "fsdp")),
        pytest.param((2, "ddp"), (1, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (1, "ddp"), marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on_in_the_same_order(before, after, files, server, tmp_path):
    """Equal to rounding: a step has 4 items either way."""

    def argv(name, size, parallel):
        options = {"save_steps": 3, "num_train_epochs": 1.0, "learning_rate": 1e-3, "adam_epsilon": 1e-2}
        return command(files, tmp_path / name, parallel=parallel, per_device_train_batch_size=4 // size, **options)

    out = tmp_path / "run"
    assert server.run(argv("straight", *before), before[0], tmp_path / "log") == [0] * before[0]
    pids = server.start(argv("run", *before), before[0], tmp_path / "log", slow=0.1)
    wait_for(out / "checkpoint-3/manifest.json")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.wait(pids)
    assert server.run([*argv("run", *after), "--resume"], after[0], tmp_path / "log") == [0] * after[0]
    assert "its steps were cut otherwise" in (tmp_path / "log.0").read_text()
    for name, value in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=2e-6 * value.abs().max().item())
    (_, log), (_, wanted) = result(out), result(tmp_path / "straight")
    assert [row["step"] for row in log] == [row["step"] for row in wanted]
    assert [row["loss"] for row in log if "loss" in row] == pytest.approx(
        [r["loss"] for r in wanted if "loss" in r], rel=1e-4
    )


def test_ranks_whose_weights_have_drifted_apart_save_nothing_of_it(files, server, tmp_path):
    argv = command(files, tmp_path / "run", num_train_epochs=1.0)
    assert server.run(argv, 2, tmp_path / "log", drift=True) == [1, 1]
    for rank in "01":
        said = (tmp_path / f"log.{rank}").read_text()
        assert "model.norm.weight is no longer the same on all ranks: nothing was saved of it" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_ranks_share_a_reference_cache_and_mend_what_is_damaged_in_it(files, server, tmp_path):
    """An entry each for the rows, their mismatches, and the same held out. The second run finds one of them damaged,
    the third is of one rank."""
    fixed = {"num_train_epochs": 1.0, "reference_cache": tmp_path / "cache"}
    argv = lambda out, **more: command(files, tmp_path / out, **fixed | more)  # noqa: E731
    assert server.run(argv("one"), 2, tmp_path / "log") == [0, 0]
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 4
    for entry in entries:
        assert {path.name for path in entry.glob("logps*")} == {f"logps-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (entries[0] / "logps-00002-of-00002.safetensors").write_bytes(b"damaged")  # the second rank reads it
    assert server.run(argv("two"), 2, tmp_path / "again") == [0, 0]
    said = (tmp_path / "again.0").read_text()
    damaged = f"the reference cache {entries[0]} is damaged (logps-00002-of-00002.safetensors does not have the hash"
    assert damaged in said
    assert said.count("reference log-probabilities of") == 1 + 3
    assert result(tmp_path / "two") == result(tmp_path / "one")
    assert server.run(argv("three", per_device_train_batch_size=4), 1, tmp_path / "alone") == [0]
    said = (tmp_path / "alone.0").read_text()
    assert said.count("reference log-probabilities of") == 1 + 4
    assert "computing it again" not in said


@pytest.mark.slow
def test_another_number_of_items_in_a_step_is_not_resumed(files, server, tmp_path):
    argv = command(files, tmp_path / "run", num_train_epochs=1.0)
    assert server.run(argv, 1, tmp_path / "log") == [0]
    (tmp_path / "run/model.safetensors").unlink()
    assert server.run([*argv, "--resume"], 2, tmp_path / "log") == [2, 2]
    assert (
        "a step (per_device_train_batch_size x gradient_accumulation_steps x processes) was 2 and is now 4"
        in (tmp_path / "log.0").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "kills"), [("ddp", 10), ("fsdp", 4)])
def test_killed_at_random_moments_every_resumed_run_ends_alike(parallel, kills, files, tmp_path):
    assert kill_trials(files, tmp_path, kills, parallel, seed=7) == kills
