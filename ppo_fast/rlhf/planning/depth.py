"""Plan a deep network from three shallow ones: equal layers add equal bytes, at each moment of a step.

The steps with n and n + 1 layers differ by one layer's operations wherever the step passes through the layers. At the
operations that both have, counted from the start of a phase or from its end, the bytes of an item are affine in the
number of layers. Within a pass they are affine in the layer's place as well, except that the first and the last layer
may differ, so that the fullest one is among the first two and the last two. Two pairs of shallow steps must agree on
the deep one; else the whole step is taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.shapes import NetworksWithoutData
from ppo_fast.rlhf.planning.tracing import Breakdown, Timeline

SHALLOW = 3  # layers of the shorter step: a first, a middle and a last one
# Operations that must be equal after a layer that only one step has; fewer where the next such layer is near.
WINDOWS = (40, 20, 10, 5)
FEWEST = 16  # layers of a network that is planned from shallow ones


Operation = tuple[object, int]  # of a timeline's trace


class Peaks(NamedTuple):
    """What a plan reads from a step."""

    phases: dict[str, Breakdown]
    host: int


def measure(config: PPOConfig, shapes: SavedModels, run: Callable[[SavedModels], Timeline]) -> Peaks:
    """Return the peaks of the step of `run`, from shallow ones where the layers of all networks are equal."""
    depth = common_depth(config, shapes)
    if depth is not None and depth >= FEWEST:
        steps = [run(with_depth(shapes, SHALLOW + more)) for more in range(3)]
        found, again = (extrapolate(steps[i], steps[i + 1], depth - SHALLOW - i) for i in range(2))
        if found is not None and found == again:
            return found
    whole = run(shapes)
    return Peaks(whole.peaks(), whole.host)


def common_depth(config: PPOConfig, shapes: SavedModels) -> int | None:
    """Return the number of layers that all networks have, if each is a stack of equal layers; else None.

    None as well with moments of 8 bits or offloaded models: they go parameter by parameter, and a shallow step then
    missed the peak of a 7B by 0.1 GiB.
    """
    if config.optim.name == "adamw_8bit" or config.model.offload:
        return None
    parts = [part for target in config.model.lora.targets for part in target.split(".")]
    found = [shapes.policy, *shapes.rewards, *([] if shapes.value is None else [shapes.value.value])]
    patterns = [each.adapter.config for each in found if each.adapter is not None]
    uneven = any(each.layers_to_transform is not None or each.rank_pattern for each in patterns)
    if uneven or any(part.isdigit() for part in parts):
        return None
    depths = {_depth(each, config) for each in found}
    return depths.pop() if len(depths) == 1 else None


def with_depth(shapes: SavedModels, count: int) -> SavedModels:
    """Return the models with `count` layers each."""

    def cut(saved: SavedModel) -> SavedModel:
        config = copy.deepcopy(saved.config)
        text = config.get_text_config(decoder=True)
        for name, _ in _per_layer(text):
            setattr(text, name, getattr(text, name)[:count])
        text.num_hidden_layers = count
        return dataclasses.replace(saved, given=config)

    value = None if shapes.value is None else cut(shapes.value.value)
    return SavedModels(cut(shapes.policy), value, tuple(map(cut, shapes.rewards)))


def extrapolate(short: Timeline, long: Timeline, layers: int) -> Peaks | None:
    """Return the peaks of a step with that many layers more than `short`; `long` has one more.

    None when an operation of the shorter step has no place in the longer one.
    """
    phases: dict[str, Breakdown] = {}
    usages = short.usage(), long.usage()
    items = sorted(usages[0].keys() | usages[1].keys())
    tables = [
        np.stack([usage.get(item, np.zeros(line.now + 2, dtype=np.int64)) for item in items])
        for usage, line in zip(usages, (short, long), strict=True)
    ]
    for (name, *first), (_, *second) in zip(short.phases, long.phases, strict=True):
        a, b = (line.trace[start : stop + 1] for line, (start, stop) in ((short, first), (long, second)))
        ahead, behind = align(a, b), align(a[::-1], b[::-1])
        if ahead is None or behind is None:
            return None
        backward = [(len(a) - 1 - i, len(b) - 1 - j) for i, j in reversed(behind)]
        i, j = np.array(ahead + backward, dtype=np.int64).T
        before, after = tables[0][:, first[0] + i], tables[1][:, second[0] + j]
        bytes_ = before + layers * (after - before)
        fullest = bytes_[:, bytes_.sum(axis=0).argmax()]
        breakdown = {item: int(count) for item, count in zip(items, fullest, strict=True) if count}
        phases[name] = max(breakdown, phases.get(name, {}), key=lambda found: sum(found.values()))
    return Peaks(phases, short.host + layers * (long.host - short.host))


def align(short: Sequence[Operation], long: Sequence[Operation]) -> list[tuple[int, int]] | None:
    """Return the places of each operation of `short` in both, where `long` has more of them here and there.

    The operations of the layer before such a place are left out: it is the last one in `short` only. An operation on
    all layers at once, whose size differs, is the same operation. None if one has no place.
    """
    pairs, j = list[tuple[int, int]](), 0
    for i, each in enumerate(short):
        if j >= len(long):
            return None
        if each != long[j]:
            found = next(filter(None, (_find(short[i : i + window], long, j + 1) for window in WINDOWS)), None)
            if found is None and each[0] != long[j][0]:
                return None
            if found is not None:
                del pairs[-(found - j) :]
                j = found
        pairs.append((i, j))
        j += 1
    return pairs


def _find(part: Sequence[Operation], whole: Sequence[Operation], start: int) -> int | None:
    """Return where `part` begins in `whole`, at `start` or later."""
    places = (k for k in range(start, len(whole)) if whole[k] == part[0] and whole[k : k + len(part)] == part)
    return next(places, None)


def _depth(saved: SavedModel, config: PPOConfig) -> int | None:
    text = saved.config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or any(len({*map(str, values)}) > 1 for _, values in _per_layer(text)):
        return None
    with torch.device("meta"):
        network = NetworksWithoutData(config.model, "meta").make(AutoModel, saved)
    stacks = [part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return count if len(stacks) == 1 and len({*map(repr, stacks[0])}) == 1 else None


def _per_layer(config: PretrainedConfig) -> Iterable[tuple[str, Sequence[object]]]:
    """Return the settings of a config that have an entry for each layer, such as `layer_types`."""
    count = config.num_hidden_layers
    return [(name, x) for name, x in vars(config).items() if isinstance(x, list | tuple) and len(x) == count]
