"""What every training objective returns to the loop."""

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
