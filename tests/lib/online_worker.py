"""One rank of tests/engine/test_online_ranks.py: `prefuse online`, case after case.

python online_worker.py CASES.json FOLDER          with RANK, WORLD_SIZE and PREFUSE_RENDEZVOUS set, or alone

A case holds settings, and besides: "drawn", answers that depend on the prompt alone, so that one process and several
learn from the same; "kill_at", the step before which the process ends as if by SIGKILL; "stop_at", the step before
which the case alone ends, by an error that nothing catches.
"""

import contextlib
import gc
import json
import os
import random
import sys
from pathlib import Path

import torch

from prefuse.engine import train as train_module
from prefuse.engine.model.sampling import Answer
from prefuse.engine.online import PromptRows
from prefuse.engine.rounds.sampler import OwnModel
from prefuse.engine.run.ranks import leave
from prefuse.engine.train import train
from tiny_run import settings


class CutOffError(Exception):
    pass


def drawn(source, prompts, count, seed, what):
    """(P, count) short answers of tokens 20 to 290, some of them cut off."""

    def answer(row, k):
        rng = random.Random(f"{row} {k}")
        ids = [rng.randint(20, 290) for _ in range(rng.randint(1, 7))]
        stopped = rng.random() < 0.8
        return Answer([*ids, 1] if stopped else ids, source.tokenizer.decode(ids), stopped)

    return [[answer(prompt.row, k) for k in range(count)] for prompt in prompts]


def run_case(case: dict) -> None:
    fixed, kill_at, stop_at = case.pop("drawn", False), case.pop("kill_at", None), case.pop("stop_at", None)
    train_module.plot_curves = lambda *_: None
    sampled, step = OwnModel.answers, train_module.optimizer_step
    done = []

    def stepped(run, *args):
        if len(done) == kill_at:
            os._exit(9)
        if len(done) == stop_at:
            raise CutOffError
        done.append(1)
        return step(run, *args)

    OwnModel.answers = drawn if fixed else sampled
    train_module.optimizer_step = stepped
    try:
        with contextlib.suppress(CutOffError):
            train(settings("online", **case), "online", PromptRows())
    finally:
        OwnModel.answers, train_module.optimizer_step = sampled, step


def main() -> None:
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()).values():
        run_case(case)
        gc.collect()
    leave(0)


if __name__ == "__main__":
    main()
