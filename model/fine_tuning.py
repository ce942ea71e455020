"""The fine-tuning objective: cross-entropy on the highlights and the end-of-text that closes them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.language_model import LanguageModel, label_positions
from model.objective import LossTerms


class FineTuning(nn.Module):
    """Maximum likelihood of the label tokens: loss_sum = -sum over label tokens of log q(token | what is before it).

    Only hidden states that predict a label go through the output head, so no [B, T, V] tensor is made.
    """

    def __init__(self, language_model: LanguageModel):
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> LossTerms:
        """input_ids [B, T] int64 on the model's device; attention_mask [B, T]; labels [B, T] int64, -100 = no loss.

        Mask and labels may stay on the CPU: then nothing here waits for the device. A batch without any label
        gives exactly 0 with zero gradients.
        """
        hidden = self.language_model.hidden_states(input_ids, attention_mask)
        positions = label_positions(labels)
        index = positions.index.to(hidden.device, non_blocking=True)
        targets = positions.targets.to(hidden.device, non_blocking=True)
        logits = self.language_model.lm_head(hidden.flatten(0, 1)[index])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # never a reduction in half precision
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        return LossTerms(loss_sum, len(positions.targets), {"cross_entropy": loss_sum.detach()})
