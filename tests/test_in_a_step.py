"""The ops in a user's training step: compiled, under autocast, checkpointed, accumulated, and on two ranks."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ppo_fast as ppo

B, T, V, D = 8, 6, 13, 5
CONFIG = ppo.PolicyLossConfig(ent_coef=0.01, kl_coef=0.1)
Batch = dict[str, Tensor]


class Model(nn.Module):
    """A policy and a critic on one backbone, and the loss of both."""

    def __init__(self, head: str = "logits", checkpointed: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.policy, self.critic = nn.Linear(D, V, bias=False), nn.Linear(D, 1)
        self.head, self.checkpointed = head, checkpointed

    def forward(self, batch: Batch, denominator: Tensor | None = None) -> Tensor:
        hidden = self.backbone(batch["inputs"])
        if self.checkpointed:
            return checkpoint(self.loss, hidden, batch, denominator, use_reentrant=False)
        return self.loss(hidden, batch, denominator)

    def loss(self, hidden: Tensor, batch: Batch, denominator: Tensor | None) -> Tensor:
        tokens, mask = batch["tokens"], batch["mask"]
        options = {"config": CONFIG, "ref_logprobs": batch["ref"], "denominator": denominator}
        terms = (tokens, batch["old"], batch["advantages"], mask)
        values = self.critic(hidden).squeeze(-1)
        critic = ppo.value_loss(
            values, batch["returns"], mask, old_values=batch["values"], clip=0.2, denominator=denominator
        )
        if self.head == "hidden":
            actor = ppo.linear_policy_loss(hidden, self.policy.weight, *terms, **options)
            return actor.loss + 0.5 * critic.loss
        logits = self.policy(hidden)
        stats = ppo.token_stats(logits, tokens, mask=mask)
        actor = ppo.policy_loss(logits, *terms, **options)
        drift = ppo.kl_estimate(stats.logprobs, batch["ref"], "k2").where(mask, 0.0).sum()
        return actor.loss + 0.5 * critic.loss + 0.1 * drift / (mask.sum() if denominator is None else denominator)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.rand(B, T, generator=generator) < 0.7
    rewards, values = draw(B, T), draw(B, T)
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.99)
    return {
        "inputs": draw(B, T, D),
        "tokens": torch.randint(V, (B, T), generator=generator),
        "mask": mask,
        "old": -draw(B, T).abs() - 2,
        "ref": -draw(B, T).abs() - 2,
        "advantages": ppo.whiten(advantages, mask),
        "returns": returns,
        "values": values,
    }


def make_model(**options: Any) -> Model:
    torch.manual_seed(1)
    return Model(**options)


def outcome(model: nn.Module, step: Callable[[], Tensor]) -> list[Tensor]:
    """The loss of a step and the gradients it leaves."""
    loss = step()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def expected(**options: Any) -> list[Tensor]:
    model = make_model(**options)
    return outcome(model, lambda: model(make_batch()))


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("head", ["logits", "hidden"])
def test_a_compiled_step_has_no_graph_break(head: str) -> None:
    model = make_model(head=head)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(model, lambda: step(make_batch())), expected(head=head))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_step_compiled_by_inductor_from_rewards_to_loss() -> None:
    model, batch = make_model(), make_batch()
    rewards = torch.randn(B, T, generator=torch.Generator().manual_seed(2))

    def step(model: nn.Module, batch: Batch) -> Tensor:
        advantages, returns = ppo.gae(rewards, batch["values"], batch["mask"], gamma=0.9)
        return model(batch | {"advantages": ppo.whiten(advantages, batch["mask"]), "returns": returns})

    other = copy.deepcopy(model)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(
        outcome(model, lambda: compiled(model, batch)), outcome(other, lambda: step(other, batch))
    )


@pytest.mark.parametrize("head", ["logits", "hidden"])
def test_autocast_takes_the_models_bfloat16_and_gives_float32(head: str) -> None:
    model = make_model(head=head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(make_batch())
    loss.backward()
    assert loss.dtype == torch.float32
    ours = [loss.detach(), *(p.grad for p in model.parameters())]
    assert all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close(ours, expected(head=head), atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("head", ["logits", "hidden"])
def test_gradient_checkpointing(head: str) -> None:
    torch.testing.assert_close(expected(head=head, checkpointed=True), expected(head=head), atol=0, rtol=0)


@pytest.mark.parametrize("head", ["logits", "hidden"])
@pytest.mark.parametrize("parts", [2, 8])
def test_gradient_accumulation_adds_up_to_the_large_batch(parts: int, head: str) -> None:
    model, batch = make_model(head=head), make_batch()
    tokens = batch["mask"].sum()
    losses = []
    for rows in torch.arange(B).chunk(parts):
        losses.append(model({name: x[rows] for name, x in batch.items()}, tokens))
        losses[-1].backward()
    ours = [torch.stack(losses).sum().detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(ours, expected(head=head))


def _rank(rank: int, folder: Path) -> None:
    """One of two processes: its half of the batch, the global count divided by the number of ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    batch, rows, outcomes = make_batch(), torch.arange(B).chunk(2)[rank], {}
    for head in ("logits", "hidden"):
        parallel = DistributedDataParallel(make_model(head=head))
        loss = parallel({name: x[rows] for name, x in batch.items()}, batch["mask"].sum() / 2)
        loss.backward()
        total = loss.detach() / 2
        torch.distributed.all_reduce(total)
        outcomes[head] = [total, *(p.grad for p in parallel.parameters())]
    if rank == 0:
        torch.save(outcomes, folder / "outcome.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_of_ddp_give_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    for head, ours in torch.load(tmp_path / "outcome.pt").items():
        torch.testing.assert_close(ours, expected(head=head))
