"""The engine `vllm`: a second copy of the weights, in vLLM, in this process.

The copy gets the policy's weights before each phase of sampling, adapters added to them, and gives up its memory on the
device after it. Its noise is its own: equal seeds give equal tokens on one version of vLLM and one device, and other
tokens than the other engines sample.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from ppo_fast.rlhf.config.ppo import PPOConfig, RolloutConfig
from ppo_fast.rlhf.data.packing import TokenBatch, to_device
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Request, Responses, Sampling, left_padded, noise_seed
from ppo_fast.rlhf.errors import UserError, check, require
from ppo_fast.rlhf.models.adapters import TRAINED, merged_weights
from ppo_fast.rlhf.models.forward import response_stats, unwrapped
from ppo_fast.rlhf.models.models import Models

OPTION = "rollout.engine"
OLDEST, TOO_NEW = (0, 32), (0, 34)  # releases: the first that is taken, the first that is not
BLOCK = 128  # tokens: the largest block of keys and values that vLLM chooses by itself
PREFILL_TOKENS = 4096  # of one forward pass
COMPARED = 8  # log-probabilities, after the first load
# Mean difference between sampled and scored log-probabilities: kernels differ in rounding, other weights by far more.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
# In one process, or the weights could not be handed over; without its log, its reports of use and its thread binding.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run_vllm(model: PreTrainedModel, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
    """Sample a response to each request by the copy that `running` made of the model."""
    engine = _ENGINES.get(unwrapped(model))
    if engine is None:
        raise UserError(f"{OPTION}: expected 'slots' or 'generate' outside of a training run, got 'vllm'")
    return engine.run(requests, settings)


@contextlib.contextmanager
def running(models: Models, config: RolloutConfig, longest: int) -> Iterator[None]:
    """Start vLLM for the policy, if it is the engine, and end it with the block.

    Args:
        longest: tokens of prompt and response, at most.

    Raises:
        UserError: the package is missing or of another version, or the model cannot be sampled by it.
    """
    if config.engine != "vllm":
        yield
        return
    module = import_vllm()
    model = unwrapped(models.policy)
    _check_model(models)
    engine = VLLM(module, models, config, longest)
    _ENGINES[model] = engine
    try:
        yield
    finally:
        del _ENGINES[model]
        engine.close()


def import_vllm() -> ModuleType:
    """Return the package vllm; UserError if there is none, or if its version was not tested."""
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    module = require("vllm", extra="vllm")
    version = tuple(map(int, re.findall(r"\d+", module.__version__)[:2]))
    low, high = (".".join(map(str, each)) for each in (OLDEST, TOO_NEW))
    check(OLDEST <= version < TOO_NEW, OPTION, f"vllm >= {low} and < {high}", module.__version__)
    return module


def longest_sequence(config: PPOConfig, model: PretrainedConfig) -> int:
    """Return the most tokens of a prompt and its response that a run allows."""
    context = getattr(model.get_text_config(), "max_position_embeddings", None)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return longest if context is None else min(longest, context)


def cache_bytes(config: Any, width: int, longest: int, itemsize: int) -> int:
    """Return bytes of keys and values of `width` responses with their prompts; `config` is that of the language model.

    One block more is vLLM's own.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = width * -(-longest // BLOCK) + 1
    return 2 * config.num_hidden_layers * heads * head_dim * itemsize * BLOCK * blocks


class VLLM:
    """vLLM with the weights of one policy."""

    def __init__(self, module: ModuleType, models: Models, config: RolloutConfig, longest: int) -> None:
        self.module, self.models, self.checked = module, models, False
        self.sleeps: bool = _platform().is_sleep_mode_available()
        width = config.micro_batch_size or config.batch_size
        set_num_threads = torch.set_num_threads
        try:
            with tempfile.TemporaryDirectory() as directory:
                self.llm = self._start(directory, width, longest, stop=bool(config.stop))
            self._sleep()
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{OPTION}: vllm does not start: {type(error).__name__}: {reason}") from error
        finally:
            torch.set_num_threads = set_num_threads  # vLLM puts a function there that does nothing on a CPU

    def run(self, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
        """Load the weights as they are now, sample, and sleep."""
        if self.sleeps:
            self.llm.wake_up()
        try:
            # `load_weights` of vLLM's model would leave its kernels' copies of the weights as they were.
            weights = merged_weights(unwrapped(self.models.policy), TRAINED)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.reset_prefix_cache()
            if not self.checked:
                self._check_load(requests, settings)
            responses = self._sample(requests, settings)
        finally:
            self._sleep()
        if settings.progress is not None:
            settings.progress(len(requests), len(requests))
        return responses

    def close(self) -> None:
        """Free its memory, so that another can start in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()

    def _start(self, directory: str, width: int, longest: int, *, stop: bool) -> Any:
        """Start vLLM from the policy's config; its weights are arbitrary until the first load."""
        policy = unwrapped(self.models.policy)
        config = copy.deepcopy(policy.config)
        config.architectures = [type(policy).__name__]
        config.to_json_file(Path(directory) / "config.json")
        if stop:  # it looks for stop strings in text
            self.models.tokenizer.save_pretrained(directory)
        text = config.get_text_config()
        return self.module.LLM(
            model=directory,
            skip_tokenizer_init=not stop,
            generation_config="vllm",
            load_format="dummy",
            dtype=str(policy.dtype).removeprefix("torch."),
            seed=0,
            max_model_len=longest,
            max_num_seqs=width,
            max_num_batched_tokens=max(PREFILL_TOKENS, longest, width),
            kv_cache_memory_bytes=cache_bytes(text, width, longest, policy.dtype.itemsize),
            gpu_memory_utilization=0.01,  # the size of the cache is given; vLLM only looks whether this much is free
            logprobs_mode="processed_logprobs",  # at the temperature
            enable_sleep_mode=self.sleeps,
            enforce_eager=self.models.device.type == "cpu",  # compiling takes longer than a small run
        )

    def _sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)  # at level 2 the buffers of the model are lost too

    def _sample(self, requests: Sequence[Request], settings: DecodingSettings) -> Responses:
        prompts = [{"prompt_token_ids": [*request.prompt]} for request in requests]
        parameters = [self._parameters(request, settings) for request in requests]
        found = [each.outputs[0] for each in self.llm.generate(prompts, parameters, use_tqdm=False)]
        lengths = np.array([len(each.token_ids) for each in found], dtype=np.int64)
        shape = (len(found), int(lengths.max()))
        tokens, logprobs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        for row, each in enumerate(found):
            tokens[row, : lengths[row]] = each.token_ids
            steps = zip(each.token_ids, each.logprobs, strict=True)
            logprobs[row, : lengths[row]] = [step[token].logprob for token, step in steps]
        ended = np.array([each.finish_reason == "stop" for each in found])
        return Responses(*(to_device(x, self.models.device) for x in (tokens, logprobs, lengths, ended)))

    def _parameters(self, request: Request, settings: DecodingSettings) -> Any:
        sampling, stop = settings.sampling, settings.stop
        return self.module.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,  # 0: all
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            seed=noise_seed(settings.seed, f"row {request.row}"),
            max_tokens=request.max_new_tokens,
            logprobs=0,  # of the sampled token only
            ignore_eos=True,  # the ids below take its place
            stop_token_ids=[*settings.eos_ids],
            stop=[*stop.stop_strings] if stop is not None else [],
            include_stop_str_in_output=True,
            detokenize=stop is not None,
            skip_special_tokens=False,
        )

    def _check_load(self, requests: Sequence[Request], settings: DecodingSettings) -> None:
        """Compare log-probabilities of a few first tokens with those of the policy."""
        settings = replace(settings, sampling=Sampling(settings.sampling.temperature), eos_ids=(), stop=None)
        asked = [Request(requests[row % len(requests)].prompt, row, 1) for row in range(COMPARED)]
        found = self._sample(asked, settings)
        sequences = [
            [*request.prompt, token] for request, token in zip(asked, found.tokens[:, 0].tolist(), strict=True)
        ]
        ids, attention = left_padded(sequences, settings.pad_id)
        last = np.zeros_like(attention)
        last[:, -1] = True
        batch = TokenBatch(to_device(ids, self.models.device), attention, last)
        temperature = settings.sampling.temperature
        with torch.no_grad(), self.models.using("policy") as policy:
            inputs = batch.sequences(np.arange(COMPARED), packed=False)
            scored = response_stats(policy, inputs, found.tokens[:, 0], linear=False, temperature=temperature).logprobs
        difference = (scored - found.logprobs[:, 0]).abs().mean().item()
        if not difference <= TOLERANCES[policy.dtype]:
            raise UserError(
                f"{OPTION}: expected vllm to give the policy's log-probabilities after the weights were loaded, "
                f"got {COMPARED} that differ by {difference:.2g} on average"
            )
        self.checked = True


_ENGINES: weakref.WeakKeyDictionary[PreTrainedModel, VLLM] = weakref.WeakKeyDictionary()


def _platform() -> Any:
    return importlib.import_module("vllm.platforms").current_platform


def _check_model(models: Models) -> None:
    """Refuse what cannot be handed over."""
    model, kind = unwrapped(models.policy), _platform().device_type
    check(model is models.policy, OPTION, "adapters by model.lora with 'vllm'", type(models.policy).__name__)
    check(model.device.type == kind, OPTION, f"a vllm built for {model.device.type!r}", kind)
    check(model.dtype in TOLERANCES, OPTION, "float32, bfloat16 or float16 with 'vllm'", model.dtype)
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    check(not group, OPTION, "a run of one process with 'vllm'", "a process group")
    if models.adapters is not None:
        models.adapters.check_mergeable(OPTION)
    else:
        quantized = getattr(model, "quantization_method", None)
        check(quantized is None, OPTION, "weights that are not quantized with 'vllm'", quantized)
