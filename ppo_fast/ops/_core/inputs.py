"""What the registered ops take, one NamedTuple for each: the schema of the op and its launchers follow from it.

Tensors are checked, detached and on one device. B sequences of T tokens; packed, B is 1 or missing and N = T.
"""

from typing import NamedTuple

from torch import Tensor


class GaeInputs(NamedTuple):
    """Of ``gae`` and ``gae_packed``. Sequences are rows [B, T], or packed [N] where ``cu_seqlens`` is given."""

    rewards: Tensor  # [B, T] or [N], any strides
    values: Tensor  # the shape of rewards, any strides, perhaps of another dtype
    cu_seqlens: Tensor | None  # [S + 1], int32 or int64, contiguous; None: padded
    mask: Tensor | None  # bool, the shape of rewards; None: every step counts
    bootstrap: Tensor | None  # [B] or [S]; None: 0
    dones: Tensor | None  # bool, the shape of rewards; None: no episode ends within
    gamma: float
    lam: float
    mask_mode: str  # "carry" | "zero"
