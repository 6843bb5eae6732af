"""A weight in two processes: the hint of the error gives the right gradient, a plain full_tensor() does not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor, init_device_mesh

import ppo_fast as pf
from tests.helpers import raises_exactly

WORLD = 2
HINT = "pass weight.full_tensor(grad_placements=[Partial()]), or call the op in the sharded module's forward"


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [8, 4], weight [6, 4], targets and advantages [8]."""
    made = torch.Generator().manual_seed(3)
    shapes = ((8, 4), (6, 4), (8,))
    hidden, weight, advantages = (torch.randn(shape, generator=made) for shape in shapes)
    return hidden, weight, torch.randint(6, (8,), generator=made), advantages


def gradient(weight: Tensor, whole: Tensor, rows: slice) -> Tensor:
    """Of the loss of some rows, in ``weight``, by way of ``whole``."""
    hidden, _, targets, advantages = inputs()
    out = pf.linear_policy_loss(hidden[rows], whole, targets[rows], None, advantages[rows], None, denominator=8)
    (grad,) = torch.autograd.grad(out.loss, weight)
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def one_rank(rank: int, store: str) -> None:
    """Every rank has the loss of half of the rows, and must get the gradient of the loss of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    weight = inputs()[1]
    plain = weight.clone().requires_grad_()
    truth = gradient(plain, plain, slice(None))
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (WORLD,)), [Shard(0)]).requires_grad_()
    mine = slice(rank, None, WORLD)
    with raises_exactly(f"linear_policy_loss: expected weight to be a whole tensor, got a DTensor: {HINT}"):
        gradient(sharded, sharded, mine)
    hinted = gradient(sharded, sharded.full_tensor(grad_placements=[Partial()]), mine)
    torch.testing.assert_close(hinted, truth)
    assert (gradient(sharded, sharded.full_tensor(), mine) - truth).abs().max() > 0.1 * truth.abs().max()
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_hint_for_a_sharded_weight_gives_the_right_gradient(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path / "store"),), nprocs=WORLD)
