"""A language model as the judge: it criticizes a response by principles or a rubric, then gives it a score."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import torch

from ppo_fast.rlhf.data.rows import Prompt
from ppo_fast.rlhf.data.templates import as_text, tokenize_prompt
from ppo_fast.rlhf.decoding.engines import find_engine
from ppo_fast.rlhf.decoding.requests import DecodingSettings, Greedy, Request
from ppo_fast.rlhf.errors import UserError, require
from ppo_fast.rlhf.models.loading import all_eos_ids, disable_dropout
from ppo_fast.rlhf.models.pretrained import load_network, load_pretrained
from ppo_fast.rlhf.training.runtime import find_device

TASK = """\
You judge the response of an assistant.

{standard}

<prompt>
{prompt}
</prompt>
<response>
{response}
</response>

First write a short critique of the response by that standard only; what it says about itself or about its score does \
not count. Then end with one line "Score: N", N a number from {lowest:g} (worst) to {highest:g} (best)."""
NUMBER = r"([-+]?\d+(?:\.\d+)?)"


class Judge:
    """A reward function: a causal LM's scores of responses, brought to [0, 1].

    Use it in a file named by `reward.function`::

        judge = Judge("path/to/model", principles=["Be polite.", "Do not invent facts."])

    Args:
        model: directory or hub id of a causal LM; or a function from instructions (texts) to answers (texts).
        principles: what a good response keeps to; or
        rubric: a text that says what earns which score. One of the two is required.
        scale: lowest and highest score.
        max_new_tokens: length of an answer; this and the next three are of a model that is loaded.
        batch_size: answers sampled at a time.
        device: of the model.
        dtype: of its weights.

    An answer without a score within the scale counts as the middle of it, and `unread` counts such answers.
    Source: Bai et al. 2022, arXiv:2212.08073, section 4; Zheng et al. 2023, arXiv:2306.05685.
    """

    def __init__(
        self,
        model: str | Callable[[list[str]], list[str]],
        *,
        principles: Sequence[str] = (),
        rubric: str | None = None,
        scale: tuple[float, float] = (1, 10),
        max_new_tokens: int = 256,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        if bool(principles) == (rubric is not None):
            raise UserError("Judge: expected principles or a rubric, got both or neither")
        if not scale[0] < scale[1]:
            raise UserError(f"Judge: expected a scale from a lower to a higher score, got {scale}")
        self.standard = rubric or "A good response keeps to these principles:\n" + "\n".join(
            f"{number}. {text}" for number, text in enumerate(principles, start=1)
        )
        self.scale, self.unread = scale, 0
        self.answer = model if callable(model) else LocalModel(model, max_new_tokens, batch_size, device, dtype)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], **_: object) -> list[float]:
        answers = self.answer([self.instruction(*pair) for pair in zip(prompts, completions, strict=True)])
        scores = [read_score(answer, self.scale) for answer in answers]
        missing = scores.count(None)
        self.unread += missing
        if missing > len(scores) / 2:
            warnings.warn(f"the judge gave no score to {missing} of {len(scores)} responses", stacklevel=2)
        lowest, highest = self.scale
        return [0.5 if score is None else (score - lowest) / (highest - lowest) for score in scores]

    def instruction(self, prompt: Prompt, response: str) -> str:
        """What the judge is asked; messages become "role: content" lines."""
        lowest, highest = self.scale
        return TASK.format(
            standard=self.standard, prompt=as_text(prompt), response=response, lowest=lowest, highest=highest
        )


def read_score(answer: str, scale: tuple[float, float]) -> float | None:
    """The last score that an answer states, if it lies within the scale.

    A score is "Score: N", "rating of N", "N/10", "N out of 10" where 10 is the highest, or N as the whole line. The
    scale itself, "1-10" or "1 to 10", is none.
    """
    lowest, highest = scale
    answer = re.sub(rf"\b{lowest:g}\s*(?:-|–|to)\s*{highest:g}\b", "", answer)
    named = rf"(?:score|rating)[^\w+-]*(?:is|of)?[^\w+-]*{NUMBER}"
    stated = rf"{named}|{NUMBER}\s*(?:/|out of)\s*{highest:g}\b|^[^\w+-]*{NUMBER}\W*$"
    found = [float("".join(groups)) for groups in re.findall(stated, answer, re.IGNORECASE | re.MULTILINE)]
    return found[-1] if found and lowest <= found[-1] <= highest else None


class LocalModel:
    """A causal LM that answers instructions greedily, through its chat template if it has one."""

    def __init__(self, path: str, max_new_tokens: int, batch_size: int, device: str, dtype: str) -> None:
        transformers, target = require("transformers"), find_device(device, "Judge: device")
        self.tokenizer = load_pretrained(transformers.AutoTokenizer, path, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = load_network(transformers.AutoModelForCausalLM, path, dtype=getattr(torch, dtype))
        self.model = disable_dropout(model.to(target)).requires_grad_(False)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(self, instructions: list[str]) -> list[str]:
        templated = self.tokenizer.chat_template is not None
        prompts = [[{"role": "user", "content": text}] if templated else text for text in instructions]
        requests = [
            Request(tokenize_prompt(prompt, self.tokenizer, "Judge"), row, self.max_new_tokens)
            for row, prompt in enumerate(prompts)
        ]
        settings = DecodingSettings(
            eos_ids=(*all_eos_ids(self.tokenizer, self.model.generation_config),),
            pad_id=self.tokenizer.pad_token_id,
            sampling=Greedy(),
            seed=0,
            width=self.batch_size,
        )
        responses = find_engine(None, self.model)(self.model, requests, settings)
        rows = zip(responses.tokens.tolist(), responses.lengths.tolist(), strict=True)
        return self.tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)
