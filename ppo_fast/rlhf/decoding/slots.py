"""The engine `slots`: the transformers model that is trained, sampled from through slots that are refilled.

A slot holds one response at a time. When it ends, the slot takes the next request, so the longest response holds up no
other. A prompt without its last token is prefilled, once for all its samples, in blocks of bounded tokens. The first
step of a response reads that last token. Tokens that are sampled past the end of a response are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppo_fast.rlhf.data.packing import Array, to_device
from ppo_fast.rlhf.decoding.attention import attending_to_slots, rotary_table
from ppo_fast.rlhf.decoding.cache import KeyValues, Prefill
from ppo_fast.rlhf.decoding.flags import Flags
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Responses
from ppo_fast.rlhf.decoding.schedule import Refill, Schedule
from ppo_fast.rlhf.decoding.step import Graphs, Network, SlotState, Step
from ppo_fast.rlhf.decoding.support import check_supported

PREFILL_TOKENS = 4096  # of one forward pass, padding included


class Pace(NamedTuple):
    """How the loop divides its work."""

    grain: int | None  # torch's attention reads lengths that are multiples of it; None: a kernel reads what it needs
    fewest: int  # slots that take part in a step even if they are free
    every: int  # steps from one look at the flags to the next


# On a GPU a step of few slots takes as long as one of 64: it reads the same weights.
PACES = {"cpu": Pace(16, 1, 2), "cuda": Pace(None, 64, 4)}


def run_slots(model: PreTrainedModel, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
    """Sample a response to each request, `settings.width` at a time; keys and values are freed on return.

    Raises:
        UserError: `check_supported` refuses the model.
    """
    check_supported(model)
    network = Network(model)
    # Operations on a CPU are so small that their records for autograd count. Hooks may keep what they see.
    quick = model.device.type == "cpu" and not network.hooked
    with torch.inference_mode() if quick else torch.no_grad():
        loop = Loop(network, requests, settings, model.device)
        with attending_to_slots(network.backbone), rotary_table(network.backbone, loop.buffers.length):
            responses = loop.run()
    return Responses(*(x.clone() for x in responses)) if quick else responses


class Loop:
    """One run of all requests."""

    def __init__(
        self, network: Network, requests: Sequence[Request], settings: DecodingSettings, device: torch.device
    ) -> None:
        self.network, self.requests, self.settings, self.device = network, requests, settings, device
        slots = min(settings.width, len(requests))
        longest = max(request.max_new_tokens for request in requests)
        # The last token of a response is never read.
        length = max(len(request.prompt) + request.max_new_tokens - 1 for request in requests)
        self.schedule = Schedule(requests, slots)
        self.pace = PACES[device.type]
        self.buffers = KeyValues(slots, round_up(length, 16))
        self.state = SlotState(slots, longest, length, device)
        self.decode = Graphs(Step(network, self.state, self.buffers, settings), device)
        self.flags = Flags(self.state.found)
        self.tokens = torch.zeros((len(requests), longest), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((len(requests), longest), dtype=torch.float32, device=device)
        self.found = torch.zeros(len(requests), dtype=torch.int64, device=device)
        self.answered = 0

    def run(self) -> Responses:
        """Return the responses."""
        while True:
            if refill := self.schedule.refill(self.flags.taken):
                self.fill(refill)
            if not self.schedule.busy:
                break
            self._advance()
            self._collect()
            if moved := self.schedule.shrink(self.pace.fewest):
                self._move(*moved)
        limits = np.array([request.max_new_tokens for request in self.requests], dtype=np.int64)
        return Responses.cut(self.tokens, self.logprobs, self.found, to_device(limits, self.device))

    def fill(self, refill: Refill) -> None:
        """Bring the prompts' keys and values into the slots, and begin their responses."""
        self.prefill(refill.prefilled)
        if refill.copied:
            sources, targets = zip(*refill.copied, strict=True)
            length = max(self.schedule.slots[index].position for index in targets)
            self.buffers.copy(self._indices(sources), self._indices(targets), length)
        rows = []
        for index in refill.slots:
            slot = self.schedule.slots[index]
            request = self.requests[slot.request]
            rows.append((index, request.prompt[-1], slot.position, self.settings.seed, request.row, 0))
        started = to_device(np.array(rows, dtype=np.int64), self.device)
        self.state.start(started[:, 0], started[:, 1], started[:, 2], started[:, 3:])

    def prefill(self, slots: list[int]) -> None:
        """Write the keys and values of the prompts of these slots, except those of their last tokens."""
        prompts = {index: self.requests[self.schedule.slots[index].request].prompt[:-1] for index in slots}
        for block in blocks(prompts, PREFILL_TOKENS, self.settings.pad_id):
            view = Prefill(self.buffers, self._indices(block.slots), block.start)
            ids = to_device(block.ids, self.device)
            positions = torch.arange(ids.shape[1], dtype=torch.int64, device=self.device) + block.start
            self.network.states(ids, positions.expand(len(ids), -1), view)

    def _advance(self) -> None:
        """Take a few steps in all slots, and a snapshot of the flags."""
        busy = [self.schedule.slots[index] for index in self.schedule.busy]
        steps = min(self.pace.every, max(slot.left for slot in busy))
        grain = self.pace.grain or self.buffers.length
        length = min(round_up(max(slot.position for slot in busy) + steps, grain), self.buffers.length)
        for _ in range(steps):
            self.decode(len(self.schedule.slots), length)
        self.schedule.advance(steps)
        self.flags.take()

    def _collect(self) -> None:
        """Keep the responses that have ended."""
        slots, requests = map(self._indices, self.schedule.end(*self.flags.read()))
        if len(slots):
            self.tokens[requests] = self.state.tokens[slots, :-1]
            self.logprobs[requests] = self.state.logprobs[slots, :-1]
            self.found[requests] = self.state.found[slots]
            self.answered += len(requests)
            if self.settings.progress is not None:
                self.settings.progress(self.answered, len(self.requests))

    def _move(self, sources: list[int], targets: list[int]) -> None:
        if sources:
            source, target = self._indices(sources), self._indices(targets)
            self.state.move(source, target)
            self.buffers.copy(source, target, self.buffers.length)

    def _indices(self, numbers: Sequence[int]) -> Tensor:
        return to_device(np.array(numbers, dtype=np.int64), self.device)


class Block(NamedTuple):
    """Prompt tokens of one forward pass of prefill."""

    slots: list[int]
    ids: Array  # [b, n] int64, right-padded
    start: int  # position of the first column


def blocks(prompts: dict[int, Sequence[int]], limit: int, pad_id: int) -> Iterator[Block]:
    """Cut prompts, by slot, into blocks of at most `limit` tokens, those of like length together.

    A prompt longer than that takes several blocks of its own, in order. An empty one takes none.
    """
    order = sorted((slot for slot in prompts if prompts[slot]), key=lambda slot: -len(prompts[slot]))
    while order:
        width = len(prompts[order[0]])
        together, order = order[: max(1, limit // width)], order[max(1, limit // width) :]
        ids = np.full((len(together), width), pad_id, dtype=np.int64)
        for row, slot in zip(ids, together, strict=True):
            row[: len(prompts[slot])] = prompts[slot]
        for start in range(0, width, limit):
            yield Block(together, ids[:, start : start + limit], start)


def round_up(length: int, grain: int) -> int:
    """Return the smallest multiple of `grain` that is `length` or more."""
    return -(-length // grain) * grain
