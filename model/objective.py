"""What the training loop asks of every objective."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from torch import Tensor


class ObjectiveError(RuntimeError):
    """Training cannot continue, and no step should be taken: one line for the user."""


class LossTerms(NamedTuple):
    """Result of one micro-batch.

    loss_sum: scalar, the SUM over label tokens of what is minimised, in nats. The loop back-propagates sums and
        divides the gradients once by the label tokens of the whole optimizer step.
    token_count: label tokens in the micro-batch (an int: counted on the CPU, so that no device has to wait).
    parts: detached scalar sums over the same tokens, for the log, such as {"cross_entropy": ...}; the same names for
        all micro-batches of a step.
    """

    loss_sum: Tensor
    token_count: int
    parts: dict[str, Tensor]


class Objective(Protocol):
    """An `nn.Module` that the training loop can train.

    language_model: the `LanguageModel` that is trained and saved. passes: optimizer steps in a row that take the same
    rows (1 unless rollouts are used several times).
    """

    language_model: object
    passes: int

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *others) -> LossTerms:
        """The loss of one micro-batch: input_ids, labels [B, T] int64 (labels -100: no loss), attention_mask [B, T]."""

    def iter_steps(self, table, batches: Iterable[dict], counts: list[int]) -> Iterator[Iterable[tuple]]:
        """For each optimizer step, which has `counts` of the collated batches of the table's rows, the arguments of its
        calls. May prefetch: a teacher on another device computes the next batch while the student computes this one.

        Raises:
            ObjectiveError: training cannot continue.
        """

    def get_extra_state(self) -> dict:
        """What a checkpoint must hold beside the weights: tensors, numbers, text, lists and dicts."""

    def set_extra_state(self, state: dict) -> None:
        """Restore what `get_extra_state` gave."""


def by_step(arguments: Iterator, counts: list[int]) -> Iterator[Iterator]:
    """Groups the arguments of calls, one after the other, by optimizer step."""
    for count in counts:
        yield islice(arguments, count)


def arguments_of(batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels [B, T] of a collated batch."""
    return batch["input_ids"], batch["attention_mask"], batch["labels"]
