"""Config keys of earlier releases and what has become of them."""

from __future__ import annotations

# "key" or "key: value" -> the same under the present names.
RENAMED = {
    "model.park": "model.offload",
    "model.checkpointing": "model.gradient_checkpointing",
    "model.quantise": "model.load_in_4bit",
    "model.quantise: nf4": "model.load_in_4bit: true",
    "model.quantise: none": "model.load_in_4bit: false",
    "model.batches": "model.packing",
    "model.batches: packed": "model.packing: true",
    "model.batches: padded": "model.packing: false",
    "model.logits": "model.fused_head",
    "model.logits: linear": "model.fused_head: true",
    "model.logits: materialised": "model.fused_head: false",
    "optim.states": "optim.name",
    "optim.states: full": "optim.name: adamw",
    "optim.states: 8bit": "optim.name: adamw_8bit",
    "optim.masters": "optim.master_weights",
    "log.dir": "output_dir",
    "log.overwrite": "overwrite",
    "log.save_every": "checkpoint.every",
    "log.keep_last": "checkpoint.keep",
    "reward.normalise": "reward.normalize",
    "reward.normalise: saved": "reward.normalize: dataset",
    "reward.normalize: saved": "reward.normalize: dataset",
}
GONE = {
    "kl.reward_estimator": "the KL in the reward is always k1",
    "rollout.static_cache": "'rollout.engine: slots', the default, keeps keys and values in fixed buffers",
}


def old_keys() -> list[str]:
    """The keys that no config has any more."""
    return [row for row in (*RENAMED, *GONE) if ":" not in row]


def what_became_of(name: str, value: object) -> str | None:
    """A sentence that names the present key, or value, in place of an old one; None for any other."""
    pair = f"{name}: {value}"
    for old in (pair, name):
        if old in RENAMED:
            return f"{old!r} is now {RENAMED[old]!r}"
    return f"{name!r} is gone: {GONE[name]}" if name in GONE else None
