"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP end a run: in training at its next step, with a checkpoint; before that at once.

A second signal ends the process at once in any case. So does a rank whose launcher is gone, as if it had got SIGTERM.
What the parent process has told us to ignore (`nohup`) stays ignored.

Python runs a signal's handler in the main thread, between two of its instructions, so never while that thread waits in
a collective for a rank that is gone. The bytes that `set_wakeup_fd` writes come through even then, to a thread here.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ECHO_SECONDS = 1.0  # the terminal and the launcher may both send a signal: two within this time count as one
LAUNCHER = "PREFUSE_LAUNCHER"  # the process that `--nproc` has started this one from
POLL_SECONDS = 1.0  # between two looks whether the launcher is there


class Stopped(BaseException):
    """The run was asked to stop by a signal, here or on another rank, and may be resumed. No library's `except
    Exception` takes it for an error of its own."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopSignals:
    """While in the `with` block, `received` is the number of the first signal, or 0.

    The main thread gets `Stopped` as soon as a signal arrives, but not within `postponed`: there the code looks at
    `received`, and `stop` raises it."""

    def __init__(self) -> None:
        self.received = 0
        self.orphaned = False
        self._at = 0.0
        self._postponed = False
        self._raised = False

    def __enter__(self) -> "StopSignals":
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._before = {
                number: signal.signal(number, self._handle)
                for number in SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN
            }
            threading.Thread(target=self._listen, args=(reader, _launcher()), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """For what must not be cut in two: a step, a file."""
        before, self._postponed = self._postponed, True
        try:
            yield
        finally:
            self._postponed = before

    def stop(self) -> None:
        raise Stopped(self.received or signal.SIGTERM, self.reason())  # that of another rank is not known here

    def reason(self) -> str:
        if self.orphaned:
            return "stopped because its launcher is gone"
        return f"stopped by {signal.Signals(self.received or signal.SIGTERM).name}"

    def _handle(self, number: int, frame: object) -> None:
        self._note(number)
        if not self._postponed and not self._raised:
            self._raised = True
            self.stop()

    def _note(self, number: int) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()

    def _listen(self, reader: int, launcher: int | None) -> None:
        while True:
            ready = select.select([reader], [], [], None if launcher is None else POLL_SECONDS)[0]
            if launcher is not None and os.getppid() != launcher:
                launcher, self.orphaned = None, not self.received
                os.kill(os.getpid(), signal.SIGTERM)
            if not ready:
                continue
            byte = os.read(reader, 1)
            if not byte:
                break
            number = byte[0]
            if number not in SIGNALS:
                continue
            if not self.received:
                self._note(number)
            elif time.monotonic() - self._at > ECHO_SECONDS:
                os._exit(128 + number)
        os.close(reader)


def _launcher() -> int | None:
    """The process that must be there while this rank is; None for a run of one process, which needs nobody."""
    if LAUNCHER in os.environ:
        return int(os.environ[LAUNCHER])
    return os.getppid() if "RANK" in os.environ else None
