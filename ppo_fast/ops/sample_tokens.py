"""Draw one token from each row of logits, by noise that depends on a key only: ``sample_tokens``."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._backends.native import sample_tokens as native_sample_tokens
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.inputs import SampleInputs
from ppo_fast.ops._core.layout import as_logits, grid
from ppo_fast.ops._core.results import SampledTokens
from ppo_fast.ops._core.schema import schema

registry.register_public("sample_tokens")
registry.register("sample_tokens", "torch", registry.Implementation(reference.sample_tokens))
registry.register("sample_tokens", "triton", triton.implementation("sample_tokens", "sample_tokens"))
registry.register("sample_tokens", "native", native_rows.implementation(native_sample_tokens.sample_tokens))


def _launch(*arguments: Any) -> SampledTokens:
    """Checks what depends on values, then runs the backend."""
    *given, backend = arguments
    inputs = SampleInputs(*given)
    checks.step_values("sample_tokens", inputs.keys)
    if inputs.keys.numel() == 0:
        return _empty(inputs)
    return registry.implementation("sample_tokens", backend)(inputs)


_sample_tokens = torch.library.custom_op(
    "ppo_fast::sample_tokens",
    mutates_args=(),
    schema=schema(SampleInputs, "str backend", results=SampledTokens),
)(_launch)


@_sample_tokens.register_fake
def _(*arguments: Any) -> SampledTokens:
    *given, _ = arguments
    return _empty(SampleInputs(*given))


def _empty(inputs: SampleInputs) -> SampledTokens:
    """Results without values."""
    shape, dtype = inputs.logits.shape[:-1], checks.accumulation_dtype(inputs.logits.dtype)
    return SampledTokens(inputs.keys.new_empty(shape), inputs.logits.new_empty(shape, dtype=dtype))


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    backend: str = "auto",
) -> SampledTokens:
    """Sample a token from each row's softmax(logits / temperature), reproducibly: the key decides, not the batch.

    The token is argmax_v p_v / e_v over the words v that the filters keep, with p = softmax(logits / temperature) and
    e_v ~ Exp(1), which is the Gumbel race argmax_v logit_v / temperature - log(e_v). The noise is
    e_v = -log(1 - (k + 1/2) / 2^31), k the upper 31 bits of lane v % 4 of Philox4x32-10 (Salmon et al. 2011) with
    counter (v // 4, step, low and high half of the row) and the seed's halves as the key. A row's token thus depends
    on its logits and its key, not on the other rows. All backends draw the same words; their tokens agree unless two
    words tie to float32 rounding in the race. Probabilities are exact to about 2^-31: words
    below that are drawn with a probability in error by as much.

    Word v is kept if fewer than ``top_k`` words have a larger logit and if those of a larger logit hold less than the
    share ``top_p`` of the probability that top-k keeps. Equal logits are kept or dropped together, the largest is
    always kept. The log-probability is that of the whole softmax, whatever the filters drop.

    A row with a NaN or +inf, or with nothing but -inf, has no distribution: its token is 0 and its log-probability NaN.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64.
        keys: [..., 3], int64, on the device of the logits: the seed, the row of the global batch (any integers) and the
            step, in [0, 2^32). No key may serve twice.
        temperature: in [1e-9, 1e9], divides the logits.
        top_k: an integer >= 1, or None to keep all.
        top_p: in (0, 1], or None; 1 keeps all.
        backend: "auto" | "torch" | "triton" | "native".

    Returns:
        SampledTokens(tokens, logprobs), each [...]: int64, and nats in float32 (float64 for float64 logits). They carry
        no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. One sentence that names the argument.

    Example:
        >>> import torch
        >>> keys = torch.tensor([[7, row, 0] for row in range(4)])
        >>> sampled = sample_tokens(torch.zeros(4, 10), keys)
        >>> again = sample_tokens(torch.zeros(1, 10), keys[2:3])
        >>> sampled.tokens[2].item() == again.tokens[0].item(), round(sampled.logprobs[2].item(), 4)
        (True, -2.3026)
    """
    op = "sample_tokens"
    checks.logits(op, "logits", logits)
    checks.sample_keys(op, keys, logits)
    checks.scale(op, "temperature", temperature)
    checks.top_k(op, top_k)
    checks.top_p(op, top_p)
    backend = registry.resolve(op, backend, logits.device, logits.dtype)
    shape, V = logits.shape[:-1], logits.shape[-1]
    inputs = SampleInputs(
        as_logits(logits.detach()),
        keys.reshape(*grid(shape), 3).contiguous(),
        float(temperature),
        None if top_k is None or top_k >= V else int(top_k),
        None if top_p is None or top_p == 1 else float(top_p),
    )
    run = _launch if registry.runs_directly(logits) else _sample_tokens
    tokens, logprobs = run(*inputs, backend)
    return SampledTokens(tokens.view(shape), logprobs.view(shape))
