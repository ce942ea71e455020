"""The shift by one between hidden states and the labels that they predict."""

from typing import NamedTuple

from torch import Tensor

IGNORED = -100  # label of a position that takes no loss


class LabelPositions(NamedTuple):
    """index [N] int64: hidden states, flattened to [B * T, D], that predict a label; targets [N] int64: the labels."""

    index: Tensor
    targets: Tensor


def label_positions(labels: Tensor) -> LabelPositions:
    """Which hidden states predict which label.

    labels [B, T] int64, -100 where no loss is taken. The hidden state at t predicts labels[:, t + 1], so labels[:, 0]
    is never predicted. Both results lie on the device of `labels`, in row order.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return LabelPositions(rows * labels.shape[1] + columns, labels[rows, columns + 1])
