"""The host's view of which slots have found their end."""

from __future__ import annotations

import torch
from torch import Tensor


class Flags:
    """Snapshots of a buffer [S] int64 on the device, read one snapshot late on a GPU.

    The copy to the host runs on a stream of its own, so the device goes on while the host waits for the snapshot
    before. On a CPU a snapshot is read at once.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.lag = buffer, 1 if buffer.device.type == "cuda" else 0
        self.taken = 0  # snapshots so far
        if self.lag:
            self.stream = torch.cuda.Stream(buffer.device)
            self.copies = [torch.empty_like(buffer) for _ in range(2)]
            self.hosts = [torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu").pin_memory() for _ in range(2)]
            self.events = [torch.cuda.Event() for _ in range(2)]

    def take(self) -> None:
        """Take a snapshot."""
        if self.lag:
            turn = self.taken % 2
            self.copies[turn].copy_(self.buffer)
            self.stream.wait_stream(torch.cuda.current_stream(self.buffer.device))
            with torch.cuda.stream(self.stream):
                self.hosts[turn].copy_(self.copies[turn], non_blocking=True)
                self.events[turn].record()
        self.taken += 1

    def read(self) -> tuple[int, list[int]]:
        """Return the number of the latest snapshot that is due, from 1, and its values; number 0: none is due yet."""
        number = self.taken - self.lag
        if number < 1:
            return 0, []
        if not self.lag:
            return number, self.buffer.tolist()
        turn = (number - 1) % 2
        self.events[turn].synchronize()
        return number, self.hosts[turn].tolist()
