"""Tiny local models, configs and rollouts shared by the trainer's tests."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast import ops
from ppo_fast.rlhf import PPOConfig
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.decoding.requests import Sampling
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import Models, load_models
from ppo_fast.rlhf.ppo.rollout import Rollout, generate
from ppo_fast.rlhf.ppo.scoring import score
from tests.rlhf.supervised_factories import EOS, STAGES, WORDS, make_model, rows

PROMPTS = ["w1", "w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Word-level, V = 64 with the special tokens; pad 0, eos 2."""
    return tiny.make_tokenizer(WORDS)


@pytest.fixture
def make_config(tmp_path: Any) -> Callable[..., PPOConfig]:
    """make_config(updates=2, optim={"lr": 1e-3}): a small quiet run in tmp_path with those values changed."""

    def make(**values: Any) -> PPOConfig:
        base: dict[str, Any] = {
            "updates": 2,
            "threads": 1,
            "rollout": {"batch_size": 8, "max_new_tokens": 6},
            "optim": {"lr": 1e-3, "value_lr": 1e-3, "minibatch_size": 4, "epochs": 2},
            "output_dir": str(tmp_path / "run"),
            "log": {"tensorboard": False, "console": False},
        }
        for name, value in values.items():
            base[name] = base.get(name, {}) | value if isinstance(value, Mapping) else value
        return config_from_dict(base)

    return make


@pytest.fixture
def make_models(tokenizer: Any) -> Callable[..., Models]:
    """make_models(config, arch="gpt2", **overrides): policy, reference, value model; deterministic."""

    def make(config: PPOConfig, *, arch: str = "llama", tokenizer: Any = tokenizer, **overrides: Any) -> Models:
        policy = tiny.make_model(64, arch=arch, hidden=32, layers=1, heads=2, **overrides)
        generator = torch.Generator().manual_seed(config.seed)
        return load_models(config.model, generator, policy=policy, tokenizer=tokenizer)

    return make


@pytest.fixture
def make_rollout(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rollout]:
    """make_rollout(models, config): ragged prompts, responses ended after 3 to 7 tokens, scored."""
    draw = Sampling.draw

    def draw_or_end(self: Sampling, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.where(keys[:, 1] % 5 + 2 == keys[:, 2], EOS, draw(self, logits, keys)[0])
        return tokens, ops.token_logprobs(logits, tokens, temperature=self.temperature)

    monkeypatch.setattr(Sampling, "draw", draw_or_end)

    def make(models: Models, config: PPOConfig, *, seed: int = 0, prompts: list[str] = PROMPTS) -> Rollout:
        data = load_prompts(prompts, models.tokenizer, config.data)
        rows = [row % len(prompts) for row in range(config.rollout.batch_size)]
        batch = make_batch(data, rows, models.pad_id, models.device)
        return score(models, generate(models, batch, config.rollout, seed), config.rollout)

    return make


@pytest.fixture
def run_stage(tmp_path: Any, tokenizer: Any) -> Callable[..., Any]:
    """run_stage(stage, examples, policy=None, resume=False, **config) -> the result of a quiet run on a tiny model."""

    def go(
        stage: str,
        examples: Any = None,
        *,
        policy: Any = None,
        tokenizer: Any = tokenizer,
        resume: bool = False,
        callbacks: Any = (),
        **values: Any,
    ) -> Any:
        train, kind, _ = STAGES[stage]
        base = {
            "threads": 1,
            "optim": {"lr": 1e-3, "batch_size": 8},
            "output_dir": str(tmp_path / stage),
            "log": {"tensorboard": False, "console": False},
        }
        merged = base | {
            name: base.get(name, {}) | value if isinstance(value, dict) else value for name, value in values.items()
        }
        given = {} if values.get("init") else {"model": policy or make_model(), "tokenizer": tokenizer}
        config = config_from_dict(merged, kind=kind)
        return train(config, train=examples or rows(40), resume=resume, callbacks=callbacks, **given)

    return go
