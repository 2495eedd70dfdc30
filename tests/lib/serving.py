"""`transformers serve` on loopback, where its extra packages are installed."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
NEEDS = f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'" if MISSING else None


@contextmanager
def serving_transformers(log):
    """The URL up to /v1 of a server that loads each folder it is asked for. (One given at its start would pin it.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command = [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()


def wait_for(url, server, log):
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text())
