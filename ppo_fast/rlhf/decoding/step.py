"""One decoding step of all slots: backbone, head, draw, end; on a GPU a CUDA graph.

The step reads and writes static buffers only and never waits for the host, so a graph can replay it. Graphs live as
long as one run of requests: weights may move between runs (offloading, merging), and keys and values are freed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppo_fast.rlhf.decoding.cache import Decode, KeyValues, View
from ppo_fast.rlhf.decoding.requests import DecodingSettings
from ppo_fast.rlhf.models.forward import backbone_of, unwrapped


class Network:
    """Backbone and head of a causal LM, on views of the slots."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.backbone, self.head = backbone_of(model), model.get_output_embeddings()
        self.hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        # The forward pass below transformers' decorators, which fill in and collect what is not asked for here.
        bare = functools.partial(inspect.unwrap(type(self.backbone).forward), self.backbone)
        self.forward: Callable[..., Any] = self.backbone if self.hooked else bare
        config = unwrapped(model).config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # transformers makes no mask where it is given one of four dimensions; the views need none.
        self.no_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=model.device)

    def states(self, ids: Tensor, positions: Tensor, view: View) -> Tensor:
        """Return the last hidden states [b, n, D] of ids [b, n] at positions [b, n]."""
        given: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "attention_mask": self.no_mask}
        states: Tensor = self.forward(**given, past_key_values=view, use_cache=True, slots=view).last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [b, V] of states [b, D]."""
        logits: Tensor = self.head(states)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class SlotState:
    """The buffers of the slots on the device. Each is [S, ...]; slots that are free hold arbitrary values.

    Args:
        longest: tokens of the longest response.
        length: one more than the last position that a slot may reach.
    """

    def __init__(self, slots: int, longest: int, length: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        self.longest, self.last = longest, length - 1
        self.ids = zeros(1)  # the token that the next step reads
        self.positions = zeros(1)  # of that token
        self.keys = zeros(3)  # seed, row, and step of the token that the next step draws
        self.found = zeros()  # tokens up to the first EOS or stop string; 0: none yet
        # One column more takes what is sampled past the longest response.
        self.tokens, self.logprobs = zeros(longest + 1), zeros(longest + 1, dtype=torch.float32)

    def start(self, slots: Tensor, ids: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Begin a response in each of these slots [n], from a prompt's last token and its position [n]."""
        self.ids[slots, 0], self.positions[slots, 0], self.keys[slots], self.found[slots] = ids, positions, keys, 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [n] to slots `target` [n]."""
        for buffer in (self.ids, self.positions, self.keys, self.found, self.tokens, self.logprobs):
            buffer[target] = buffer[source]


class Step:
    """Samples a token in each of the first slots."""

    def __init__(self, network: Network, state: SlotState, buffers: KeyValues, settings: DecodingSettings) -> None:
        self.network, self.state, self.buffers, self.settings = network, state, buffers, settings
        device = state.ids.device
        self.eos = torch.tensor(settings.eos_ids, dtype=torch.int64, device=device)
        if settings.stop is not None:
            width = settings.stop.maximum_token_len
            self.back = torch.arange(1 - width, 1, dtype=torch.int64, device=device)

    def __call__(self, count: int, length: int) -> None:
        """Sample in slots 0 to `count` - 1, whose positions are below `length`."""
        state = self.state
        ids, positions, keys, found = (x[:count] for x in (state.ids, state.positions, state.keys, state.found))
        view = Decode(self.buffers, positions[:, 0], length)
        states = self.network.states(ids, positions, view)
        tokens, logprobs = self.settings.sampling.draw(self.network.logits(states[:, -1]), keys)
        at = keys[:, 2:].clamp(max=state.longest)
        state.tokens[:count].scatter_(1, at, tokens[:, None])
        state.logprobs[:count].scatter_(1, at, logprobs[:, None])
        ends = (tokens[:, None] == self.eos).any(dim=1)
        if self.settings.stop is not None:
            ends = ends | self._stops(count, at)
        found.copy_(torch.where((found == 0) & ends, at[:, 0] + 1, found))
        ids.copy_(tokens[:, None])
        positions.add_(1).clamp_(max=state.last)
        keys[:, 2] += 1

    def _stops(self, count: int, at: Tensor) -> Tensor:
        """Return [n] bool: the response, without its prompt, ends in a stop string at token `at` [n, 1]."""
        assert self.settings.stop is not None
        index = at + self.back
        latest = self.state.tokens[:count].gather(1, index.clamp(min=0))
        unknown = torch.iinfo(torch.int32).max  # transformers reads ids beyond the vocabulary as no token
        ends: Tensor = self.settings.stop(torch.where(index < 0, unknown, latest), None)
        return ends


class Graphs:
    """Replays a step as a CUDA graph, one for each number of slots and length; on a CPU, runs it.

    The first step of each runs as it is: it makes buffers, and compiles and loads kernels. A capture waits for nothing,
    so it overlaps with what the device still has to do.
    """

    def __init__(self, sample: Step, device: torch.device) -> None:
        self.sample, self.device = sample, device
        self.warm = set[tuple[int, int]]()
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def __call__(self, count: int, length: int) -> None:
        key = (count, length)
        if self.device.type != "cuda" or key not in self.warm:
            self.warm.add(key)
            self.sample(count, length)
            return
        if key not in self.graphs:
            with side_by_side(capture_stream(self.device)):
                self.graphs[key] = self._captured(count, length)
        self.graphs[key].replay()

    def _captured(self, count: int, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with without_collector():
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.sample(count, length)
            finally:
                graph.capture_end()
        return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_by_side(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on a stream, after what the current stream has to do and before what it is given next."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from freeing a CUDA object within the block, which would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
