"""Block sizes and warps by architecture and vocabulary; numbers only, no arithmetic of the ops.

A tile depends on the vocabulary and the device alone, never on the number of rows: so a row's bits do not either.
"""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """How one program walks a row.

    Attributes:
        block: words per step, a power of 2.
        steps: steps per program; a row takes ceil(V / (block * steps)) programs.
        warps: warps per program.
    """

    block: int
    steps: int
    warps: int

    @property
    def segment(self) -> int:
        """Words per program."""
        return self.block * self.steps


_Table = dict[tuple[int, int], tuple[tuple[int, Tile], ...]]
# By compute capability: (largest vocabulary, tile), the last line of each for every larger vocabulary.
_FORWARD: _Table = {
    (8, 0): ((1 << 31, Tile(4096, 4, 4)),),
    (9, 0): ((1 << 31, Tile(4096, 4, 4)),),
    (10, 0): ((1 << 31, Tile(4096, 4, 4)),),
}
_BACKWARD: _Table = {
    (8, 0): ((1 << 31, Tile(4096, 1, 8)),),
    (9, 0): ((1 << 31, Tile(4096, 1, 8)),),
    (10, 0): ((1 << 31, Tile(4096, 1, 8)),),
}
ROWS = 256  # rows per program of the per-token kernels
PARTIALS = 512  # partial results per program of the kernel that merges them


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; that of an H200 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _lookup(table: _Table, V: int, device: torch.device) -> Tile:
    """The tile of the newest architecture in the table that is not newer than the device."""
    found = capability(device)
    known = max((known for known in table if known <= found), default=min(table))
    tile = next(tile for largest, tile in table[known] if largest >= V)
    block = min(tile.block, max(16, triton.next_power_of_2(V)))
    return tile._replace(block=block, warps=max(1, tile.warps * block // tile.block))


def forward_tile(V: int, device: torch.device) -> Tile:
    """The tile of the kernel that reads the logits once."""
    return _lookup(_FORWARD, V, device)


def backward_tile(V: int, device: torch.device) -> Tile:
    """The tile of the kernel that writes their gradient; its programs take one step."""
    return _lookup(_BACKWARD, V, device)


def scan_tile(steps: int) -> Tile:
    """The tile of the reverse scans, for sequences of about ``steps`` steps."""
    return Tile(128, 1, 1) if steps <= 128 else Tile(1024, 1, 4)
