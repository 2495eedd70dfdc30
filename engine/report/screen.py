"""The screen: what a run says there never ends the run, and never does more to the terminal than show text.

A pipe that was closed (`| head`) or a terminal that is gone takes no more lines: that is said once on stderr, and the
run goes on. What the terminal's encoding cannot show is replaced; control characters of the data are shown by their
codes, so that a row cannot move the cursor, change the title or hide text.
"""

import io
import os
import re
import sys

from rich.console import Console

# C0 and C1 controls but tab and newline, the marks that turn the direction of text, and halves of surrogate pairs.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    return HIDDEN.sub(lambda match: repr(match[0])[1:-1], text)


def visible(piece: str) -> str:
    """The text of a token, with blanks and ends of lines that can be seen."""
    return printable(piece.replace("\n", "\u21b5\n").replace("\t", "\u21e5\t")) or "\u00b7"


class Screen(io.TextIOBase):
    """The stdout of the moment, which may have been closed."""

    def __init__(self) -> None:
        self._gone: object = None  # the stdout that takes no more

    @property
    def encoding(self) -> str:
        return getattr(sys.stdout, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            return sys.stdout.isatty()
        except (AttributeError, ValueError, OSError):
            return False

    def fileno(self) -> int:
        return sys.stdout.fileno()

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, errors="replace").decode(self.encoding)
        self._try(lambda: sys.stdout.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: sys.stdout.flush())

    def _try(self, act) -> None:
        if sys.stdout is None or self._gone is sys.stdout:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # a closed pipe, a terminal that is gone, a full disk, a closed file
            self._gone = sys.stdout
            complain(f"nothing more can be shown on stdout ({getattr(error, 'strerror', None) or error}): work goes on")
            _to_nowhere(sys.stdout)


def _to_nowhere(stream) -> None:
    """What is left in the stream's buffer goes nowhere, so that the interpreter's last flush does not fail either."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


def complain(message: str) -> None:
    """A line on stderr, if there is one."""
    try:
        print(f"prefuse: {printable(message)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


console = Console(file=Screen(), highlight=False, soft_wrap=True)
