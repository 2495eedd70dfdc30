"""Several ranks of one run as processes of this machine."""

import os
import subprocess
import sys
from pathlib import Path

LIB = Path(__file__).parent


def environment(rank: int, size: int, store: Path) -> dict[str, str]:
    """What a launcher tells a rank; of pytest's own settings only the search path is passed on."""
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "PREFUSE_RENDEZVOUS": f"file://{store}",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LIB),
    }  # fmt: skip


def start(size: int, folder: Path, *command: object) -> list[subprocess.Popen]:
    """`python *command` on each of `size` ranks, which meet in `folder`."""
    store = folder / "store"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment(rank, size, store), cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(workers: list[subprocess.Popen], timeout: float = 200) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    output = [worker.communicate(timeout=timeout) for worker in workers]
    return [(worker.returncode, *texts) for worker, texts in zip(workers, output, strict=True)]


def run(size: int, folder: Path, *command: object, timeout: float = 200) -> None:
    """Run to a good end on all ranks."""
    results = finish(start(size, folder, *command), timeout)
    codes = [code for code, *_ in results]
    assert codes == [0] * size, f"exit codes {codes}\n" + "\n\n".join(err[-3000:] for *_, err in results)
