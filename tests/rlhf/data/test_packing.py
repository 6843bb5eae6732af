"""Micro-batches: packed equals padded, sequences do not see each other, and the host waits for nothing."""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_fast.rlhf.data.packing import TokenBatch, offsets, ranges, split_by_tokens
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.forward import hidden_states, model_inputs, response_logits, response_values
from ppo_fast.rlhf.models.value import ValueModel
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from tests.rlhf.factories import all_rows, forward_pass, made_experience

ARCHITECTURES = ["gpt2", "llama", "qwen2"]


def ragged():
    """Ids [4, 11], padded on both sides, their attention mask and that of the counted tokens."""
    ids = torch.randint(4, 64, (4, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[6], [1], [4], [2]])
    prompt = torch.arange(5) >= torch.tensor([[0], [4], [2], [3]])
    return ids, torch.cat([prompt, mask], dim=1), mask


def test_offsets_and_spans():
    assert offsets(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert ranges(np.array([4, 9, 0]), np.array([2, 0, 3])).tolist() == [4, 5, 0, 1, 2]


def test_a_packed_row_holds_every_token_but_the_last_of_each_sequence():
    ids, attention, mask = ragged()
    packed = forward_pass(ids, attention, mask, packed=True)
    rows = [row[keep][:-1] for row, keep in zip(ids, attention, strict=True)]
    assert torch.equal(packed.inputs["input_ids"], torch.cat(rows)[None])
    assert torch.equal(packed.inputs["position_ids"], torch.cat([torch.arange(len(row)) for row in rows])[None])
    assert packed.inputs["attention_mask"] is None
    assert packed.cu_seqlens.diff().tolist() == [len(row) for row in rows]
    assert packed.max_seqlen == max(map(len, rows))
    assert packed.logits_to_keep == packed.inputs["input_ids"].numel()


@pytest.mark.parametrize("lone", [0, 1, 2, 3])
def test_a_sequence_of_one_token_leaves_nothing_in_a_packed_row(lone):
    """Its last token is its only one: no sequence of length 0 reaches the attention, whichever row it is."""
    ids, attention, mask = ragged()
    attention[lone], mask[lone] = torch.arange(11) == 4, False
    packed = forward_pass(ids, attention, mask, packed=True)
    rows = [row[keep][:-1] for row, keep in zip(ids, attention, strict=True)]
    assert torch.equal(packed.inputs["input_ids"], torch.cat(rows)[None])
    assert packed.cu_seqlens.diff().tolist() == [len(row) for row in rows if len(row)]
    assert len(packed.gather_index) == mask.sum()


def test_a_padded_pass_has_no_mask_where_there_is_no_padding():
    ids, attention, mask = ragged()
    assert forward_pass(ids[:1], attention[:1], mask[:1]).inputs["attention_mask"] is None
    assert forward_pass(ids, attention, mask).inputs["attention_mask"] is not None


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True])
def test_states_and_logits_are_those_of_each_sequence_alone(arch, packed):
    policy = tiny.make_model(64, arch=arch, hidden=32, layers=2, heads=2)
    ids, attention, mask = ragged()
    sequences = forward_pass(ids, attention, mask, packed=packed)
    alone = [
        policy(row[keep][None]).logits[0, -n - 1 : -1] for row, keep, n in zip(ids, attention, mask.sum(1), strict=True)
    ]
    torch.testing.assert_close(response_logits(policy, sequences), torch.cat(alone), rtol=1e-5, atol=1e-5)
    value = ValueModel(policy.base_model, torch.nn.Linear(32, 1))
    whole = value(ids, attention)[:, 4:-1]
    torch.testing.assert_close(response_values(value, sequences), whole[mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_sequences_do_not_see_each_other(arch):
    backbone = tiny.make_model(64, arch=arch, hidden=32, layers=2, heads=2).base_model
    ids, attention, mask = ragged()
    other = torch.where((torch.arange(4) == 1)[:, None], (ids + 7) % 64, ids)
    before, after = (
        hidden_states(backbone, forward_pass(x, attention, mask, packed=True)).split(mask.sum(dim=1).tolist())
        for x in (ids, other)
    )
    for row in (0, 2, 3):
        assert torch.equal(before[row], after[row])
    assert not torch.equal(before[1], after[1])


def test_positions_are_given_where_they_are_taken():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return None

    assert "position_ids" not in model_inputs(Plain(), forward_pass(*ragged()))


@pytest.fixture
def setup(make_models, make_config, make_rollout):
    """setup(arch, **config) -> (learner, rollout, experience) of one ragged rollout."""

    def make(arch="llama", **values):
        config = make_config(rollout={"max_new_tokens": 12}, **values)
        models = make_models(config, arch=arch)
        rollout = make_rollout(models, config)
        generator = torch.Generator().manual_seed(3)
        columns = (torch.randn(rollout.generation.mask.shape, generator=generator) for _ in range(2))
        return Learner(models, config), rollout, made_experience(rollout, *columns)

    return make


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("logits", ["linear", "materialized"])
def test_packed_equals_padded_in_scores_losses_and_gradients(setup, arch, logits):
    found = []
    for batches in ("padded", "packed"):
        learner, rollout, experience = setup(
            arch,
            model={"packing": batches == "packed", "fused_head": logits == "linear"},
            loss={"aggregation": "seq-mean-token-mean", "ratio": "sequence", "ent_coef": 0.1},
            kl={"placement": "both", "loss_estimator": "full"},
            optim={"micro_batch_size": 4, "minibatch_size": 8},
        )
        assert learner.models.packed is (batches == "packed")
        scored = score(learner.models, rollout.generation, learner.config.rollout)
        metrics = learner.backward(*all_rows(experience), 0.1)
        networks = (learner.models.policy, learner.models.value)
        gradients = [p.grad for network in networks for p in network.parameters()]
        found.append((scored, metrics, gradients))
    (scored, metrics, gradients), (other_scored, other_metrics, other_gradients) = found
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(scored, name), getattr(other_scored, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics, other_metrics, rtol=1e-4, atol=1e-5)
    for mine, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * other.abs().max().item() + 1e-9)


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy", "masked_select", "unique")
# Checks of values (the whole module `checks`), the native loss's look at its gradient, and the numbers that the C++
# launchers take: left out on a GPU.
CPU_ONLY = ("checks.", "policy_loss.backward", "rows.as_number")
# transformers makes the masks of attention without variable lengths.
MASKS = ("masking_utils.", "generic.")


@pytest.mark.parametrize("batches", ["padded", "packed"])
@pytest.mark.parametrize("logits", ["linear", "materialized"])
def test_no_step_of_the_update_waits_for_the_device(setup, monkeypatch, batches, logits):
    learner, _, experience = setup(
        model={"packing": batches == "packed", "fused_head": logits == "linear"},
        kl={"placement": "both", "adaptive": True},
        loss={"penalty_coef": 0.1, "penalty_target": 0.01},
        optim={"micro_batch_size": 2, "minibatch_size": 4, "epochs": 2},
    )
    reads: set[str] = set()

    def spied(name):
        real = getattr(Tensor, name)

        def read(self, *args, **kwargs):
            code = sys._getframe(1).f_code
            reads.add(f"{Path(code.co_filename).stem}.{code.co_name}")
            return real(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(Tensor, name, spied(name))
    coef = torch.tensor(0.1)
    learner.update(experience, coef, 0, torch.Generator().manual_seed(0))
    # The orders of all epochs before the first step, and whether the numbers are finite after the last.
    found = {name for name in reads if not name.startswith((*CPU_ONLY, *MASKS))}
    assert found == {"update._minibatches", "update.finite_steps"}


def test_a_grid_is_read_from_the_device_once():
    ids, attention, mask = ragged()
    grid = TokenBatch.from_masks(ids, attention, mask)
    assert (grid.attention == attention.numpy()).all()
    assert (grid.loss_mask[:, 5:] == mask.numpy()).all()
    assert not grid.loss_mask[:, :5].any()
    assert grid.lengths.tolist() == [6, 1, 4, 2]
    assert torch.equal(ids.flatten()[grid.flat_indices(np.arange(4))], ids[:, 5:][mask])
    assert torch.equal(ids.flatten()[grid.flat_indices(np.array([2, 0]))], torch.cat([ids[2, 5:9], ids[0, 5:]]))
    assert {field.name for field in dataclasses.fields(grid)} == {"ids", "attention", "loss_mask"}


@pytest.mark.parametrize("packed", [True, False])
def test_passes_by_tokens_hold_every_sequence_once_and_no_more_tokens_than_asked_for(packed):
    rng = np.random.default_rng(0)
    attention = np.arange(40) >= 20 - rng.integers(1, 20, (50, 1))
    attention &= np.arange(40) < 20 + rng.integers(1, 20, (50, 1))
    grid = TokenBatch(torch.zeros(50, 40, dtype=torch.long), attention, attention & (np.arange(40) >= 20))
    rows = rng.permutation(50)[:45]
    parts = grid.split(rows, None, 100, packed=packed)
    assert sorted(np.concatenate(parts)) == sorted(rows)
    taken = [grid.sequences(part, packed=packed).inputs["input_ids"].numel() for part in parts]
    assert max(taken) <= 100
    if packed:  # first fit: no two passes would do as one
        assert sorted(taken)[0] + sorted(taken)[1] > 100
    else:  # the next one has no room
        for part, after in itertools.pairwise(parts):
            assert grid.sequences(np.append(part, after[0]), packed=False).inputs["input_ids"].numel() > 100
    longest = attention.sum(axis=1)[rows].max()
    assert attention.sum(axis=1)[parts[0]].max() == longest


@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_of_more_tokens_than_a_pass_goes_by_itself(packed):
    start, stop = np.zeros(4, dtype=int), np.array([3, 9, 4, 12])
    parts = split_by_tokens(start, stop, 6, packed=packed)
    assert [part.tolist() for part in parts] == [[3], [1], [2, 0]]
    (whole,) = split_by_tokens(start, stop, 100, packed=packed)
    assert whole.tolist() == [0, 1, 2, 3]
