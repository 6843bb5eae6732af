"""A tokenizer of bytes with a ChatML template, for the tests of what tokenizers and templates make of rows."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", "</s>"]
PAD, BOS, END, START, STOP = range(5)  # their ids
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def make_chat_tokenizer(*, template=CHATML, eos="<|im_end|>", adds=(), other=False):
    """A token for every byte; `adds` of "bos" and "eos" are put around every text; `other`: with other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=other)
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    around = f"{'<s> ' * ('bos' in adds)}$A{f' {eos}' * ('eos' in adds)}"
    special = [(token, SPECIAL.index(token)) for token in ("<s>", eos)]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=[token for token in SPECIAL if token not in ("<pad>", "<s>", eos)],
        chat_template=template,
        padding_side="left",
    )
