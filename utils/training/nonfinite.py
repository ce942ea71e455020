"""Losses, gradients and weights that are NaN or infinite: skip the step or stop, and save nothing of it."""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import nn

from data.batches import Step
from data.tokenized import TokenizedDataset
from utils.errors import TrainingError
from utils.training.distributed import DistributedContext
from utils.training.optimization import find_nonfinite_state
from utils.training.state import TrainState
from utils.training.step import StepMetrics, first_nonfinite

SHOWN = 8  # rows in a message
KEY = "trainer_kwargs.skip_nonfinite_steps"


class NotFinite(Exception):
    """A measured loss is NaN or infinite. rows: of `table`, in this process's batches with such a loss."""

    def __init__(self, name: str, loss: float, table: TokenizedDataset, rows: list[int]):
        super().__init__(f"the {name} is {loss}")
        self.name, self.loss, self.table, self.rows = name, loss, table, rows


class NonFiniteHandler:
    """Skips steps that are not finite, or stops the training. Every process of a group must call it alike.

    max_skipped: steps of a run that may be skipped. has_checkpoint: whether there is one to resume from.
    """

    def __init__(
        self, objective: nn.Module, table: TokenizedDataset, context: DistributedContext, log, max_skipped: int,
        has_checkpoint: Callable[[], bool],
    ):
        self.objective, self.table, self.context, self.log = objective, table, context, log
        self.max_skipped, self.has_checkpoint = max_skipped, has_checkpoint

    def skip_step(self, state: TrainState, metrics: StepMetrics, step: Step, bad: Step) -> None:
        """Count and log a step whose weights were left as they are.

        step: its micro-batches; bad: those of this process whose loss is not finite.

        Raises:
            TrainingError: no further step may be skipped, or skipping would not help.
        """
        number, what = state.step + 1, f"loss {metrics.losses['loss']}, gradient norm {metrics.grad_norm}"
        bad_rows = list(chain(*self.context.all_gather_object([int(row) for row in chain(*bad)])))
        rows = self.describe_rows(bad_rows or chain(*step), self.table)
        if name := first_nonfinite(self.objective.named_parameters()):
            name = name.removeprefix("language_model.model.")
            what, remedy = f"{what}, weights {name} not finite", "start again with a lower optimizer_kwargs.lm_lr"
        elif state.skipped_steps < self.max_skipped:
            state.skipped_steps += 1
            self.log.record("skipped_step", number, epoch=state.epoch, skipped_steps=state.skipped_steps)
            self.log.info(f"skipped optimizer step {number} ({state.skipped_steps} of at most {self.max_skipped}, "
                          f"{KEY}): {what}; {rows}")
            return
        else:
            remedy = ("look at these rows, lower optimizer_kwargs.lm_lr, set trainer_kwargs.precision to float32, or "
                      f"{'raise' if self.max_skipped else 'set'} {KEY} to skip such steps")
        skipped = f"{state.skipped_steps} steps were skipped before ({KEY} {self.max_skipped}); " \
            if self.max_skipped else ""
        raise TrainingError(f"optimizer step {number}: {what}; stopped before the weights were changed; {rows}; "
                            f"{skipped}{self.what_is_saved()}: {remedy}")

    def stop(self, error: NotFinite, step: int) -> None:
        """Raises TrainingError for an evaluation loss. Nothing is saved: it would push out good checkpoints."""
        rows = list(chain(*self.context.all_gather_object(error.rows)))
        raise TrainingError(
            f"the {error.name} after optimizer step {step} is {error.loss}; {self.describe_rows(rows, error.table)}; "
            f"{self.what_is_saved()}: look at these rows, or lower optimizer_kwargs.lm_lr"
        ) from error

    def check_before_saving(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Raises TrainingError if weights or optimizer state are not finite: good checkpoints stay."""
        state = find_nonfinite_state(optimizer)
        if state or first_nonfinite(self.objective.named_parameters()):
            what = f"optimizer's {state} is" if state else "weights are"
            raise TrainingError(f"after optimizer step {step} the {what} not finite: not saved; "
                                f"{self.what_is_saved()}: lower optimizer_kwargs.lm_lr")

    def what_is_saved(self) -> str:
        return "the last checkpoint is good" if self.has_checkpoint() else "no checkpoint was written yet"

    @staticmethod
    def describe_rows(rows: Iterable[int], table: TokenizedDataset) -> str:
        rows = [int(row) for row in rows]
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        return f"rows: {', '.join(table.names(rows[:SHOWN]))}{more}"
