"""Bases on disk and models in every layout, for the tests of layouts and adapters."""

import torch

from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.adapter_files import find_adapter
from ppo_fast.rlhf.models.models import load_models
from tests.rlhf.supervised_factories import STAGES, make_model, make_tokenizer, rows

LORA = {"lora": {"rank": 4, "alpha": 8}}
LAYOUTS = {
    "separate": {},
    "offloaded": {"offload": True},
    "shared": {"layout": "shared"},
    "adapters": {"layout": "adapters", **LORA},
}
IDS = torch.arange(10, 18)[None]
MASK = torch.ones_like(IDS, dtype=torch.bool)


def save_base(directory, arch="llama", hidden=32, **options):
    """A tiny causal LM with its tokenizer; its path."""
    tiny.make_model(64, arch=arch, hidden=hidden, layers=1, heads=2, **options).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def read_adapter(field, path):
    """The adapter at `path` with its tensors, None where there is none."""
    saved = find_adapter(field, path)
    return None if saved is None else saved.read()


def models_in(layout, path=None, *, seed=0, reward=None, reference=None, **model):
    """Models in a layout of LAYOUTS, from `path` or from a tiny model."""
    given = {} if path else {"policy": make_model(), "tokenizer": make_tokenizer()}
    values = {"model": {"path": path, **LAYOUTS[layout], **model}, "reward": reward or {}, "reference": reference or {}}
    config = config_from_dict(values)
    generator = torch.Generator().manual_seed(seed)
    return load_models(config.model, generator, **given, reward=config.reward, reference=config.reference)


def run_stage(stage, directory, path, *, resume=False, optim=None, checkpoint=None, init=None, **model):
    """A quiet run of SFT, reward model or DPO with adapters on what is at `path`."""
    train, kind, _ = STAGES[stage]
    values = {
        "threads": 1,
        "model": {"path": path, **LORA, **model},
        "optim": {"lr": 1e-2, "batch_size": 8, **(optim or {})},
        "output_dir": str(directory),
        "checkpoint": checkpoint or {},
        "log": {"tensorboard": False, "console": False},
    }
    return train(config_from_dict(values | ({"init": init} if init else {}), kind=kind), train=rows(40), resume=resume)


@torch.no_grad()
def logits(network):
    return network(IDS).logits


@torch.no_grad()
def outputs(models, role):
    """Logits [1, 8, V], or values [1, 8], of a role."""
    with models.using(role) as network:
        return network(IDS, MASK) if role == "value" else network(IDS).logits


@torch.no_grad()
def shift(parameters, seed=1):
    """Move weights by noise, as training might."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def every_bit(module):
    """A copy of all of a network's parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
