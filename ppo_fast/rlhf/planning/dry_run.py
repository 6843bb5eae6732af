"""Run one step on fake tensors and record the memory that is alive.

The engine's own code runs: models of transformers made from their configs, scoring and the update's backward passes.
Sampling is the engine at the two moments that count, after a block of prompts and at the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, PreTrainedModel

from ppo_fast.ops._core.head_buffers import Buffers, NeedsGrad
from ppo_fast.ops._core.linear_inputs import LinearCall
from ppo_fast.ops._core.schema import grouped
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.data.packing import TokenBatch
from ppo_fast.rlhf.decoding import vllm_engine
from ppo_fast.rlhf.decoding.attention import attending_to_slots
from ppo_fast.rlhf.decoding.cache import KeyValues
from ppo_fast.rlhf.decoding.engines import find_engine
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Sampling, keys_of
from ppo_fast.rlhf.decoding.slots import PREFILL_TOKENS, Loop, run_slots
from ppo_fast.rlhf.decoding.step import Network
from ppo_fast.rlhf.decoding.vllm_engine import cache_bytes, longest_sequence, run_vllm
from ppo_fast.rlhf.models.forward import backbone_of, filter_kwargs, unwrapped
from ppo_fast.rlhf.models.models import Role
from ppo_fast.rlhf.models.saved import SavedModels
from ppo_fast.rlhf.models.sharding import Root
from ppo_fast.rlhf.planning import gathered
from ppo_fast.rlhf.planning.shapes import load_models_without_data
from ppo_fast.rlhf.planning.tracing import Breakdown, Timeline
from ppo_fast.rlhf.ppo.advantages import Experience
from ppo_fast.rlhf.ppo.reward_sources import REWARD_ROWS
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.training.adamw_8bit import AdamW8bit

ROLES: tuple[Role, ...] = ("policy", "reference", "value")
# Each rank has a share of these, and of the parameters of frozen networks.
SPLIT = ("adapters", "gradients", "optimizer states")
_OPS = torch.ops.ppo_fast
# The argument that is written to: the logits of `policy_loss`, zeros in the derivatives of index_select and gather.
_IN_PLACE = {
    _OPS.token_stats_backward.default: 3,
    torch.ops.aten.index_add.default: 0,
    torch.ops.aten.scatter_add.default: 0,
}


class Shape(NamedTuple):
    """The responses of a forward pass, all of one length."""

    rows: int
    prompt: int  # tokens
    response: int


class DryRun:
    """The phases of one step, as a run on a device of that type would take them; all responses as long as allowed.

    With several `gpus` it is the step of one of them, on its share of the responses and of the weights.
    """

    def __init__(self, config: PPOConfig, shapes: SavedModels, device: str, prompt_tokens: int, gpus: int = 1) -> None:
        self.config, self.shapes, self.device, self.gpus = config, shapes, device, gpus
        self.prompt, self.response = prompt_tokens, config.rollout.max_new_tokens
        self.timeline = Timeline(lambda func, args: op_workspace(func, args, device), self._share)

    def run(self) -> Timeline:
        """The timeline of a step whose optimizers have taken one before."""
        with FakeTensorMode(allow_non_fake_inputs=True), self.timeline:
            self.resident = load_models_without_data(
                self.config, self.shapes, self.device, self.timeline.name, self.gpus
            )
            self.models = self.resident.models
            self.start()
            roles: tuple[Role, ...] = ("policy",) if self.models.value is None else ("policy", "value")
            for role in roles:  # before the hooks of the optimizers, which free gradients
                for parameter in self.models.trained(role):
                    parameter.register_post_accumulate_grad_hook(self._name_gradient)
            self.learner = Learner(self.models, self.config)
            for network in self.learner.optimizers:
                if isinstance(network.optimizer, AdamW8bit):  # on a GPU one kernel, in place
                    network.optimizer.kernel = lambda *step: None
            self._make_states()
            self.rollout()
            self.scoring()
            if self.resident.rewards:
                self.reward()
            self.update()
        return self.timeline

    def start(self) -> None:
        """Each of several processes gets its shares from rank 0, one weight at a time.

        A base in 4 bits is loaded by each, with its other weights whole.
        """
        if self.gpus == 1:
            return
        roots = {id(root): root for role in ROLES if len((root := self.models.root(role)).networks)}
        networks = [*roots.values(), *(model.network for model in self.resident.rewards if not model.shared)]
        largest = max(gathered.largest_weight(network) for network in networks)
        with self.timeline.phase("start", **{"gathered weights": max(largest, self._loaded_whole())}):
            pass

    def _loaded_whole(self) -> int:
        """Bytes of a base in 4 bits, with its adapters, that are on the device before the split, less their shares."""
        weights = self.models.policy.parameters() if self.config.model.load_in_4bit else ()
        return sum(weight.nbytes - self.timeline.on_device(weight) for weight in weights)

    @torch.no_grad()
    def rollout(self) -> None:
        """Sample with the engine that the run will have."""
        rows = self.config.rollout.micro_batch_size or self._rows(self.config.rollout.batch_size)
        with (
            self.timeline.phase("rollout", **self._gathered(gathered.whole, "policy")),
            self.models.using("policy") as policy,
        ):
            engine = find_engine(self.config.rollout.engine, policy)
            if engine is run_vllm:
                self._sample_in_vllm(policy, rows)
            elif engine is run_slots:
                self._sample_in_slots(policy, rows)
            else:
                self._sample_by_generate(policy, rows)

    def _sample_in_slots(self, policy: PreTrainedModel, slots: int) -> None:
        """The longest responses in all slots, one block of prefill and one step."""
        rows = self.config.rollout
        sampling = Sampling(rows.temperature, rows.top_k, rows.top_p)
        settings = DecodingSettings(self.models.eos_ids, self.models.pad_id, sampling, seed=0, width=slots)
        samples = rows.samples_per_prompt  # which share a prefill
        requests = [
            Request([row // samples] * self.prompt, row, self.response) for row in range(self._rows(rows.batch_size))
        ]
        network = Network(policy)
        with attending_to_slots(network.backbone):
            loop = Loop(network, requests, settings, torch.device("cpu"))
            refill = loop.schedule.refill(0)
            assert refill is not None
            loop.prefill(refill.prefilled[: max(1, PREFILL_TOKENS // self.prompt)])
            self._name_buffers(loop.buffers)
            loop.decode(slots, loop.buffers.length)
            self._name_buffers(loop.buffers)

    def _sample_in_vllm(self, policy: PreTrainedModel, width: int) -> None:
        """The copy of the weights, keys and values of all responses, a block of prefill and the logits of a draw.

        The copy waits in host memory after it; on a CPU it stays, with the keys and values.
        """
        network = unwrapped(policy)
        weights = [x for name, x in network.named_parameters() if ".lora_" not in name]
        longest, text = longest_sequence(self.config, network.config), network.config.get_text_config()
        copies = [torch.empty_like(x) for x in weights]
        cache = _zeros(cache_bytes(text, width, longest, network.dtype.itemsize), dtype=torch.uint8)
        self.timeline.name("weights", copies)
        self.timeline.name("KV cache", [cache])
        rows = min(self._rows(self.config.rollout.batch_size), max(1, vllm_engine.PREFILL_TOKENS // self.prompt))
        backbone_of(network)(_zeros(rows, self.prompt, dtype=torch.long), use_cache=False)
        logits = _zeros(width, text.vocab_size)
        logits.log_softmax(dim=-1)
        self.asleep = [*copies, cache]
        if self.device != "cpu":
            self.asleep = [torch.empty_like(x) for x in weights]
            self.timeline.name(None, self.asleep)

    def _sample_by_generate(self, policy: PreTrainedModel, rows: int) -> None:
        """One batch of prompts and its last token, as transformers' `generate` does them."""
        cache = DynamicCache(config=policy.config.get_text_config(decoder=True))
        self._sample(policy, rows, self.prompt, self.prompt, cache)
        self._fill(cache)
        self._sample(policy, rows, 1, self.prompt + self.response - 1, cache)

    def scoring(self) -> None:
        """One batch by each model."""
        settings = self.config.scoring
        shape = self._shape(settings.micro_batch_size, settings.tokens_per_pass, settings.batch_size)
        with self.timeline.phase("scoring", **self._gathered(gathered.layer_by_layer, *ROLES)):
            grid = self._make_grid(shape)
            mask = torch.ones(shape.rows, shape.response, dtype=torch.float32, device="cpu")
            responses = grid.ids[:, shape.prompt :]
            generation: Any = SimpleNamespace(
                to_token_batch=lambda: grid, responses=responses, mask=mask, logprobs=mask
            )
            score(self.models, generation, settings)

    @torch.no_grad()
    def reward(self) -> None:
        """One batch by each reward model, an EOS after the longest response."""
        rows = min(self.config.rollout.micro_batch_size or REWARD_ROWS, self._rows(self.config.rollout.batch_size))
        roots = [Root(reward=model.network) for model in self.resident.rewards]
        with self.timeline.phase("reward", **self._largest(gathered.layer_by_layer, roots)):
            ids = _zeros(rows, self.prompt + self.response + 1, dtype=torch.long)
            for model in self.resident.rewards:
                with model.present():
                    model.network(ids, torch.ones_like(ids, dtype=torch.bool))

    def update(self) -> None:
        """Run two micro-batches of a minibatch, which accumulate gradients, and the optimizer step."""
        settings, networks = self.config.optim, self.learner.optimizers
        shape = self._shape(settings.micro_batch_size, settings.tokens_per_pass, settings.minibatch_size)
        rows = min(2 * shape.rows, self._rows(settings.minibatch_size))
        failed = _zeros(dtype=torch.bool)
        with self.timeline.phase("update", **self._gathered(gathered.trained, "policy", "value")):
            for network in networks:
                network.begin(1.0, failed)
            with self.models.recomputing():
                self.learner.backward(self._make_experience(shape._replace(rows=rows)), np.arange(rows), _zeros())
            for network in networks:
                network.clip()
                network.step(1.0, failed)

    def _rows(self, count: int) -> int:
        """Of a batch, the rows of the rank that has most."""
        return -(-count // self.gpus)

    def _share(self, item: str | None, tensor: Tensor) -> int:
        size = tensor.untyped_storage().nbytes()
        split = item in SPLIT or (item in ("weights", None) and gathered.is_split(tensor))
        return -(-size // self.gpus) if split else size

    def _gathered(self, size: Callable[[Root], int], *roles: Role) -> Breakdown:
        """The bytes that the roots of these roles hold whole, one after another."""
        return self._largest(size, [self.models.root(role) for role in roles])

    def _largest(self, size: Callable[[Root], int], roots: Sequence[Root]) -> Breakdown:
        if self.gpus == 1:
            return {}
        return {"gathered weights": max(size(root) for root in roots if len(root.networks))}

    def _make_states(self) -> None:
        """Make the states that optimizers keep from one step to the next."""
        for network in self.learner.optimizers:
            for parameter in network.parameters:
                parameter.grad = torch.empty_like(parameter)
            network.step(1.0)
            kept = tree_leaves([network.optimizer.state_dict(), [*network.optimizer.state.values()]])
            self.timeline.name("optimizer states", [x for x in kept if isinstance(x, Tensor)])

    def _name_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            self.timeline.name("gradients", [parameter.grad])

    def _shape(self, size: int | None, tokens: int | None, whole: int) -> Shape:
        """The fullest forward pass: responses at their longest, or shorter ones that fill the tokens of a pass."""
        whole = self._rows(whole)
        size = None if size is None else min(size, whole)
        if tokens is None:
            return Shape(size or whole, self.prompt, self.response)
        rows = min(whole, max(1, -(-tokens // (self.prompt + self.response - 1))))
        width = self.prompt + self.response if rows == 1 else min(self.prompt + self.response, tokens // rows + 1)
        response = min(self.response, width - 1)
        return Shape(rows, width - response, response)

    def _make_grid(self, shape: Shape) -> TokenBatch:
        """Prompts and responses; one prompt is a token shorter, so that there is padding."""
        rows, width = shape.rows, shape.prompt + shape.response
        attention = np.ones((rows, width), dtype=bool)
        attention[0, : shape.prompt > 1] = False
        counted = np.zeros((rows, width), dtype=bool)
        counted[:, shape.prompt :] = True
        return TokenBatch(_zeros(rows, width, dtype=torch.long), attention, counted)

    def _make_experience(self, shape: Shape) -> Experience:
        grid, count = self._make_grid(shape), shape.rows * shape.response
        numbers = {name: _zeros(count) for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns")}
        return Experience(grid, _zeros(count, dtype=torch.long), **numbers)

    def _sample(self, policy: PreTrainedModel, rows: int, new: int, seen: int, cache: Cache) -> None:
        """The forward pass over the last `new` of `seen` tokens, and a draw."""
        ids = _zeros(rows, new, dtype=torch.long)
        attention_mask = torch.ones(rows, seen, dtype=torch.long, device="cpu")
        given = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1)[:, -new:],
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        logits = policy(**filter_kwargs(unwrapped(policy), given)).logits
        self._name_cache(cache)
        latest = logits[:, -1].to(torch.float32, copy=True)
        settings = self.config.rollout
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
        tokens, _ = sampling.draw(latest, keys_of(0, ids[:, 0]))
        torch.full_like(latest, -torch.inf).scatter_(-1, tokens[:, None], 0.0).argmax(dim=-1)

    def _fill(self, cache: Cache) -> None:
        """Fill the cache with the responses except their last two tokens."""
        count = self.response - 2
        for index, layer in enumerate(cache.layers):
            keys = getattr(layer, "keys", None)
            if keys is not None and count > 0:
                new = keys.new_empty(*keys.shape[:2], count, keys.shape[-1])
                cache.update(new, new, index)
                del new
                self._name_cache(cache)

    def _name_buffers(self, buffers: KeyValues) -> None:
        self.timeline.name("KV cache", [x for layer in buffers.layers.values() for x in layer])

    def _name_cache(self, cache: Cache) -> None:
        states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        self.timeline.name("KV cache", [x for x in states if x is not None])


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def op_workspace(func: OpOverload, args: Sequence[Any], device: str) -> Breakdown:
    """Bytes that an op holds only while it runs on a device of that type: a chunk of logits of the linear ops.

    Negative where the op of a run writes to an argument, and only that of tensors without data makes another.
    """
    if func in _IN_PLACE:
        return {"activations": -args[_IN_PLACE[func]].untyped_storage().nbytes()}
    if func not in (_OPS.linear_token_stats.default, _OPS.linear_policy_loss.default):
        return {}
    if func is _OPS.linear_policy_loss.default:
        call, needs = grouped(args, LinearCall, NeedsGrad)
    else:
        (call,), needs = grouped(args, LinearCall), NeedsGrad(False, False, False)
    return {"logits chunk": Buffers.of(call, len(call.hidden), needs, device).bytes(call)}
