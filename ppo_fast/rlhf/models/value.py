"""Value model: a backbone with a scalar head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.models.forward import filter_kwargs, head_values


class ValueModel(nn.Module):
    """A transformer backbone with a scalar head: values [B, L] float32 from token ids [B, L]."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel) -> ValueModel:
        """The scores of a model for sequence classification with one output, at every token."""
        return cls(classifier.base_model, classifier.score)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "position_ids": positions}
        output = self.backbone(**filter_kwargs(self.backbone, inputs), use_cache=False)
        return head_values(self.head, output.last_hidden_state)


def new_head(config: ModelConfig, width: int, generator: torch.Generator) -> nn.Linear:
    """N(0, 1/sqrt(D+1)) or zero, float32; its bias is zero."""
    head = nn.Linear(width, 1, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        if config.value_head == "normal":
            shape, device = head.weight.shape, generator.device
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
            head.weight.copy_(noise / (width + 1) ** 0.5)
        else:
            head.weight.zero_()
        head.bias.zero_()
    return head


def head_like(scores: nn.Linear, stats: tuple[float, float]) -> nn.Linear:
    """(score - mean) / std, float32."""
    head, (mean, std) = nn.Linear(scores.in_features, 1, dtype=torch.float32, device=scores.weight.device), stats
    with torch.no_grad():
        head.weight.copy_(scores.weight).div_(std)
        head.bias.zero_()
        if scores.bias is not None:
            head.bias.copy_(scores.bias)
        head.bias.sub_(mean).div_(std)
    return head


def sequence_scores(model: ValueModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores [B] of a reward model at the last counted token of rows [B, L], padded on either side."""
    scores = model(input_ids, attention_mask)
    position = torch.arange(attention_mask.shape[1], dtype=torch.int64, device=attention_mask.device)
    last = torch.where(attention_mask, position, 0).argmax(dim=1, keepdim=True)
    return scores.gather(1, last).squeeze(1)
