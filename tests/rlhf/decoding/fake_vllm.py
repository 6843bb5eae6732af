"""A package `vllm` with the signatures that the engine calls, which samples by the weights that it was given."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM


class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        max_tokens: int,
        logprobs: int,
        ignore_eos: bool,
        stop_token_ids: list[int],
        stop: list[str],
        include_stop_str_in_output: bool,
        detokenize: bool,
        skip_special_tokens: bool,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name != "self"})


class LLM:
    """Its calls are recorded in `calls`; with `deaf` it ignores new weights."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool,
        generation_config: str,
        load_format: str,
        dtype: str,
        seed: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_cache_memory_bytes: int,
        gpu_memory_utilization: float,
        logprobs_mode: str,
        enable_sleep_mode: bool,
        enforce_eager: bool,
    ) -> None:
        options = {name: value for name, value in locals().items() if name != "self"}
        self.calls, self.deaf = [("LLM", options)], False
        self.files = {path.name for path in Path(model).iterdir()}
        self.architectures = json.loads((Path(model) / "config.json").read_text())["architectures"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = AutoConfig.from_pretrained(model)
            self.network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        core = SimpleNamespace(shutdown=lambda timeout=None: self.calls.append(("shutdown",)))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        weights = dict(kwargs.pop("weights_iterator"))
        assert not kwargs
        self.calls.append((method, [*weights]))
        if not self.deaf:
            self.network.load_state_dict(weights)
        return [None]

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.calls.append(("reset_prefix_cache",))
        return True

    def sleep(self, level=1, mode="abort"):
        self.calls.append(("sleep", level))

    def wake_up(self, tags=None):
        self.calls.append(("wake_up", tags))
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        self.calls.append(("generate", sampling_params))
        assert not use_tqdm
        pairs = zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[self.answer(prompt["prompt_token_ids"], each)]) for prompt, each in pairs]

    @torch.no_grad()
    def answer(self, prompt, parameters):
        generator, tokens, steps = torch.Generator().manual_seed(parameters.seed), [], []
        while len(tokens) < parameters.max_tokens and not {*tokens} & {*parameters.stop_token_ids}:
            logits = self.network(torch.tensor([prompt + tokens])).logits[0, -1] / parameters.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            tokens.append(token)
            steps.append({token: SimpleNamespace(logprob=logits.log_softmax(-1)[token].item())})
        reason = "stop" if {*tokens} & {*parameters.stop_token_ids} else "length"
        return SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)


def package(*, version="0.32.0", device_type="cpu", sleeps=True):
    """The package's modules by name, and the list of what was started."""
    started = []

    def start(*args, **options):
        started.append(LLM(*args, **options))
        return started[-1]

    cleanup = lambda shutdown_ray=False: started[-1].calls.append(("cleanup",))  # noqa: E731
    platform = SimpleNamespace(device_type=device_type, is_sleep_mode_available=lambda: sleeps)
    modules = {
        "vllm": SimpleNamespace(__version__=version, LLM=start, SamplingParams=SamplingParams),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "vllm.distributed": SimpleNamespace(cleanup_dist_env_and_memory=cleanup),
    }
    return modules, started
