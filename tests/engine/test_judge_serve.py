"""A judge behind `transformers serve`, a real server on loopback: the same verdicts as by its words in this process."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from prefuse.engine.score.scorers import scorer_of
from tiny_run import save_model, settings

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
NEEDS = f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'"


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=NEEDS)
def test_a_judge_behind_transformers_serve(tmp_path):
    model = save_model(tmp_path / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--host", "127.0.0.1", "--port",
               str(port), "--device", "cpu"]  # fmt: skip
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "serve.log")
        names = {"model_name_or_path": "-", "dataset_name": "-", "eval_fraction": 1.0, "loss_type": "sft"}
        how = {"judge_workers": 1, "judge_mode": "reason", "judge_max_tokens": 6}
        config = settings("eval", **names, **how, score_cache=str(tmp_path / "cache"))
        sides = (["the sky?", "grass?"], ["it is blue", "green"], ["no", "hello there"])
        served = scorer_of([f"judge=http://127.0.0.1:{port}/v1#{model}"], config, torch.device("cpu"))
        found = served.compare(*sides)
        assert served.backend.failures == 0, served.backend.spent()
        assert served.backend.tokens[0] > 100
        assert not {"server", "not asked", "no reply", "refused"} & set(found.outcomes)
        local = scorer_of([f"judge={model}"], config, torch.device("cpu")).compare(*sides)
        assert found.outcomes == local.outcomes
        assert [str(reason) for reason in found.reasons] == [str(reason) for reason in local.reasons]
        requests = served.backend.requests
        served.compare(*sides)
        assert served.backend.requests == requests  # the cache has them
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        log.close()


def wait_for(url, server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text())
