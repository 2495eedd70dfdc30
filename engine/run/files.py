"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prefuse.engine.errors import UserError

CLOCK = 2.0  # seconds by which a file's time and a process's may differ

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def published_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `final` when the block ends well and vanishes when it does not."""
    aside = final.with_name(final.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with file_faults_as_oserror():
            yield aside
        publish(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def aside_of(final: Path) -> Path:
    """A new name beside `final` that says whose it is: several runs may write there at once."""
    return final.with_name(f"{final.name}.{os.getpid()}-{socket.gethostname()}-{uuid.uuid4().hex[:8]}.tmp")


def clear_dead(folder: Path) -> None:
    """What processes of this machine have left there that were killed while they wrote."""
    for path in folder.glob("*.tmp"):
        match = re.search(r"\.(\d+)-(.+)-[0-9a-f]{8}\.tmp$", path.name)
        if match and match[2] == socket.gethostname() and not may_write(int(match[1]), path):
            shutil.rmtree(path, ignore_errors=True)


def may_write(pid: int, path: Path) -> bool:
    """Whether the process may still be the one that wrote there, rather than a later one of that number."""
    if not Path("/proc/stat").exists():  # no Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True
    started = process_start(pid)
    if started is None:
        return False
    try:
        written, boot = path.stat().st_mtime, re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    except OSError:
        return True
    return boot is None or int(boot[1]) + started / os.sysconf("SC_CLK_TCK") <= written + CLOCK


def process_start(pid: int) -> int | None:
    """When the process began, in clock ticks since boot: two processes with one pid differ in it. None: no process, or
    one that has ended and whose parent has not asked how."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def publish(aside: Path, final: Path) -> None:
    """`aside` becomes `final`, in the place of what was there."""
    for path in aside.rglob("*"):
        flush(path)
    flush(aside)
    before = final.with_name(final.name + ".old")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    aside.rename(final)
    flush(final.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def file_faults_as_oserror() -> Iterator[None]:
    """safetensors has an error of its own for a full disk, and for a file that is cut short."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from None


def json_text(value: object, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A name to write to, which becomes `final` when the block ends well and vanishes when it does not."""
    aside = final.with_name(final.name + ".tmp")
    try:
        yield aside
        flush(aside)
        aside.replace(final)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def is_number(value: object) -> bool:
    """Whether what a file of JSON holds is a number that a float can be, and no true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def write_whole(path: Path, text: str) -> None:
    """The file appears whole, in the place of what was there."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_figure(figure: "Figure", path: Path, dpi: int) -> None:
    """An image of matplotlib, in the format that the name ends with; it appears whole."""
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=dpi, format=path.suffix.lstrip(".") or "png")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Before anything is written: a disk that fills up half-way through is found too late."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} takes about {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB free; nothing "
            "was written and what was there before is whole. Free some space, or lower save_total_limit"
        )


def flush(path: Path) -> None:
    """fsync, for a file's content or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
