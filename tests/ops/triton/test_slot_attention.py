"""The kernel of one query token of each slot, against attention written out."""

import pytest
import torch

from ppo_fast.rlhf.decoding.triton_attention import slot_attention


def naive(query, key, value, positions, scaling, window, softcap):
    """float64, slot by slot and head by head."""
    output = torch.empty_like(query.transpose(1, 2), dtype=torch.float64)
    for slot, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, position + 1 - window)
        for head in range(query.shape[1]):
            source = head // (query.shape[1] // key.shape[1])
            keys, values = (x[slot, source, first : position + 1].double() for x in (key, value))
            scores = keys @ query[slot, head, 0].double() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[slot, 0, head] = scores.softmax(0) @ values
    return output


@pytest.mark.parametrize(
    ("heads", "groups", "width", "window", "softcap"),
    [(2, 7, 24, None, None), (1, 1, 16, 10, None), (2, 2, 32, None, 2.0), (1, 17, 16, 70, 3.0)],
)
def test_each_slot_attends_up_to_its_position(heads, groups, width, window, softcap):
    """Positions at both ends of a tile and of the buffers; NaNs beyond; buffers that are views of longer ones."""
    positions = torch.tensor([0, 63, 64, 129])
    query = torch.randn(4, heads * groups, 1, width)
    key, value = (torch.randn(5, heads, 150, width)[:4, :, :130] for _ in range(2))
    for slot, position in enumerate(positions):
        key[slot, :, position + 1 :] = value[slot, :, position + 1 :] = torch.nan
        if window is not None:
            key[slot, :, : max(0, position + 1 - window)] = torch.nan
    found = slot_attention(query, key, value, positions, 0.3, window, softcap)
    expected = naive(query, key, value, positions, 0.3, window, softcap)
    assert (found - expected).abs().max() <= 2e-6
    assert found.shape == (4, 1, heads * groups, width)
