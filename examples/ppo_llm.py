"""PPO of a causal language model on one page, in the order of the algorithm: transformers, the ops, nothing between.

    python examples/ppo_llm.py                 # a tiny Llama learns to write 7 of its 64 tokens, in seconds on a CPU
    python examples/ppo_llm.py --model PATH    # a model and tokenizer of your own; the reward stays this toy

Each update calls `sample` (responses), `score` (policy, reference, critic), `advantages` (rewards, GAE) and `update`
(optimizer steps). One dict of tensors, `batch`, passes through them:

    ids             [B, L]  prompt, padded on the left, then response, padded on the right
    attention_mask  [B, L]  True: a token of the prompt or of the response
    mask            [B, T]  True: a token the policy chose, up to and including the first EOS
    logprobs, ref_logprobs, sampled_logprobs, entropy, values, rewards, advantages, returns  [B, T]

B responses of up to T tokens, prompts of up to P tokens, L = P + T; N counted tokens of a minibatch; V entries of the
vocabulary; D hidden units. `ppo-fast train` takes the same steps and adds reward models, checkpoints and adapters.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LogitsProcessorList

import ppo_fast as ppo

B, MINIBATCH, MICRO_BATCH = 64, 16, 16  # responses per update, per optimizer step, per forward pass
EPOCHS, MAX_NEW_TOKENS, TEMPERATURE, KL_COEF, VALUE_CLIP = 2, 16, 1.0, 0.005, 0.2
LOSS = ppo.PolicyLossConfig(clip_low=0.2, clip_high=0.2, temperature=TEMPERATURE)
Batch = Metrics = dict[str, Tensor]


class Draw:
    """A logits processor that draws the tokens, to keep their log-probabilities and not the logits [B, T, V]."""

    def __init__(self) -> None:
        self.logprobs: list[Tensor] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        # No top-k or top-p: the ratio is that of the full softmax, which must be the one that is sampled.
        tokens = torch.distributions.Categorical(logits=logits / TEMPERATURE).sample()
        self.logprobs.append(ppo.token_logprobs(logits, tokens, temperature=TEMPERATURE))
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@torch.no_grad()
def sample(policy: nn.Module, prompts: list[list[int]]) -> Batch:
    """Sample a response to each prompt."""
    P, pad, draw = max(map(len, prompts)), policy.generation_config.pad_token_id, Draw()
    # On the left, so that all responses begin in column P.
    padded = torch.tensor([[pad] * (P - len(prompt)) + prompt for prompt in prompts], device=policy.device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=policy.device)
    prompt_mask = torch.arange(P, device=policy.device) >= P - lengths
    ids = policy.generate(padded, attention_mask=prompt_mask.long(), logits_processor=LogitsProcessorList([draw]))
    # By the first EOS, not by `ids != pad`: where PAD is EOS, that would not count the EOS.
    is_eos = (ids[:, P:] == policy.generation_config.eos_token_id).long()
    mask = is_eos.cumsum(1) - is_eos == 0
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    sampled_logprobs = torch.where(mask, torch.stack(draw.logprobs, dim=1), 0.0)
    return {"ids": ids, "attention_mask": attention_mask, "mask": mask, "sampled_logprobs": sampled_logprobs}


def response_hidden(trunk: nn.Module, batch: Batch) -> Tensor:
    """Return the hidden states [B, T, D] that predict the response tokens: those one position before each."""
    attention_mask = batch["attention_mask"].long()
    # Padding has no position. Rotary embeddings hide this mistake under left padding, learned ones (GPT-2) do not.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    out = trunk(batch["ids"], attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return out.last_hidden_state[:, -batch["mask"].shape[1] - 1 : -1]


def head_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return what the linear ops take instead of logits: [B, T, V] never exists, only a chunk of its rows.

    A model that scales or caps its logits after the head needs more than weight and bias; `logprob_diff` shows it.
    """
    head, hidden = model.get_output_embeddings(), response_hidden(model.base_model, batch)
    targets = batch["ids"][:, -batch["mask"].shape[1] :]
    return {"hidden": hidden, "weight": head.weight, "bias": head.bias, "targets": targets, "mask": batch["mask"]}


class Critic(nn.Module):
    """A trunk and a scalar head: values [B, T] of the states before each response token."""

    def __init__(self, trunk: nn.Module, D: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(D, 1)
        nn.init.zeros_(self.head.weight)  # a random head would add its noise to the first advantages
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(response_hidden(self.trunk, batch)).squeeze(-1)


@torch.no_grad()
def score(policy: nn.Module, reference: nn.Module, critic: Critic, batch: Batch) -> Batch:
    """Add log-probabilities, entropy and values, from the forward pass of the update.

    The ratio divides by these log-probabilities, so it is 1 until the first step. Those of `generate` come from a KV
    cache; the difference is printed and tests everything above: masks, positions, the shift by one, temperature.
    """
    parts: list[Batch] = []
    for x in split(batch, MICRO_BATCH):
        # Temperature divides the logits everywhere: sampling, policy, reference and (in LOSS) update.
        stats = ppo.linear_token_stats(**head_inputs(policy, x), temperature=TEMPERATURE)
        ref = ppo.linear_token_stats(**head_inputs(reference, x), temperature=TEMPERATURE)
        part = {"logprobs": stats.logprobs, "entropy": stats.entropy, "ref_logprobs": ref.logprobs}
        parts.append(part | {"values": critic(x)})
    return batch | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def reward(responses: Tensor, mask: Tensor) -> Tensor:
    """Score the responses: [B]. This toy counts the ids that end in 0; yours decodes text or calls a reward model."""
    return (mask & (responses % 10 == 0)).sum(1) / MAX_NEW_TOKENS


def advantages(batch: Batch) -> Batch:
    """Add rewards per token, advantages and returns."""
    mask, k1 = batch["mask"], ppo.kl_estimate(batch["logprobs"], batch["ref_logprobs"], "k1")
    scores = reward(batch["ids"][:, -mask.shape[1] :], mask)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # the EOS or the last token; the first pad is too late
    # Ziegler et al. 2019, eq. 2. In a reward k1, whose mean is the KL. Both log-probabilities are 0 where masked.
    rewards = torch.where(last, scores[:, None], 0.0) - KL_COEF * k1
    # Schulman et al. 2016, eq. 16, with value 0 after the last counted token. Discounting would shorten responses.
    raw, returns = ppo.gae(rewards, batch["values"], mask, gamma=1.0, lam=0.95)
    # Whitening uses the whole batch: by minibatches, equal advantages would become different ones. The critic learns
    # returns that are not whitened.
    return batch | {"rewards": rewards, "advantages": ppo.whiten(raw, mask), "returns": returns}


def split(batch: Batch, size: int, order: Tensor | None = None) -> list[Batch]:
    """Split into batches of `size` responses, in the given order."""
    order = torch.arange(len(batch["ids"])) if order is None else order
    return [{name: x[rows.to(x.device)] for name, x in batch.items()} for rows in order.split(size)]


def backward(policy: nn.Module, critic: Critic, minibatch: Batch, micro_batch: int) -> Metrics:
    """Accumulate the gradients of a minibatch over micro-batches; return means over its tokens."""
    # One normalizer per optimizer step. A mean per micro-batch would weigh tokens by the lengths of their neighbors.
    N, metrics = minibatch["mask"].sum(), []
    for x in split(minibatch, micro_batch):
        # Schulman et al. 2017, eq. 7. An entropy bonus, or a KL in the loss, is a field of LOSS.
        inputs = {"old_logprobs": x["logprobs"], "advantages": x["advantages"], **head_inputs(policy, x)}
        actor = ppo.linear_policy_loss(**inputs, config=LOSS, denominator=N)
        actor.loss.backward()
        options = {"old_values": x["values"], "clip": VALUE_CLIP, "denominator": N}
        ppo.value_loss(critic(x), x["returns"], x["mask"], **options).loss.backward()
        weight = x["mask"].sum() / N
        metrics.append({name: weight * actor.metrics[name] for name in ("ratio_mean", "approx_kl", "clipfrac")})
    return {name: torch.stack([part[name] for part in metrics]).sum() for name in metrics[0]}


def update(policy: nn.Module, critic: Critic, optimizer: torch.optim.Optimizer, batch: Batch) -> list[Metrics]:
    """Take EPOCHS passes over the batch in minibatches; return the metrics of each step."""
    steps = []
    for _ in range(EPOCHS):
        for minibatch in split(batch, MINIBATCH, torch.randperm(len(batch["ids"]))):
            step = backward(policy, critic, minibatch, MICRO_BATCH)
            # Clip once per step, on complete gradients. Separately, so that the critic's errors do not slow the policy.
            step["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(step)
    return steps


def make_models(path: str | None) -> tuple[nn.Module, nn.Module, Critic, list[list[int]]]:
    """Return policy, reference, critic, and the token ids of B prompts of different lengths."""
    if path is None:
        torch.set_num_threads(1)  # more threads only wait for each other in a model this small
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        policy, eos, pad = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes)), 1, 0
        prompts = [torch.randint(2, 64, (1 + n % 4,)).tolist() for n in range(B)]
    else:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # bfloat16 rounds a step of 1e-6 away
        tokenizer = AutoTokenizer.from_pretrained(path)
        eos = tokenizer.eos_token_id
        pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        texts = ["Count to ten:", "The years of the last four Olympic Games were", "A price list, in euros:"]
        prompts = [tokenizer(texts[n % len(texts)])["input_ids"] for n in range(B)]
    # A new config: the model's own may bring top-k, penalties and bans of tokens, which the update does not know.
    policy.generation_config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=pad)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # and eval stays: with dropout the ratio is noise
    critic = Critic(copy.deepcopy(policy.base_model), policy.config.hidden_size).to(policy.device).eval()
    return policy, copy.deepcopy(policy).requires_grad_(False), critic, prompts


def report(batch: Batch, steps: list[Metrics]) -> str:
    """Describe an update in one line; the ratio is that of its first minibatch."""
    mask, kl = batch["mask"], batch["logprobs"] - batch["ref_logprobs"]
    unexplained = (batch["returns"] - batch["values"])[mask].var() / batch["returns"][mask].var()
    numbers = {
        "score": reward(batch["ids"][:, -mask.shape[1] :], mask).mean(),
        "kl": kl.sum(1).mean(),
        "entropy": batch["entropy"][mask].mean(),
        "length": mask.sum(1).float().mean(),
        "explained_variance": 1 - unexplained,
        "ratio": steps[0]["ratio_mean"],
    }
    numbers |= {name: torch.stack([s[name] for s in steps]).mean() for name in ("approx_kl", "clipfrac", "grad_norm")}
    diff = (batch["logprobs"] - batch["sampled_logprobs"]).abs().max()
    return "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()) + f"  logprob_diff {diff:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="directory or hub id of a causal LM; default: a tiny Llama")
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy, reference, critic, prompts = make_models(args.model)
    lr, value_lr = (4e-3, 4e-3) if args.model is None else (1e-6, 5e-6)
    groups = [{"params": policy.parameters(), "lr": lr}, {"params": critic.parameters(), "lr": value_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    # Linear to 0: at a constant rate a policy that has learned its task can still leave it.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.updates)
    for number in range(args.updates):
        batch = advantages(score(policy, reference, critic, sample(policy, prompts)))
        steps = update(policy, critic, optimizer, batch)
        schedule.step()
        print(f"update {number + 1:2}  {report(batch, steps)}")


if __name__ == "__main__":
    main()
