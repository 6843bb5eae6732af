"""Block sizes and warps by architecture and vocabulary; numbers only, no arithmetic of the ops.

A tile depends on the device, the vocabulary and the dtype, never on the number of rows: so a row's bits do not either.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """The walk of one program over a row.

    Attributes:
        block: words (or steps of a sequence) that it takes at once, a power of 2.
        blocks: blocks per program, one after the other; a row takes ceil(V / (block * blocks)) programs.
        warps: warps per program.
    """

    block: int
    blocks: int
    warps: int

    @property
    def segment(self) -> int:
        """Words per program."""
        return self.block * self.blocks


_Table = dict[tuple[int, int], tuple[tuple[int, Tile], ...]]
# By compute capability: (largest vocabulary, tile of 2-byte words); the last line serves every larger vocabulary.
_FORWARD: _Table = {
    (8, 0): ((1 << 31, Tile(4096, 4, 4)),),
    (9, 0): ((1 << 31, Tile(4096, 4, 4)),),
    (10, 0): ((1 << 31, Tile(4096, 4, 4)),),
}
_BACKWARD: _Table = {
    (8, 0): ((1 << 31, Tile(4096, 1, 4)),),
    (9, 0): ((1 << 31, Tile(4096, 1, 4)),),
    (10, 0): ((1 << 31, Tile(4096, 1, 4)),),
}
_SAMPLE: _Table = {
    (8, 0): ((1 << 31, Tile(1024, 16, 4)),),
    (9, 0): ((1 << 31, Tile(1024, 16, 4)),),
    (10, 0): ((1 << 31, Tile(1024, 16, 4)),),
}
_FILTER = Tile(1024, 1, 8)
ROWS = 256  # rows per program of the per-token kernels
PARTIALS = 256  # partial results per program of the kernel that merges them


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; that of an H200 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _lookup(table: _Table, logits: Tensor, aligned: bool) -> Tile:
    """The tile of the newest architecture in the table that is not newer than the device, as many bytes a block.

    Unaligned rows are read word by word, each with a predicate of its own: more than 16 a thread spill.
    """
    V, found = logits.shape[-1], capability(logits.device)
    known = max((known for known in table if known <= found), default=min(table))
    tile = next(tile for largest, tile in table[known] if largest >= V)
    block = tile.block * 2 // logits.element_size()
    return _fitted(tile._replace(block=block if aligned else min(block, 16 * 32 * tile.warps)), V)


def _fitted(tile: Tile, V: int) -> Tile:
    """No larger than the row needs, with the same words per warp."""
    block = min(tile.block, max(16, triton.next_power_of_2(V)))
    return tile._replace(block=block, warps=max(1, tile.warps * block // tile.block))


def forward_tile(logits: Tensor, aligned: bool) -> Tile:
    """The tile of the kernel that reads the logits once."""
    return _lookup(_FORWARD, logits, aligned)


def backward_tile(logits: Tensor, aligned: bool) -> Tile:
    """The tile of the kernel that writes their gradient; its programs take one block."""
    return _lookup(_BACKWARD, logits, aligned)


def sample_tile(logits: Tensor) -> Tile:
    """The tile of the race of ``sample_tokens``."""
    return _lookup(_SAMPLE, logits, True)


def filter_tile(V: int) -> Tile:
    """The tile of the passes that look for the smallest logit to keep; a program takes a whole row."""
    return _fitted(_FILTER, V)


def group(logits: Tensor) -> int:
    """Words of a 16-byte access: those that a lane takes from a block."""
    return 16 // logits.element_size()


def scan_tile(steps: int) -> Tile:
    """The tile of the reverse scans, for sequences of about ``steps`` steps."""
    return Tile(128, 1, 1) if steps <= 128 else Tile(512, 1, 4)
