"""Who owns a run folder: one run, which has left its mark there and works in it alone.

    run.json   the mark: the command, its settings, and its state: "set-up", "training" or "finished"
    run.lock   while a run works there: its process, host and time of start; the kernel frees it when the process ends

A folder without the mark is none of ours: nothing in it is renamed, replaced or removed. A start that is refused or
stopped before its first step takes away what it had put there.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import shutil
import socket
from pathlib import Path

from prefuse.engine.errors import UserError
from prefuse.engine.run.files import json_text, process_start, write_whole
from prefuse.engine.run.proof import checkpoints

logger = logging.getLogger(__name__)

MARK = "run.json"
LOCK = "run.lock"
BEFORE_TRAINING = {MARK, LOCK, "skipped.jsonl", f"{MARK}.tmp", "skipped.jsonl.tmp"}  # of a start that was killed
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


class RunFolder:
    """A run's folder, held by this process until `close`. `path` is where it is now, also after it was moved."""

    def __init__(self, given: Path, holds: bool = True):
        self.given = given
        self.mark: dict = {}
        self._lock: int | None = None
        self._folder: int | None = None
        self._made = False
        if holds:
            self._made = not given.exists()
            given.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = _lock(given)
                self._folder = os.open(given, os.O_RDONLY)
                self.mark = read_mark(given)
            except BaseException:
                self.close()
                raise

    @property
    def path(self) -> Path:
        if self._folder is None or _same(self._folder, self.given):
            return self.given
        now = Path(f"/proc/self/fd/{self._folder}")
        if not now.exists():
            raise UserError(f"output_dir {self.given} was removed while its run went on: there is no place to write to")
        before, self.given = self.given, now.resolve()
        logger.warning("output_dir %s is now %s: the run goes on there", before, self.given)
        return self.given

    @property
    def state(self) -> str:
        return self.mark.get("state", "set-up")

    @property
    def finished(self) -> bool:
        """With its model there: where that was removed, the last checkpoint makes it again."""
        return self.state == "finished" and any((self.given / name).exists() for name in WEIGHTS)

    def write_mark(self, **about: object) -> None:
        self.mark = {**self.mark, **about}
        write_whole(self.path / MARK, json_text(self.mark, indent=1))

    def close(self) -> None:
        """Frees the folder; removes what a run has put there that never began to train."""
        with contextlib.suppress(UserError, OSError):
            if self._lock is not None and self.state == "set-up":
                for name in BEFORE_TRAINING - {LOCK}:
                    (self.path / name).unlink(missing_ok=True)
            if self._lock is not None:
                (self.path / LOCK).unlink(missing_ok=True)
            if self._made and self.state == "set-up":
                self.path.rmdir()
        for descriptor in (self._lock, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        _HELD.discard(self._lock)
        self._lock = self._folder = None


def open_folder(given: Path, resume: bool, models: dict[str, str | None]) -> RunFolder:
    """The folder of a new run, which must be new or empty, or with `resume` that of an earlier run of ours. `models`:
    by setting, the folders that are read and so must never be written to."""
    for setting, model in models.items():
        _refuse_model(given, setting, model)
    if given.exists() and not given.is_dir():
        raise UserError(f"output_dir {given} is a file, expected a folder that is new or empty")
    if given.is_dir() and (given / LOCK).exists():
        os.close(_lock(given))  # "in use" is said before anything else
    foreign = given.is_dir() and not is_ours(given) and not _is_empty(given)
    if foreign and resume:
        raise UserError(
            f"output_dir {given} is not the folder of a run: it has neither {MARK} nor a config.yaml of prefuse, so "
            "there is nothing to resume and nothing in it is touched; give a new folder"
        )
    if not resume and given.is_dir() and not _is_empty(given):
        raise UserError(
            f"output_dir {given} exists and is not empty: give another folder, or --resume to go on with its run"
        )
    folder = RunFolder(given)
    clear_leftovers(given)
    return folder


def is_ours(folder: Path) -> bool:
    return bool(read_mark(folder))


def read_mark(folder: Path) -> dict:
    """The mark of a run's folder, {} if it is no such folder. Older runs have no run.json, but a config.yaml that names
    their command. A folder that holds only checkpoints of ours was copied from a run, and counts as one."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if isinstance(mark, dict) and mark.get("state") in ("set-up", "training", "finished"):
            return mark
    except (OSError, ValueError):
        pass
    with contextlib.suppress(OSError, ValueError):
        first = (folder / "config.yaml").read_text(encoding="utf-8").split("\n", 1)[0].split()
        if first[:2] == ["#", "prefuse"] and len(first) > 2:
            done = any((folder / name).exists() for name in WEIGHTS)
            return {"command": first[2], "state": "finished" if done else "training"}
    return {"state": "training"} if folder.is_dir() and checkpoints(folder) else {}


def clear_leftovers(folder: Path) -> None:
    """What a run that was killed while it wrote has left. Only names that we give, and only in a folder of ours."""
    for old in folder.glob("checkpoint-*.old"):  # killed before its replacement was in place
        final = old.with_suffix("")
        with contextlib.suppress(OSError):
            old.rename(final) if not final.exists() else shutil.rmtree(old)
    for half in (*folder.glob("checkpoint-*.tmp"), *folder.glob("model.*.tmp")):
        shutil.rmtree(half, ignore_errors=True)
    for name in (MARK, "metrics.jsonl", "config.yaml", "skipped.jsonl", "curves.png"):
        (folder / f"{name}.tmp").unlink(missing_ok=True)


def _is_empty(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what a start leaves that was killed before it trained."""
    names = {path.name for path in folder.iterdir()}
    return not names or (names <= BEFORE_TRAINING and read_mark(folder).get("state", "set-up") == "set-up")


def _refuse_model(given: Path, setting: str, model: str | None) -> None:
    if not model or not Path(model).is_dir() or not given.exists():
        return
    if given.samefile(model):
        raise UserError(f"output_dir {given} is the model folder of {setting}: a run never writes there; give another")
    if given.resolve() in Path(model).resolve().parents:
        raise UserError(
            f"{setting} {model} lies inside output_dir {given}, which a run writes to: give another output_dir"
        )


# ---------------------------------------------------------------------------------------------------------
# The lock

_HELD: set[int] = set()


def _forget_locks() -> None:
    """A child made by fork must not go on holding what its parent held."""
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _lock(folder: Path) -> int:
    """The descriptor that holds it; UserError names the holder, if there is one alive."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise _in_use(folder, holder) from None
        except OSError:  # a file system without locks: the holder's word is what there is
            holder = _holder(descriptor)
            if _may_live(holder):
                os.close(descriptor)
                raise _in_use(folder, holder) from None
        if _same(descriptor, path):
            break
        os.close(descriptor)  # its holder has just removed it
    about = {"pid": os.getpid(), "host": socket.gethostname(), "process_start": process_start(os.getpid())}
    about["since"] = datetime.datetime.now().isoformat(" ", "seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)
    _HELD.add(descriptor)
    return descriptor


def _holder(descriptor: int) -> dict:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(folder: Path, holder: dict) -> UserError:
    who = f"pid {holder.get('pid', 'unknown')}"
    who += f" on {holder['host']}" if holder.get("host") not in (None, socket.gethostname()) else ""
    who += f" since {holder['since']}" if "since" in holder else ""
    return UserError(f"output_dir {folder} is in use by {who}: wait for that run, stop it, or give another folder")


def _may_live(holder: dict) -> bool:
    """Whether the process of a lock may still be there; of another host that cannot be known."""
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    if holder.get("host") != socket.gethostname():
        return True
    return process_start(pid) is not None and process_start(pid) == holder.get("process_start")


def _same(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
