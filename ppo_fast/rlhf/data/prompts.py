"""Rows of JSONL, Parquet and saved datasets; prompts, tokenized once, shuffled every epoch, in left-padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast.rlhf.config.ppo import DataConfig
from ppo_fast.rlhf.data.packing import Array
from ppo_fast.rlhf.data.rows import RESERVED, Columns, Prompt, Row, deduplicate, drop_too_long, read_rows, source_name
from ppo_fast.rlhf.data.templates import is_messages, tokenize_prompt
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.world import by_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Every usable prompt of the data set; lists of the same length M."""

    prompts: list[Prompt]  # [M] as given: text, or a list of role/content messages
    token_ids: list[list[int]]  # [M] lists of ints, 1 to max_prompt_tokens each
    columns: Columns  # each [M]: the other keys of the rows, for the reward function
    dropped: int  # prompts left out: too long, or repeated with `deduplicate`


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one rollout, left-padded to the longest."""

    input_ids: Tensor  # [B, P] int64
    attention_mask: Tensor  # [B, P] bool, True: a token of the prompt
    prompts: list[Prompt]  # [B] as given in the data
    columns: Columns  # each [B]
    groups: Array | None = None  # [B] int64, rising: responses of one number answer one draw of a prompt


@by_all_ranks
def load_prompts(
    source: str | Path | Iterable[object],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    setting: str = "data.prompts",
) -> Prompts:
    """Read prompts from a file (see `read_rows`) or from memory (texts, or rows with a "prompt" key); tokenize them.

    Raises UserError naming file and line for a row that is no prompt; warns about prompts that are left out.
    """
    rows = [
        (where, _prompt_row(row, where)) for where, row in read_rows(source, setting, config.columns, config.subset)
    ]
    names = sorted({name for _, row in rows for name in row} - {"prompt"})
    tokenized = [(row, tokenize_prompt(row["prompt"], tokenizer, where, row)) for where, row in rows]
    limit, name = config.max_prompt_tokens, source_name(source, setting)
    kept = drop_too_long(tokenized, "prompt", "data.max_prompt_tokens", limit, lambda item: len(item[1]), name)
    if config.deduplicate:
        kept = deduplicate(kept, "prompt", lambda item: tuple(item[1]))
    return Prompts(
        prompts=[row["prompt"] for row, _ in kept],
        token_ids=[ids for _, ids in kept],
        columns={name: [row.get(name) for row, _ in kept] for name in names},
        dropped=len(rows) - len(kept),
    )


class PromptSampler:
    """Endless batches of row numbers; every prompt once per epoch, a new order in each.

    `arrange` reorders the rows of an epoch. `order` and `position` are the whole state except the generator.
    """

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        shuffle: bool = True,
        arrange: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.size, self.generator, self.shuffle, self.arrange = size, generator, shuffle, arrange
        self.order: list[int] = []
        self.position = 0

    def state_dict(self) -> dict[str, object]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers; a batch may straddle two epochs."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        if self.position == len(self.order):
            device = self.generator.device
            permutation = torch.randperm(self.size, generator=self.generator, dtype=torch.int64, device=device)
            self.order = self.arrange(permutation.tolist() if self.shuffle else list(range(self.size)))
            self.position = 0
        self.position += 1
        return self.order[self.position - 1]


def make_batch(prompts: Prompts, rows: list[int], pad_id: int, device: torch.device) -> PromptBatch:
    """Left-pad the prompts at `rows` to the longest of them."""
    ids = [prompts.token_ids[row] for row in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in ids], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64, device=device)
    return PromptBatch(
        input_ids=padded,
        attention_mask=torch.arange(width, dtype=torch.int64, device=device) >= width - lengths[:, None],
        prompts=[prompts.prompts[row] for row in rows],
        columns={name: [column[row] for row in rows] for name, column in prompts.columns.items()},
    )


def _prompt_row(item: str | Row, where: str) -> Row:
    row = {"prompt": item} if isinstance(item, str) else item
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    if not (isinstance(prompt, str) or is_messages(prompt)):
        raise UserError(f'{where}: expected {{"prompt": text or role/content messages}}, got {row!r}')
    for name in RESERVED:
        if name in row:
            raise UserError(f"{where}: the column name {name!r} is taken by the reward function's own argument")
    return row
