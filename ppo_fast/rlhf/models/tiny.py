"""Tokenizers and models of a few thousand parameters, made on the spot: nothing is downloaded.

They are ordinary ``transformers`` objects. The quickstart trains them and the tests run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer: text is split at white space and decoded by joining with spaces.

    The ids of ``<pad> <bos> <eos> <unk>`` are 0 to 3; ``words[i]`` has id ``4 + i``. No special token is
    added to a text by encoding it.

    Raises:
        ValueError: a word is repeated, is empty, holds white space, or is a special token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIALS, *words]
    for word in words:
        if word.split() != [word] or entries.count(word) > 1:
            raise ValueError(f"make_tokenizer: expected words to be unique and without spaces, got {word!r}")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    vocab_size: int,
    *,
    arch: str = "llama",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 128,
    seed: int = 0,
    **overrides: object,
) -> PreTrainedModel:
    """Make a randomly initialized causal language model, in float32, in evaluation mode, on the CPU.

    Args:
        vocab_size: entries of the embedding and of the output layer.
        arch: "llama" and "qwen2" have rotary positions, "gpt2" has learned absolute ones.
        hidden: width of the model, a multiple of ``heads``; the MLP is four times as wide.
        max_positions: longest sequence, prompt and response together.
        seed: of the initial weights. The global generator is left as it was.
        overrides: further fields of the model's configuration, by the names ``transformers`` gives them.

    Raises:
        ValueError: ``arch`` is unknown or ``hidden`` is no multiple of ``heads``.
    """
    from transformers import AutoModelForCausalLM

    if hidden % heads:
        raise ValueError(f"make_model: expected hidden to be a multiple of heads = {heads}, got {hidden}")
    shape = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if arch == "gpt2":
        shape |= {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": max_positions}
    else:
        shape |= {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": max_positions,
        }
    config = _config_class(arch)(**(shape | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _config_class(arch: str) -> type[PretrainedConfig]:
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gpt2": GPT2Config}
    if arch not in classes:
        raise ValueError(f"make_model: expected arch to be one of {', '.join(classes)}, got {arch!r}")
    return classes[arch]
