"""The truth in float64 NumPy, token by token, written another way than the library and sharing no code with it.

Rows are flat: logits [N, V], everything else [N]. ``segments`` lists the row numbers of each sequence.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Segments = list[list[int]]


def padded_segments(B: int, T: int) -> Segments:
    """The rows of each sequence of a flattened [B, T]."""
    return [list(range(b * T, (b + 1) * T)) for b in range(B)]


def packed_segments(cu_seqlens: list[int]) -> Segments:
    """The rows of each packed sequence."""
    return [list(range(a, b)) for a, b in itertools.pairwise(cu_seqlens)]


# --- one row ---


def log_softmax(row: Array, temperature: float) -> Array:
    """log(exp(z_j) / sum_k exp(z_k)) with z = row / temperature, by an exactly rounded sum."""
    z = np.asarray(row, np.float64) / temperature
    shifted = z - z.max()
    return shifted - math.log(math.fsum(np.exp(shifted)))


def entropy(u: Array) -> float:
    """-sum p*log p over the support."""
    return -math.fsum(math.exp(x) * x for x in u if x > -math.inf)


def kl(u: Array, w: Array) -> float:
    """sum p*(log p - log q) over the support of p."""
    return math.fsum(math.exp(x) * (x - y) for x, y in zip(u, w, strict=True) if math.exp(x) > 0)


def pull_back(
    u: Array, w: Array | None, target: int | None, temperature: float, g: float, g_entropy: float, g_kl: float
) -> Array:
    """d/dlogits of g*logprob + g_entropy*H + g_kl*KL: first d/du of each, then the Jacobian of log_softmax."""
    du = np.zeros_like(u)
    if target is not None:
        du[target] += g
    for j, x in enumerate(u):
        p = math.exp(x)
        if p > 0:
            du[j] -= g_entropy * p * (x + 1)
            if w is not None and g_kl:
                du[j] += g_kl * p * (x - w[j] + 1)
    return (du - np.exp(u) * du.sum()) / temperature


# --- losses ---


class Objective(NamedTuple):
    """One token's surrogate, its slopes in the log ratio and in the log-probability, and what bounded it."""

    value: float
    slope: float
    direct: float
    clipped: bool
    dual: bool


def objective(log_ratio: float, logprob: float, advantage: float, config: Any) -> Objective:
    """min(r*A, clip(r)*A), from below bounded by dual_clip*A where A < 0; cispo: clip(r)*A*logprob of a fixed r."""
    r = math.exp(log_ratio)
    low = -math.inf if config.clip_low is None else 1 - config.clip_low
    high = math.inf if config.clip_high is None else 1 + config.clip_high
    free, held = r * advantage, min(max(r, low), high) * advantage
    if config.objective == "cispo":
        return Objective(held * logprob if held else 0.0, 0.0, held, not low <= r <= high, False)
    clipped = held < free
    value, slope = (held, 0.0) if clipped else (free, free)
    floor = config.dual_clip * advantage if config.dual_clip is not None and advantage < 0 else -math.inf
    dual = floor > value
    return Objective(floor, 0.0, 0.0, clipped, dual) if dual else Objective(value, slope, 0.0, clipped, dual)


def clamp(x: float) -> tuple[float, float]:
    """x clamped to [-20, 20], and its slope."""
    return min(max(x, -20.0), 20.0), float(-20 <= x <= 20)


def kl_term(logprob: float, ref: float, estimator: str) -> tuple[float, float]:
    """k1, k2 or k3 of one token, and its slope in the log-probability."""
    if estimator == "k1":
        return logprob - ref, 1.0
    if estimator == "k2":
        return (logprob - ref) ** 2 / 2, logprob - ref
    d, inside = clamp(ref - logprob)
    return math.exp(d) - 1 - d, (1 - math.exp(d)) * inside


def token_weights(segments: Segments, counted: Array, aggregation: str, denominator: float | None) -> dict[int, float]:
    """The weight of each counted row, such that the loss is the weighted sum."""
    kept = [[i for i in s if counted[i]] for s in segments]
    kept = [s for s in kept if s]
    if aggregation == "token-mean":
        count = sum(len(s) for s in kept) if denominator is None else denominator
        return {i: 1 / count for s in kept for i in s}
    count = len(kept) if denominator is None else denominator
    inner = {"seq-mean-token-mean": len, "seq-mean-token-sum": lambda s: 1}[aggregation]
    return {i: 1 / (count * inner(s)) for s in kept for i in s}


class PolicyTruth(NamedTuple):
    """Everything :func:`policy_loss` returns, and the gradient [N, V] of the loss."""

    loss: float
    metrics: dict[str, float]
    logprobs: Array
    entropy: Array
    kl: Array
    grad: Array


def _log_ratios(logprobs: Array, old: Array | None, s: list[int], kind: str) -> tuple[Array, Array, list[float], float]:
    """For the counted rows of one sequence: token and objective log ratio, slope, and 1 / (tokens that share it)."""
    raw = [0.0 if old is None else logprobs[i] - old[i] for i in s]
    token = np.array([clamp(x)[0] for x in raw])
    if kind == "token":
        return token, token, [clamp(x)[1] for x in raw], 1.0
    value, slope = clamp(sum(raw) / len(s))
    return token, np.full(len(s), value), [slope] * len(s), 1 / len(s)


def policy_loss(
    logits: Array,
    targets: Array,
    old_logprobs: Array | None,
    advantages: Array,
    counted: Array,
    segments: Segments,
    config: Any,
    ref_logprobs: Array | None = None,
    ref_logits: Array | None = None,
    importance_weights: Array | None = None,
    denominator: float | None = None,
) -> PolicyTruth:
    """sum of weight * (-importance*objective + penalty*(r - 1 - log r) + kl_coef*kl - ent_coef*H), row by row."""
    N, V = logits.shape
    logprobs, entropies, kls, grad = np.zeros(N), np.zeros(N), np.zeros(N), np.zeros((N, V))
    penalty, ent_coef, kl_coef = (float(c) for c in (config.penalty_coef, config.ent_coef, config.kl_coef))
    weights = token_weights(segments, counted, config.aggregation, denominator)
    u = {i: log_softmax(logits[i], config.temperature) for i in weights}
    w = {i: None if ref_logits is None else log_softmax(ref_logits[i], config.temperature) for i in weights}
    slope = np.zeros(N)
    for i in weights:
        logprobs[i], entropies[i] = u[i][targets[i]], entropy(u[i])
        if ref_logits is not None:
            kls[i] = kl(u[i], w[i])
        elif ref_logprobs is not None:
            kls[i], dk = kl_term(logprobs[i], ref_logprobs[i], config.kl_estimator)
            slope[i] += weights[i] * kl_coef * dk
    surrogate, loss = 0.0, 0.0
    seen: dict[str, list[float]] = {k: [] for k in ("approx_kl", "clipfrac", "dual_clipfrac", "ratio")}
    for s in ([i for i in s if counted[i]] for s in segments):
        if not s:
            continue
        token, log_r, inside, share = _log_ratios(logprobs, old_logprobs, s, config.ratio)
        d_shared = []
        for i, t, x, ok in zip(s, token, log_r, inside, strict=True):
            importance = 1.0 if importance_weights is None else importance_weights[i]
            o = objective(x, logprobs[i], advantages[i], config)
            slope[i] -= weights[i] * importance * o.direct
            surrogate -= weights[i] * importance * o.value
            loss += weights[i] * (penalty * (math.exp(x) - 1 - x) - ent_coef * entropies[i])
            loss += weights[i] * kl_coef * kls[i] if kl_coef else 0.0
            d_shared.append(weights[i] * ok * (penalty * (math.exp(x) - 1) - importance * o.slope))
            for k, v in zip(seen, (math.exp(t) - 1 - t, o.clipped, o.dual, math.exp(x)), strict=True):
                seen[k].append(v)
        for i, d in zip(s, d_shared, strict=True):
            slope[i] += d if config.ratio == "token" else share * sum(d_shared)
    for i in weights:
        g_kl = weights[i] * kl_coef if ref_logits is not None else 0.0
        grad[i] = pull_back(u[i], w[i], targets[i], config.temperature, slope[i], -weights[i] * ent_coef, g_kl)
    n = max(len(weights), 1)
    metrics = {
        "policy_loss": surrogate,
        "entropy": sum(entropies) / n,
        "kl": sum(kls) / n,
        **{k: sum(seen[k]) / n for k in ("approx_kl", "clipfrac", "dual_clipfrac")},
        "ratio_mean": sum(seen["ratio"]) / n,
        "ratio_max": max(seen["ratio"], default=0.0),
        "tokens": len(weights),
    }
    return PolicyTruth(surrogate + loss, metrics, logprobs, entropies, kls, grad)


def value_loss(
    values: Array,
    returns: Array,
    counted: Array,
    segments: Segments,
    old_values: Array | None = None,
    clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | None = None,
) -> tuple[float, float, Array]:
    """(loss, clipfrac, gradient [N]) of half the larger of the plain and the clipped square."""
    loss, clipped, grad = 0.0, 0, np.zeros(len(values))
    weights = token_weights(segments, counted, aggregation, denominator)
    for i, weight in weights.items():
        plain = values[i] - returns[i]
        square, slope = plain**2, plain
        if clip is not None:
            held = min(max(values[i], old_values[i] - clip), old_values[i] + clip)
            if (held - returns[i]) ** 2 > square:
                square, slope = (held - returns[i]) ** 2, 0.0
                clipped += 1
        loss += weight * square / 2
        grad[i] = weight * slope
    return loss, clipped / max(len(weights), 1), grad


# --- preferences ---


class PreferenceTruth(NamedTuple):
    """What a loss of pairs should give."""

    loss: float
    metrics: dict[str, float]
    grad: Array  # [B], of the chosen; that of the rejected is its negative


def preference_loss(chosen: Array, rejected: Array, margin: Array | None = None, scale: float = 1.0) -> PreferenceTruth:
    """-log of the share e^c / (e^c + e^(r + margin)), pair by pair; ``scale`` is d score / d input."""
    pairs = list(zip(chosen, rejected, np.zeros(len(chosen)) if margin is None else margin, strict=True))
    lost = [1 / (1 + math.exp(c - r - m)) for c, r, m in pairs]
    metrics = {
        "accuracy": sum(c > r for c, r, _ in pairs) / len(pairs),
        "margin": math.fsum(c - r for c, r, _ in pairs) / len(pairs),
    }
    loss = math.fsum(np.logaddexp(c, r + m) - c for c, r, m in pairs) / len(pairs)
    return PreferenceTruth(loss, metrics, np.array([-scale * p / len(pairs) for p in lost]))


def dpo_loss(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array, beta: float) -> PreferenceTruth:
    """The preference loss of the implied rewards beta * (logprob - ref)."""
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    loss, metrics, grad = preference_loss(good, bad, scale=beta)
    rewards = {"reward_chosen": float(good.mean()), "reward_rejected": float(bad.mean())}
    return PreferenceTruth(loss, metrics | rewards, grad)


# --- advantages ---


def gae_sequence(rewards: Array, values: Array, dones: Array, bootstrap: float, gamma: float, lam: float) -> Array:
    """A[t] = sum over l >= t of (gamma*lam)^(l - t) * delta[l], up to the end of t's episode."""
    T = len(rewards)
    advantages = np.zeros(T)
    for t in range(T):
        for k in range(t, T):
            after = 0.0 if dones[k] else (values[k + 1] if k + 1 < T else bootstrap)
            advantages[t] += (gamma * lam) ** (k - t) * (rewards[k] + gamma * after - values[k])
            if dones[k]:
                break
    return advantages


def gae(
    rewards: Array,
    values: Array,
    counted: Array,
    dones: Array,
    bootstrap: Array,
    segments: Segments,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Array, Array]:
    """(advantages, returns) [N]. "carry" takes masked steps out of the sequence; "zero" sets them to 0."""
    advantages, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
    for s, last in zip(segments, bootstrap, strict=True):
        steps = np.array([i for i in s if counted[i] or mask_mode == "zero"], int)
        r, v = np.where(counted, rewards, 0.0)[steps], np.where(counted, values, 0.0)[steps]
        a = gae_sequence(r, v, dones[steps], last, gamma, lam)
        keep = counted[steps]
        advantages[steps[keep]], returns[steps[keep]] = a[keep], (a + v)[keep]
    return advantages, returns


def whiten(x: Array, counted: Array, shift_mean: bool = True) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over the counted elements, unbiased variance, 0 elsewhere."""
    out, kept = np.zeros_like(x), x[counted]
    if kept.size:
        variance = kept.var(ddof=1) if kept.size > 1 else 0.0
        out[counted] = (kept - kept.mean()) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else kept.mean())
    return out
