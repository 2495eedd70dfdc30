"""A server that forks ranks of runs: the libraries are imported once, so a start costs a fraction of a second.

Each line on stdin is JSON: {"argv": [...], "size": k, "store": path, "log": path, and "noise", "slow" and "drift" if
wanted}. It starts k ranks with the `prefuse` command line `argv` and answers with their process ids; {"wait": [pids]}
answers with their exit codes (negative: killed by that signal).
"""

import json
import os
import sys


def start(rank: int, order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["size"])}
    os.environ["PREFUSE_RENDEZVOUS"] = f"file://{order['store']}"
    if order["size"] == 1:
        del os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]
    code = 1
    try:
        if order.get("noise"):
            add_noise()
        if order.get("drift") and rank == 1:
            drift()
        if order.get("slow"):
            slow_down(order["slow"])
        code = run(order["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(argv: list[str]) -> int:
    import traceback

    from prefuse.engine.cli import main

    try:
        return main(argv)
    except BaseException:
        traceback.print_exc()
        return 1


def add_noise() -> None:
    """Every loss is multiplied by a random number of its rank: a resumed run must draw the next one of that rank."""
    import dataclasses

    import torch

    from prefuse.engine import train

    real = train.fused_loss

    def noisy(*args):
        out = real(*args)
        return dataclasses.replace(out, loss=out.loss * (1 + torch.rand(())))

    train.fused_loss = noisy


def slow_down(seconds: float) -> None:
    import time

    from prefuse.engine import train

    real = train.optimizer_step

    def slow(*args):
        time.sleep(seconds)
        return real(*args)

    train.optimizer_step = slow


def drift() -> None:
    """One weight of this rank goes its own way, as after a gradient that was not summed."""
    import torch

    from prefuse.engine import train

    real = train.optimizer_step

    def drifting(run, *args):
        result = real(run, *args)
        with torch.no_grad():
            run.lm.model.model.norm.weight[3] += 1e-3
        return result

    train.optimizer_step = drifting


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (what a fork then has already)

    import prefuse.engine.train  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["wait"]]
            print(json.dumps(codes), flush=True)
        else:
            print(json.dumps([start(rank, order) for rank in range(order["size"])]), flush=True)


if __name__ == "__main__":
    main()
