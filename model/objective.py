"""What the loop asks of every training objective.

An objective is an `nn.Module` with the attributes `language_model` (what is trained and saved) and `passes` (optimizer
steps in a row that take the same rows; 1 as a rule), and
- `ahead(table, batches, counts)`: for each optimizer step, which has `counts` of the collated batches, an iterator of
  the arguments of `forward`. It may work ahead: a teacher on another device computes the next batch while the student
  computes this one. It may raise `ObjectiveError`.
- `forward(input_ids, attention_mask, labels, ...) -> LossTerms`.
- `find_nonfinite(...)`, with the arguments of `forward`: what of them is not finite, in words for a message ("the
  teacher's outputs"), or None.
- `get_extra_state()`: what a checkpoint must hold of it beside the weights, as tensors, numbers, text, lists and dicts,
  and `set_extra_state(state)`.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor


class ObjectiveError(RuntimeError):
    """Training cannot go on, and no step should be taken: one line for the user."""


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


def by_step(arguments: Iterator, counts: list[int]) -> Iterator[Iterator]:
    """Arguments of `forward`, one after the other, as an iterator for each optimizer step."""
    for count in counts:
        yield islice(arguments, count)


def arguments_of(batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels [B, T] of a collated batch."""
    return batch["input_ids"], batch["attention_mask"], batch["labels"]
