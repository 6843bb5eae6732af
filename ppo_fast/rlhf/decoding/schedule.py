"""Which slot answers which request, decided on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ppo_fast.rlhf.decoding.requests import Request

PATIENCE = 5  # a fifth of the slots is refilled together: a prefill takes as long as several steps


@dataclass
class Slot:
    """The host's knowledge of a slot."""

    prompt: int = -1  # number of the prompt whose keys and values it holds; -1: none
    request: int = -1  # index of the request that it answers; -1: free
    position: int = 0  # of the token that the next step reads
    left: int = 0  # steps until the response has `max_new_tokens`
    since: int = 0  # snapshots of the flags taken before the response began


class Refill(NamedTuple):
    """Slots that begin a response, and where the keys and values of their prompts come from."""

    slots: list[int]
    prefilled: list[int]  # those whose prompt no slot holds
    copied: list[tuple[int, int]]  # (source, target): those whose prompt another slot holds


class Schedule:
    """Slots, and the requests that wait for one; those with the same prompt one after another."""

    def __init__(self, requests: Sequence[Request], count: int) -> None:
        self.requests, self.slots = requests, [Slot() for _ in range(count)]
        numbers: dict[tuple[int, ...], int] = {}
        self.prompts = [numbers.setdefault(tuple(request.prompt), len(numbers)) for request in requests]
        self.waiting = deque(sorted(range(len(requests)), key=self.prompts.__getitem__))

    @property
    def busy(self) -> list[int]:
        """The slots that answer a request."""
        return [index for index, slot in enumerate(self.slots) if slot.request >= 0]

    def refill(self, snapshots: int) -> Refill | None:
        """Give waiting requests to free slots, once enough are free.

        A prompt is prefilled once: as long as a request with it waits, a slot that is free and holds it goes to that
        request, and no other.
        """
        free = [index for index, slot in enumerate(self.slots) if slot.request < 0]
        enough = min(-(-len(self.slots) // PATIENCE), len(self.waiting))
        if not self.waiting or len(free) < enough:
            return None
        pairs = self._assign(free)
        holders = {self.slots[index].prompt: index for index in self.busy}
        holders |= {self.slots[slot].prompt: slot for slot, request in pairs if self._holds(slot, request)}
        refill = Refill([slot for slot, _ in pairs], [], [])
        for slot, request in pairs:
            prompt = self.prompts[request]
            if prompt not in holders:
                holders[prompt] = slot
                refill.prefilled.append(slot)
            elif not self._holds(slot, request):
                refill.copied.append((holders[prompt], slot))
            asked = self.requests[request]
            self.slots[slot] = Slot(prompt, request, len(asked.prompt) - 1, asked.max_new_tokens, snapshots)
        return refill

    def advance(self, steps: int) -> None:
        """Count steps that all slots took."""
        for index in self.busy:
            self.slots[index].position += steps
            self.slots[index].left -= steps

    def end(self, snapshot: int, found: list[int]) -> tuple[list[int], list[int]]:
        """Free the slots whose response has its last token; return them and the requests that they answered.

        Args:
            snapshot: number of the snapshot that `found` [slots] is; those taken before a response began say nothing
                about it.
        """
        ended = [
            index
            for index in self.busy
            if self.slots[index].left <= 0 or (snapshot > self.slots[index].since and found[index] > 0)
        ]
        requests = [self.slots[index].request for index in ended]
        for index in ended:
            self.slots[index].request = -1
        return ended, requests

    def shrink(self, fewest: int) -> tuple[list[int], list[int]] | None:
        """Halve the number of slots, down to `fewest`, while half are free and nothing waits.

        Return (sources, targets): the slots beyond that answer requests, and where they move.
        """
        count, busy = len(self.slots), self.busy
        while not self.waiting and count // 2 >= max(fewest, len(busy)):
            count //= 2
        if count == len(self.slots) or not busy:
            return None
        sources = [index for index in busy if index >= count]
        targets = [index for index in range(count) if self.slots[index].request < 0][: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self.slots[target] = self.slots[source]
        del self.slots[count:]
        return sources, targets

    def _holds(self, slot: int, request: int) -> bool:
        return self.slots[slot].prompt == self.prompts[request]

    def _assign(self, free: list[int]) -> list[tuple[int, int]]:
        """Return (slot, request) for the next requests; a slot that holds the prompt comes first."""
        chosen = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        pairs, rest = list[tuple[int, int]](), list[int]()
        for request in chosen:
            holder = next((slot for slot in free if self._holds(slot, request)), None)
            if holder is None:
                rest.append(request)
            else:
                free.remove(holder)
                pairs.append((holder, request))
        return pairs + list(zip(free, rest, strict=False))
