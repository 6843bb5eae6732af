"""What two ranks and one process start with, for tests of the start; functions for `run_on_ranks`."""

import contextlib
import shutil
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, PreTrainedModel

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import kernels
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.networks import EmptyNetworks
from ppo_fast.rlhf.models.sharding import Root, shard
from ppo_fast.rlhf.ppo.reward_sources import load_sources
from ppo_fast.rlhf.split import whole
from ppo_fast.rlhf.training.checkpoint import load_saved, save_models
from ppo_fast.rlhf.world import current
from tests.rlhf.distributed.ranks import alone
from tests.rlhf.distributed.test_runs import BASE, PROMPTS, reward
from tests.rlhf.layout_factories import LAYOUTS, run_stage, save_base, shift
from tests.rlhf.supervised_factories import make_model, make_tokenizer

CASES = {  # options of the model and of the reward; paths are below the directory of the bases
    "separate, packed": ({"path": "base", "packing": True}, {}),
    "tied, bfloat16": ({"path": "tied", "dtype": "bfloat16"}, {}),
    "shared": ({"path": "tied", **LAYOUTS["shared"]}, {}),
    "a value model from a reward model": ({"path": "base"}, {"models": ["reward/final"]}),
    "a value model from a run": ({"path": "base", "value_path": "run"}, {}),
    "a value model from a causal LM": ({"path": "base", "value_path": "tied"}, {}),
    "an adapter added to the weights": ({"path": "sft/final"}, {}),
    "adapters": ({"path": "base", **LAYOUTS["adapters"]}, {}),
    "adapters, tied, bfloat16": ({"path": "tied", "dtype": "bfloat16", **LAYOUTS["adapters"]}, {}),
    "adapters that were saved": (
        {"path": "sft/final", **LAYOUTS["adapters"], "value_path": "adapted/final"},
        {"models": ["adapted/final", "reward/final"]},
    ),
    "a reward model on a base of its own": ({"path": "base"}, {"models": ["adapted/final"]}),
}


def save_bases(directory):
    """Models of every kind, by the names of CASES."""
    for name in ("base", "tied"):
        save_base(directory / name, tie_word_embeddings=name == "tied")
        GenerationConfig(eos_token_id=[2, 7]).save_pretrained(directory / name)
    quick = {"optim": {"lr": 1e-2, "batch_size": 40}}
    run_stage("sft", directory / "sft", str(directory / "base"), **quick)
    run_stage("reward", directory / "adapted", str(directory / "base"), **quick)
    run_stage("reward", directory / "reward", str(directory / "base"), **quick, lora={"rank": 0})
    models = load_models(config_from_dict({"model": {"path": str(directory / "base")}}).model, torch.Generator())
    shift(models.value.parameters())
    save_models(models, directory / "run")
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    sampled = {"model": {"path": str(directory / "tied")}, "data": {"prompts": str(directory / "prompts.jsonl")}}
    sampled |= {name: BASE[name] for name in ("rollout", "optim")}
    sampled |= {"reward": {"models": [str(directory / "reward" / "final")]}}
    (directory / "sampled.yaml").write_text(yaml.safe_dump(sampled))


def config_of(case, directory):
    model, reward = CASES[case]
    paths = {name: str(directory / model[name]) for name in ("path", "value_path") if name in model}
    rewards = {name: [str(directory / each) for each in value] for name, value in reward.items()}
    return config_from_dict({"model": model | paths, "reward": rewards})


def networks_of(config, *, split):
    """Everything that a rank has of a case: the state of the networks, and what the run is decided by."""
    generator = torch.Generator().manual_seed(0)
    models = load_models(config.model, generator, reward=config.reward)
    sources = load_sources(config, models) if config.reward.models else []
    modules = {"policy": models.policy, "reference": models.reference, "value": models.value}
    modules |= {f"reward {number}": source.model for number, source in enumerate(sources)}
    roots = Root(**modules)
    held = sum(x.nbytes for x in [*roots.parameters(), *roots.buffers()] if not x.is_meta)
    if split:
        models.split(config.model)
        for source in sources:
            source.split(models, config.model)
    first = {}
    named = roots.named_parameters(remove_duplicate=False)
    ties = {name: (first.setdefault(id(x), name), x.requires_grad) for name, x in named}
    tensors = {name: whole(x).detach().clone() for name, x in (*roots.named_parameters(), *roots.named_buffers())}
    base = models.adapters.base if models.adapters else ""
    attention = [each.config._attn_implementation for each in (models.policy, models.reference, models.value.backbone)]
    generation = models.policy.generation_config.to_dict()
    decided = (models.eos_ids, base, attention, generation, generator.get_state().tolist())
    return tensors, (ties, decided, [source.eos_ids for source in sources]), held


def reading_fails():
    """Within the block no weights can be read."""
    return mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("reads weights"))


def starts(directory):
    """By case: whether the weights and buffers of two ranks are those of one process, and the bytes before."""
    bases, found = directory.parent / "bases", {}
    for case in CASES:
        config = config_of(case, bases)
        with alone():
            tensors, rest, held = networks_of(config, split=False)
        with contextlib.nullcontext() if current().is_main else reading_fails():
            own, own_rest, own_held = networks_of(config, split=True)
        equal = own.keys() == tensors.keys() and all(
            own[name].dtype == x.dtype and torch.equal(own[name], x) for name, x in tensors.items()
        )
        found[case] = (equal, own_rest == rest, own_held / held)
    return found


def given(_):
    """Whether the weights are rank 0's where each rank passes its own object; messages where those do not fit."""
    config, rank = config_from_dict({"model": {}}), current().rank

    def weights(**options):
        policy = make_model(**options)
        generator = torch.Generator().manual_seed(0)
        models = load_models(config.model, generator, policy=policy, tokenizer=make_tokenizer())
        models.split(config.model)
        return [whole(weight).detach().clone() for weight in models.policy.parameters()]

    with alone():
        expected = weights()
    found = [*zip(weights(seed=rank), expected, strict=True)]
    found += zip(weights(tie_word_embeddings=rank == 1), expected, strict=True)
    messages = []
    for options in ({"intermediate_size": 64}, {"attention_bias": True}):
        try:
            weights(**(options if rank else {}))
        except UserError as message:
            messages.append((str(message), message.origin))
    return all(torch.equal(a, b) for a, b in found), messages


def failing(directory):
    """Messages of a damaged file of weights, and of an architecture that only rank 0 knows; who says so second."""
    bases, messages = directory.parent / "bases", []
    if current().is_main:
        shutil.copytree(bases / "base", directory / "damaged")
        weights = directory / "damaged" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    current().objects(None)
    unknown = mock.patch.object(EmptyNetworks, "build", side_effect=ValueError("no such architecture"))
    for path, patch in ((directory / "damaged", contextlib.nullcontext()), (bases / "base", unknown)):
        config = config_from_dict(BASE | {"model": {"path": str(path)}, "output_dir": str(directory / "run")})
        try:
            with patch:
                train_ppo(config, reward_fn=reward, prompts=PROMPTS)
        except UserError as message:
            messages.append((str(message), message.origin))
    return messages


def renamed(directory):
    """Whether weights that are saved under other names, as experts are, come back, and the names are the same."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    networks = []
    for seed in range(2):
        torch.manual_seed(seed)
        networks.append(AutoModelForCausalLM.from_config(config))
    saved, model = networks
    if current().is_main:
        saved.save_pretrained(directory)
    current().objects(None)
    shard(Root(model=model), current().mesh)
    with contextlib.nullcontext() if current().is_main else reading_fails():
        load_saved(model, directory)
    found = [torch.equal(whole(own), x) for own, x in zip(model.parameters(), saved.parameters(), strict=True)]
    return all(found), {*load_file(directory / "model.safetensors")} == {*saved.state_dict()}


def kernel_check(_):
    """The differences of states and gradients by which kernels are chosen, between two ranks and one process."""
    model, device = make_model(), torch.device("cpu")
    expected = kernels._states_and_gradients(model, lambda function: function(model), device)
    root = Root(model=make_model().requires_grad_(False))
    shard(root, current().mesh)
    split, run = root.networks["model"], lambda function: root.run("model", function)
    found = [kernels._states_and_gradients(split, run, device) for _ in range(2)]
    return max((a - b).abs().max().item() for states in found for a, b in zip(states, expected, strict=True))


def passes(_):
    """The records that torch keeps of passes without a gradient, layer by layer and on whole weights."""
    root, ids = Root(model=make_model()), torch.arange(8)[None]
    shard(root, current().mesh)
    states = [module._get_fsdp_state() for module in root.modules() if isinstance(module, FSDPModule)]

    def records():
        indices = [len(state._fsdp_param_group._post_forward_indices) for state in states]
        return sum(indices) + len(states[0]._comm_ctx.post_forward_order)

    with torch.no_grad():
        root.run("model", lambda model: model(ids).logits)
        counts = [records()]
        with root.whole("model") as model:
            model(ids)
            counts.append(records() > 0)
    return [*counts, records()]
