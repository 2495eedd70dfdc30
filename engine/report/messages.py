"""messages.jsonl: the warnings of a run, as they came. The screen shows them once and is gone."""

import datetime
import json
import logging
from pathlib import Path

from prefuse.engine.report.screen import printable

MESSAGES = "messages.jsonl"
MOST_WAITING = 100


class Messages(logging.Handler):
    """Warnings wait until `open` says where they go: a run that does not begin leaves no file behind."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._file = None
        self._waiting: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="seconds")
        text = printable(record.getMessage())
        line = json.dumps({"time": when, "level": record.levelname.lower(), "text": text}) + "\n"
        try:
            if self._file is None:
                self._waiting = [*self._waiting[-MOST_WAITING:], line]
            else:
                self._file.write(line)
                self._file.flush()
        except OSError:  # a full disk: the screen has the message
            self.handleError(record)

    def open(self, folder: Path) -> None:
        self._file = (folder / MESSAGES).open("a", encoding="utf-8")
        self._file.writelines(self._waiting)
        self._file.flush()
        self._waiting = []

    def __enter__(self) -> "Messages":
        logging.getLogger("prefuse").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("prefuse").removeHandler(self)
        if self._file is not None:
            self._file.close()
