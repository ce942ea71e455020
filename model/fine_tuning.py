"""The fine-tuning objective: cross-entropy on the highlights and the end-of-text that closes them."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from model.language_model import LanguageModel
from model.losses.vocabulary_loss import vocabulary_loss
from model.objective import LossTerms, arguments_of, by_step


class FineTuning(nn.Module):
    """Maximum likelihood of the label tokens: loss_sum = -sum over label tokens of log q(token | what is before it).

    Only hidden states that predict a label go through the output head, `chunk_size` at a time, so no [B, T, V] tensor
    is made.
    """

    passes = 1

    def __init__(self, language_model: LanguageModel, chunk_size: int = 128):
        super().__init__()
        self.language_model, self.chunk_size = language_model, chunk_size

    def iter_steps(self, table, batches: Iterable[dict], counts: list[int]) -> Iterator[Iterator[tuple]]:
        """The arguments of `forward` for each collated batch of a table's rows, step by step."""
        return by_step(map(arguments_of, batches), counts)

    def get_extra_state(self) -> dict:
        return {}

    def set_extra_state(self, state: dict) -> None:
        """Nothing to restore."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> LossTerms:
        """input_ids [B, T] int64; attention_mask [B, T]; labels [B, T] int64, -100 = no loss; on the CPU or not.

        On the CPU nothing here waits for the device. A batch without any label gives exactly 0 with zero gradients.
        """
        head, embedding_weight = self.language_model.tied_head()
        hidden, targets = self.language_model.label_hidden(input_ids, attention_mask, labels, embedding_weight)
        loss = vocabulary_loss(hidden, head, targets, chunk_size=self.chunk_size)
        return LossTerms(loss.loss_sum, len(targets), {"cross_entropy": loss.cross_entropy})
