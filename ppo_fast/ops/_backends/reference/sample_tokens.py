"""Counter-based noise, the filters and the exponential race of ``sample_tokens``."""

import torch
from torch import Tensor

from ppo_fast.ops._backends.reference.token_stats import log_softmax
from ppo_fast.ops._core.inputs import SampleInputs
from ppo_fast.ops._core.results import SampledTokens

# Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", as in Random123.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
# Below this one of 2^31 values, 1/32 of all, log1p keeps the digits that log would lose.
_SMALL = 1 << 26
_WORDS_AT_ONCE = 1 << 20


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words of a counter of four and a key of two, all int64 in [0, 2^32)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for round_ in range(_ROUNDS):
        # Int64 wraps: the shifted product is right in its low 32 bits.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = product0 >> 32 & _LOW, product1 >> 32 & _LOW
        key0, key1 = (k0 + round_ * _WEYL[0]) & _LOW, (k1 + round_ * _WEYL[1]) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & _LOW, high0 ^ c3 ^ key1, product0 & _LOW
    return c0, c1, c2, c3


def noise(keys: Tensor, vocab: int) -> Tensor:
    """Exponential variables [N, V] float32 of keys [N, 3]: word v takes lane v % 4 of counter (v // 4, step, row)."""
    seed, row, step = (x[:, None] for x in keys.unbind(-1))
    counter = torch.arange((vocab + 3) // 4, dtype=torch.int64, device=keys.device)[None]
    halves = row & _LOW, row >> 32 & _LOW
    words = philox((counter, step & _LOW, *halves), (seed & _LOW, seed >> 32 & _LOW))
    return exponential(torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab])


def exponential(words: Tensor) -> Tensor:
    """-log(1 - x) in float32 with x = (k + 1/2) / 2^31, k the upper 31 bits of each word."""
    k = words >> 1
    x, rest = ((n.float() + 0.5) * 2.0**-31 for n in (k, (1 << 31) - 1 - k))
    return -torch.where(k < _SMALL, torch.log1p(-x), rest.log())


def smallest_kept(x: Tensor, top_k: int | None, top_p: float | None, temperature: float) -> Tensor:
    """The smallest logit [N, 1] of x [N, V] that the filters keep; at least the largest is kept."""
    ordered = x.sort(dim=-1, descending=True).values
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept = ordered >= ordered[:, min(top_k, ordered.shape[-1]) - 1, None]
    if top_p is not None:
        u, _ = log_softmax(ordered.double().masked_fill(~kept, -torch.inf), temperature)
        mass = u.exp()
        larger = mass.cumsum(-1) - mass
        # Of equal logits the first has the mass of the larger ones before it.
        kept &= (larger < top_p).index_fill(-1, larger.new_zeros(1, dtype=torch.int64), True)
    return torch.where(kept, ordered, torch.inf).amin(-1, keepdim=True)


def _sample(x: Tensor, keys: Tensor, inputs: SampleInputs) -> SampledTokens:
    """Tokens and log-probabilities [N] of rows x [N, V]."""
    u, _ = log_softmax(x, inputs.temperature)
    race = u.exp() / noise(keys, x.shape[-1])
    if inputs.top_k is not None or inputs.top_p is not None:
        kept = x >= smallest_kept(x, inputs.top_k, inputs.top_p, inputs.temperature)
        race = torch.where(kept, race, -1.0)
    tokens = race.argmax(dim=-1)
    logprobs = u.gather(-1, tokens[:, None])[:, 0]
    return SampledTokens(torch.where(logprobs.isnan(), 0, tokens), logprobs)


def sample_tokens(inputs: SampleInputs) -> SampledTokens:
    """A token of every row, and its log-probability; about a million words at a time."""
    B, T, V = inputs.logits.shape
    x, keys = inputs.logits.reshape(B * T, V), inputs.keys.reshape(B * T, 3)
    rows = max(1, _WORDS_AT_ONCE // V)
    parts = [_sample(*part, inputs) for part in zip(x.split(rows), keys.split(rows), strict=True)]
    tokens, logprobs = (torch.cat(part).view(B, T) for part in zip(*parts, strict=True))
    return SampledTokens(tokens, logprobs)
