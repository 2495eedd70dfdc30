"""SIGTERM, SIGINT and SIGUSR1 end a run at its next step, with a checkpoint; a second one ends the process at once.

Python runs a signal's handler in the main thread, between two of its instructions, so never while that thread waits in
a collective for a rank that is gone. The bytes that `set_wakeup_fd` writes come through even then, to a thread here.
"""

import os
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 1.0  # launchers pass on what the terminal has sent already: within this time it is one signal


class Stopped(Exception):
    """The run was asked to stop by a signal, here or on another rank, and may be resumed."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopSignals:
    """While in the `with` block, `received` is the number of the first signal, or 0."""

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0

    def __enter__(self) -> "StopSignals":
        self._listens = threading.current_thread() is threading.main_thread()
        if self._listens:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)  # which ends the thread

    def stop(self) -> None:
        raise Stopped(self.received or signal.SIGTERM)  # that of another rank is not known here

    def _listen(self, reader: int) -> None:
        while byte := os.read(reader, 1):
            number, now = byte[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if not self.received:
                self.received, self._at = number, now
            elif now - self._at > ECHO_SECONDS:
                os._exit(128 + number)
        os.close(reader)
