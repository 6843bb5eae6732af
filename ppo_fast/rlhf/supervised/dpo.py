"""Direct preference optimization: preference pairs without a reward model or rollouts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.config.supervised import DPOConfig
from ppo_fast.rlhf.data.examples import Batch, Pair, preference_pair
from ppo_fast.rlhf.data.packing import to_device
from ppo_fast.rlhf.models.adapters import REFERENCE, TRAINED
from ppo_fast.rlhf.models.loading import Loaded, load_policy, padding_id
from ppo_fast.rlhf.models.networks import equip
from ppo_fast.rlhf.models.sharding import Root, shard
from ppo_fast.rlhf.preflight import check_objects, check_supervised
from ppo_fast.rlhf.supervised.train import (
    Objective,
    Source,
    SupervisedResult,
    completion_logprobs,
    fit,
    load_data,
    setup_run,
)
from ppo_fast.rlhf.training.resume import with_kernels
from ppo_fast.rlhf.training.utilization import matrix_weights
from ppo_fast.rlhf.world import current


@dataclass(frozen=True)
class DPO(Objective[Pair]):
    """-mean log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)); see :func:`ppo_fast.dpo_loss`."""

    stage = "DPO"
    reference: PreTrainedModel  # causal LM, frozen; the model itself if the reference is an adapter
    beta: float
    linear: bool = True  # log-probabilities without the logits of the batch
    packed: bool = False  # batches without padding

    def loss(self, pairs: Sequence[Pair]) -> ops.LossOutput:
        batch = self.batch(pairs)
        with torch.no_grad(), self._at_start():
            if self.adapters is None:
                reference = self.reference_root.run("reference", self._logprobs, batch)
            else:
                reference = self.run(self._logprobs, batch)
        return self.run(lambda model: ops.dpo_loss(*self._logprobs(model, batch), *reference, beta=self.beta))

    @functools.cached_property
    def reference_root(self) -> Root:
        """A root of its own for a reference that is a network of its own."""
        return Root(reference=self.reference)

    def split(self, config: WeightsConfig) -> None:
        super().split(config)
        mesh, root = current().mesh, self.reference_root
        if mesh is not None and self.adapters is None:
            shard(root, mesh)
            equip(self.reference, config, functools.partial(root.run, "reference"), self.model.device)

    @property
    def extra_work(self) -> int:
        return 2 * matrix_weights(self.reference)

    def _logprobs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sums [B] over the completions of the chosen and of the rejected."""
        logprobs = completion_logprobs(model, batch, linear=self.linear, packed=self.packed)
        lengths = to_device(batch.grid.lengths, logprobs.device)
        chosen, rejected = torch.segment_reduce(logprobs, "sum", lengths=lengths, unsafe=True).chunk(2)
        return chosen, rejected

    def _at_start(self) -> AbstractContextManager[None]:
        """Turn the reference adapter on within the block, if the reference is an adapter."""
        return nullcontext() if self.adapters is None else self.adapters.active(self.adapters.reference)


def train_dpo(
    config: DPOConfig,
    *,
    train: Source | None = None,
    held_out: Source | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
) -> SupervisedResult:
    """Train a causal language model on preference pairs; the reference is the model as it was at the start.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        train: a path or a name on the Hub, as `data.train`, or rows {"prompt", "chosen", "rejected"}.
        held_out: the same, for the evaluation.
        model: a causal LM, trained in place.
        tokenizer: the model's.
        callbacks: objects with any of the methods of :class:`ppo_fast.rlhf.Callback`.
        resume: continue the newest checkpoint in `config.output_dir`, bitwise as if it had never stopped; see
            :func:`ppo_fast.rlhf.train_ppo`. In the config, `optim.epochs` and `log` may differ.

    Raises:
        UserError: an unusable input, a failing callback, a NaN, a full disk; one sentence, which names the step. Saved
            files stay as they are.
        Interrupted: SIGINT or SIGTERM came; a KeyboardInterrupt, raised after the step when a checkpoint is saved.

    Source: Rafailov et al. 2023, arXiv:2305.18290.
    """
    check_objects(config, DPOConfig, model=model, tokenizer=tokenizer)
    with setup_run(config, resume, callbacks) as start:
        given = model is not None and tokenizer is not None
        check_supervised(config, train, held_out, ("chosen", "rejected"), given=given)
        loaded = load_policy(with_kernels(config.model, start.checkpoint), start.generator, model, tokenizer)
        make = functools.partial(preference_pair, eos_ids=loaded.eos_ids)
        data = load_data(config, make, loaded.tokenizer, start.generator, train, held_out)
        common = (loaded.model, padding_id(loaded.tokenizer), config.optim.width)
        layout = {"linear": config.model.fused_head, "packed": config.model.packing}
        objective = DPO(*common, _reference(loaded), config.beta, **layout, adapters=loaded.adapters)
        return fit(config, objective, data, loaded.tokenizer, start)


def _reference(loaded: Loaded) -> PreTrainedModel:
    """Return a frozen copy of the model, or copy its adapter if that changes the base at the start."""
    if loaded.adapters is None:
        return copy.deepcopy(loaded.model).requires_grad_(False)
    if loaded.saved is not None:
        loaded.adapters.copy(TRAINED, REFERENCE)
    return loaded.model
