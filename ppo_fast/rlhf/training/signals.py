"""SIGINT, SIGTERM and the clock as requests to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal or `max_hours` ended the run, after a checkpoint."""

    def __init__(self, number: int, name: str, last: str, checkpoint: Path) -> None:
        super().__init__(f"{name}: stopped after {last}; saved {str(checkpoint)!r}, --resume continues there")
        self.number = number


class StopSignals:
    """Keeps the first SIGINT or SIGTERM within the block in `number`; a SIGINT after it raises KeyboardInterrupt.

    Python handles signals only in its main thread; in another thread nothing changes. An ignored signal stays ignored.
    The loop finishes one `unit` before it stops. `max_hours` after the start the clock is a SIGTERM.
    """

    def __init__(self, unit: str, max_hours: float | None = None) -> None:
        self.unit = unit
        self.number: int | None = None
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, *, finished: bool) -> tuple[int, str] | None:
        """Return the number and the name of what asks the run to stop; the clock asks no run that is `finished`."""
        if self.number is not None:
            return self.number, signal.Signals(self.number).name
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return (signal.SIGTERM, "max_hours") if late and not finished else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        # Not by print: the signal may interrupt one.
        message = f"\nppo-fast: stopping after this {self.unit}, then saving; Ctrl-C aborts at once\n"
        os.write(2, message.encode())
