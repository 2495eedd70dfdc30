"""A template that prints the date, in whole runs: ranks that start on both sides of midnight agree on the day, and a
run that is resumed on a later day goes on as one that was never stopped, to the last bit."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from tiny_run import save_model, weights, write_rows
from tiny_tokenizer import CHATML

# Each rank's own day, for every `datetime.date.today()` of its process.
CLOCK = """
import datetime, os
class Day(datetime.date):
    @classmethod
    def today(cls):
        days = os.environ["DAYS"].split(",")
        return cls.fromisoformat(days[min(int(os.environ.get("RANK", 0)), len(days) - 1)])
datetime.date = Day
"""
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"what is {noun}?"}],
        "chosen": [{"role": "assistant", "content": "it is good"}],
        "rejected": [{"role": "assistant", "content": f"no {'the ' * i}"}],
    }
    for i, noun in enumerate(("the sky", "the sea", "grass", "a house", "good", "blue", "green", "hello"))
]


@pytest.mark.slow
def test_two_ranks_across_midnight_and_a_resume_two_days_later_are_one_run(tmp_path):
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    model = save_model(tmp_path / "model", chat_template="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(name, days, *more):
        given = {"model_name_or_path": model, "dataset_name": rows, "output_dir": str(tmp_path / name), "nproc": "2",
                 "device": "cpu", "max_length": "128", "max_steps": "4", "save_steps": "2", "save_total_limit": "0",
                 "per_device_train_batch_size": "2", "eval_fraction": "0", "learning_rate": "1e-2"}  # fmt: skip
        words = [word for setting, value in given.items() for word in (f"--{setting}", value)]
        env = os.environ | {"DAYS": days, "PYTHONPATH": str(tmp_path / "clock"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "prefuse.engine", "train", *words, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return weights(tmp_path / name)

    same_day = run("one", "2026-11-28")
    other_day = run("other", "2026-11-29")
    assert any(not torch.equal(value, other_day[name]) for name, value in same_day.items())  # the date is learned

    midnight = run("two", "2026-11-28,2026-11-29")
    assert all(torch.equal(value, same_day[name]) for name, value in midnight.items())
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["template_date"] == "2026-11-28"

    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "model.safetensors").unlink()
    resumed = run("two", "2026-11-30", "--resume")
    assert all(torch.equal(value, same_day[name]) for name, value in resumed.items())
