"""Scores on the disk, by content: an answer that was scored once is not scored again, after a kill as after an end.

One file a scorer, named by its key: a JSON line for each entry, appended and flushed as it comes. A line that a crash
cut off, or that is damaged, is passed over, counted, and asked for again.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say


def cache_folder(setting: str) -> Path | None:
    """`auto`: prefuse/scores in the user's cache folder, or scores in $PREFUSE_CACHE; `none`."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    if "PREFUSE_CACHE" in os.environ:
        return Path(os.environ["PREFUSE_CACHE"]) / "scores"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefuse" / "scores"


def json_digest(*parts: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Cache:
    """{key: value} that outlives the process. Without a folder it is a dictionary."""

    def __init__(self, folder: Path | None, about: str) -> None:
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._path: Path | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{json_digest(about)[:32]}.jsonl"
            content = self._path.read_bytes() if self._path.exists() else b""
            damaged = self._read(content)
            self._append(b"" if content.endswith(b"\n") or not content else b"\n")
            if damaged:
                say(f"{self._path}: {damaged} damaged lines are passed over, and asked for again")
        except OSError as error:
            raise UserError(f"score_cache: cannot use {folder}: {error}; give another folder, or none") from None

    def _read(self, content: bytes) -> int:
        damaged = 0
        for line in content.splitlines():
            try:
                entry = json.loads(line) if line else None
                if entry is not None:
                    self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        return damaged

    def get(self, key: str) -> Any:
        """The value, or None."""
        with self._lock:
            value = self._known.get(key)
        return value

    def put(self, key: str, value: Any) -> None:
        line = json.dumps({"key": key, "value": value}).encode() + b"\n"
        with self._lock:
            self._known[key] = value
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._path is not None:
            with self._path.open("ab", buffering=0) as file:
                file.write(line)  # one write in append mode: processes do not mix their lines
