"""PPO from Python: model, tokenizer, reward and prompts are objects. A tiny Llama learns to write even numbers."""

from ppo_fast.rlhf import PPOConfig, train_ppo
from ppo_fast.rlhf.models.tiny import make_model, make_tokenizer

# Yours come from `AutoTokenizer.from_pretrained` and `AutoModelForCausalLM.from_pretrained`.
tokenizer = make_tokenizer([str(number) for number in range(60)])
model = make_model(len(tokenizer), hidden=32)


def reward(completions, **columns):  # also `prompts`, `completion_ids` and the other columns of the prompts' rows
    return [sum(int(word) % 2 == 0 for word in text.split()) / 8 for text in completions]


config = PPOConfig(
    updates=10,
    output_dir="runs/even",
    overwrite=True,
    threads=1,  # quickest for a model this small
    rollout={"max_new_tokens": 8},
    reward={"missing_eos_penalty": 0},  # an answer of 8 numbers is as good as one that ends earlier
    optim={"lr": 3e-3, "value_lr": 3e-3},  # `PPOConfig()` has those of a large model
)
result = train_ppo(config, policy=model, tokenizer=tokenizer, reward_fn=reward, prompts=["1 2", "3", "4 5 6"])
print(f"score {result.history[0]['objective/scores']:.2f} -> {result.history[-1]['objective/scores']:.2f}")
