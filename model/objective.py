"""What the loop asks of every training objective.

An objective is an `nn.Module` with the attribute `language_model` (what is trained and saved) and
- `ahead(table, batches)`: an iterator of the arguments of `forward` for each collated batch. It may work ahead: a
  teacher on another device computes the next batch while the student computes this one.
- `forward(input_ids, attention_mask, labels, ...) -> LossTerms`.
"""

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """Result of one micro-batch.

    loss_sum: scalar, the SUM over label tokens of what is minimised, in nats. The loop back-propagates sums and
        divides the gradients once by the label tokens of the whole optimizer step.
    token_count: label tokens in the micro-batch (an int: counted on the CPU, so that no device has to wait).
    parts: detached scalar sums over the same tokens, for the log, such as {"cross_entropy": ...}.
    """

    loss_sum: Tensor
    token_count: int
    parts: dict[str, Tensor]
