"""Messages and texts as token ids, through the chat template of a tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from ppo_fast.rlhf.data.rows import Messages, Prompt, Row
from ppo_fast.rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, given to the chat template as TRL does


def is_messages(value: object) -> TypeGuard[Messages]:
    """Whether it is a list of role/content messages."""
    return bool(value) and isinstance(value, list) and all(_is_message(message) for message in value)


def as_text(prompt: Prompt) -> str:
    """A prompt as people read it: messages become one "role: content" line each, with the calls of tools as JSON."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_message_text(message)}" for message in prompt)


def tokenize_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, where: str, columns: Row | None = None
) -> list[int]:
    """Token ids of a text, or of messages through the chat template up to where the answer begins or goes on."""
    if isinstance(prompt, str):
        ids = encode(prompt, tokenizer)
    else:
        ids = encode_bare(render_prompt(prompt, tokenizer, where, columns), tokenizer)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the beginning of a sequence: with the tokenizer's BOS once, without the EOS that it appends."""
    bare, ids = encode_bare(text, tokenizer), list(tokenizer(text)["input_ids"])
    appended = len(ids) > len(bare) and ids[-1 - len(bare) :] == [*bare, tokenizer.eos_token_id]
    ids = ids[:-1] if appended else ids
    doubled = len(ids) > len(bare) and bare[:1] == ids[:1] == [tokenizer.bos_token_id]
    return ids[1:] if doubled else ids


def encode_bare(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, and nothing that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_prompt(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, columns: Row | None = None
) -> str:
    """`render` up to where the answer begins; an answer that the assistant has begun is left open."""
    last = messages[-1]
    if last["role"] != "assistant":
        return render(messages, tokenizer, where, columns, add_generation_prompt=True)
    if last.get("tool_calls"):
        raise UserError(f"{where}: expected messages that end before the answer or within it, got a call of tools")
    return render(messages, tokenizer, where, columns, continue_final_message=True)


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, columns: Row | None = None, **options: object
) -> str:
    """The text that the chat template makes of messages.

    It is given the row's columns "tools" (JSON schemas, or their JSON text) and "chat_template_kwargs", as TRL does,
    and no key whose value is None, since Arrow adds such keys.

    Raises:
        UserError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompt is a list of messages, but the tokenizer has no chat template")
    tools, further = _template_columns(columns or {}, where)
    try:
        # A call of tools without content has an empty one: many templates add it to other text.
        given = [{"content": ""} | message for message in _without_none(messages)]
        options = _without_none(further) | options | {"tools": _without_none(tools) or None, "tokenize": False}
        text: str = tokenizer.apply_chat_template(given, **options)
    except Exception as error:  # a template is a program
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{where}: the chat template refuses the messages: {reason}") from error
    for content in (message["content"] for message in given):
        if isinstance(content, list) and str(content) in text:
            raise UserError(f"{where}: the chat template refuses the messages: it takes no list of parts as content")
    return text


def _template_columns(columns: Row, where: str) -> tuple[Sequence[Row], Row]:
    """The tools and the further arguments of the chat template."""
    tools, further = ([] if columns.get(name) is None else columns[name] for name in TEMPLATE_COLUMNS)
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: expected tools to be a list of JSON schemas or its JSON text, got {tools!r}")
    if not isinstance(further or {}, Mapping):
        raise UserError(f"{where}: expected chat_template_kwargs to be a JSON object, got {further!r}")
    return tools, further or {}


def _is_message(value: object) -> bool:
    """Whether it has a role, and a text, a list of texts or calls of tools as its content."""
    if not (isinstance(value, Mapping) and isinstance(value.get("role"), str)):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return bool(content) and all(_is_text_part(part) for part in content)
    return bool(value.get("tool_calls")) if content is None else isinstance(content, str)


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _message_text(message: Row) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    return f"{text} {json.dumps(_without_none(calls))}".lstrip() if calls else text


def _without_none(value: Any) -> Any:
    """`value` without the keys of nested mappings whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
