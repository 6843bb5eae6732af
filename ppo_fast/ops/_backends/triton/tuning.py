"""Block sizes and warps by architecture and vocabulary; numbers only, no arithmetic of the ops.

A tile depends on the device, the vocabulary and the dtype, never on the number of rows: so a row's bits do not either.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """The walk of one program over its rows.

    Attributes:
        block: words (or steps of a sequence) of a row that it takes at once, a power of 2.
        blocks: blocks per program, one after the other; a row takes ceil(V / (block * blocks)) programs.
        warps: warps per program.
        rows: rows that it takes at once, a power of 2.
    """

    block: int
    blocks: int
    warps: int
    rows: int = 1

    @property
    def segment(self) -> int:
        """Words of a row per program."""
        return self.block * self.blocks


# By compute capability: tiles of 2-byte words. Those of 9.0 are measured on an H200.
_Table = dict[tuple[int, int], Tile]
_FORWARD: _Table = {(8, 0): Tile(4096, 4, 4), (9, 0): Tile(2048, 32, 4), (10, 0): Tile(4096, 4, 4)}
_FORWARD_WITH_REFERENCE: _Table = {(8, 0): Tile(4096, 4, 4), (9, 0): Tile(4096, 32, 8), (10, 0): Tile(4096, 4, 4)}
_BACKWARD: _Table = {(8, 0): Tile(4096, 1, 4), (9, 0): Tile(2048, 1, 2), (10, 0): Tile(4096, 1, 4)}
# Of words of any width: unaligned rows are read word by word, each with a predicate of its own; more than 16 a thread
# spill. Only the gradient is read and written 16 bytes at a time from the first aligned word on, ragged ends excepted:
# sums over words would be in an order that depends on the row's address.
_UNALIGNED_WORDS = 16
_FORWARD_UNALIGNED: _Table = {(8, 0): Tile(2048, 4, 4), (9, 0): Tile(1024, 128, 4), (10, 0): Tile(2048, 4, 4)}
_BACKWARD_UNALIGNED: _Table = {(8, 0): Tile(2048, 1, 4), (9, 0): Tile(2048, 1, 4), (10, 0): Tile(2048, 1, 4)}
WHOLE = 4096  # the largest vocabulary, as a power of 2, whose rows are not cut: a program takes several of them
_WHOLE = Tile(1024, 1, 1)  # 2-byte words of all its rows together, as measured at V = 256 and 32
_SAMPLE: _Table = {(8, 0): Tile(1024, 16, 4), (9, 0): Tile(1024, 16, 4), (10, 0): Tile(1024, 16, 4)}
_FILTER = Tile(1024, 8, 8)
ELEMENTS = 4096  # per program of the kernel that scales a tensor
ROWS = 256  # rows per program of the per-token kernels
PARTIALS = 256  # partial results per program of the kernel that merges them


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own function of the name unwraps constants, at twenty times the time."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n >= 1; as Triton's, without its detours."""
    return 1 << (n - 1).bit_length()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; that of an H200 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _lookup(table: _Table, logits: Tensor) -> Tile:
    """The tile of the newest architecture in the table that is not newer than the device."""
    found = capability(logits.device)
    return table[max((known for known in table if known <= found), default=min(table))]


def _in_bytes(tile: Tile, logits: Tensor) -> Tile:
    """As many bytes a block, whatever the width of a word."""
    return tile._replace(block=tile.block * 2 // logits.element_size())


def _fitted(tile: Tile, V: int) -> Tile:
    """No larger than the row needs, with the same words per warp."""
    block = min(tile.block, max(16, next_power_of_2(V)))
    return tile._replace(block=block, warps=max(1, tile.warps * block // tile.block))


def whole_tile(logits: Tensor, aligned: bool) -> Tile | None:
    """The tile of the kernels that read or write whole rows; None where the vocabulary is too large for it."""
    block = next_power_of_2(logits.shape[-1])
    if block > WHOLE:
        return None
    words, warps = _in_bytes(_WHOLE, logits).block, max(_WHOLE.warps, block // _WHOLE.block)
    if not aligned:
        warps = max(warps, block // (32 * _UNALIGNED_WORDS))
        words = min(words, warps * 32 * _UNALIGNED_WORDS)
    return Tile(block, 1, warps, max(1, words // block))


def forward_tile(logits: Tensor, aligned: bool, reference: bool) -> Tile:
    """The tile of the kernel that reads segments of rows once."""
    if not aligned:
        return _fitted(_lookup(_FORWARD_UNALIGNED, logits), logits.shape[-1])
    table = _FORWARD_WITH_REFERENCE if reference else _FORWARD
    return _fitted(_in_bytes(_lookup(table, logits), logits), logits.shape[-1])


def backward_tile(logits: Tensor, aligned: bool) -> Tile:
    """The tile of the kernel that writes their gradient; its programs take one block."""
    if (whole := whole_tile(logits, aligned)) is not None:
        return whole
    if not aligned:
        return _fitted(_lookup(_BACKWARD_UNALIGNED, logits), logits.shape[-1])
    return _fitted(_in_bytes(_lookup(_BACKWARD, logits), logits), logits.shape[-1])


def sample_tile(logits: Tensor) -> Tile:
    """The tile of the race of ``sample_tokens``."""
    return _fitted(_in_bytes(_lookup(_SAMPLE, logits), logits), logits.shape[-1])


def filter_tile(V: int) -> Tile:
    """The tile of the passes that look for the smallest logit to keep."""
    return _fitted(_FILTER, V)


def group(logits: Tensor) -> int:
    """Words of a 16-byte access: those that a lane takes from a block."""
    return 16 // logits.element_size()


def scan_tile(steps: int) -> Tile:
    """The tile of the reverse scans, for sequences of about ``steps`` steps."""
    return Tile(128 if steps <= 128 else 512, 1, 1)
