"""One rank of tests/engine/test_parallel.py: all cases with the ranks there are, and writes gradients and metrics.

python parallel_worker.py CASES.json OUT          with RANK, WORLD_SIZE and PREFUSE_RENDEZVOUS set, or alone
"""

import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from prefuse.engine import train as train_module
from prefuse.engine.run import setup as run_module
from prefuse.engine.run.ranks import leave, whole
from prefuse.engine.train import train
from tiny_run import read_log, settings


def run_case(case: dict, out: Path) -> None:
    """OUT/gradients.safetensors: <step>.<parameter> before clipping; OUT/calls.json: what this rank computed."""
    command = case.pop("command", "train")
    config = settings(command, output_dir=str(out / "run"), **case)
    gradients, batches, runs = {}, [], []
    train_module.plot_curves = lambda *_: None
    clip, prepare, loss = train_module.clip_gradients, run_module.prepare, train_module.fused_loss

    def keep_gradients(model, limit):
        step = len(batches)
        batches.append([])
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
                continue
            gradients[f"{step}.{name}"] = whole(parameter.grad).detach().clone()
        return clip(model, limit)

    def keep_run(*args):
        runs.append(prepare(*args))
        return runs[-1]

    rows = []

    def keep_rows(lm, batch, *args):
        rows.append(batch.rows)
        return loss(lm, batch, *args)

    train_module.clip_gradients, train_module.prepare, train_module.fused_loss = keep_gradients, keep_run, keep_rows
    try:
        train(config, command)
    finally:
        train_module.clip_gradients, train_module.prepare, train_module.fused_loss = clip, prepare, loss
    ranks = runs[0].ranks
    seen = ranks.texts(json.dumps(rows))
    if ranks.main:
        save_file(gradients, out / "gradients.safetensors")
        (out / "rows.json").write_text(json.dumps([json.loads(text) for text in seen]))
        assert read_log(out / "run")
    ranks.wait()


def main() -> None:
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    for name, case in cases.items():
        out = Path(sys.argv[2]) / name
        out.mkdir(parents=True, exist_ok=True)
        run_case(case, out)
        gc.collect()
    leave(0)


if __name__ == "__main__":
    main()
