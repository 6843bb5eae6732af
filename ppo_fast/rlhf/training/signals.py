"""SIGINT and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, number: int, last: str, checkpoint: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped after {last}; saved {str(checkpoint)!r}, --resume continues there")
        self.number = number


class StopSignals:
    """Keeps the first SIGINT or SIGTERM within the block in `number`; a SIGINT after it raises KeyboardInterrupt.

    Python handles signals only in its main thread; in another thread nothing changes. An ignored signal stays ignored.
    The loop finishes one `unit` before it stops.
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.number: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        # Not by print: the signal may interrupt one.
        message = f"\nppo-fast: stopping after this {self.unit}, then saving; Ctrl-C aborts at once\n"
        os.write(2, message.encode())
