"""What is done where a loss, a gradient, a weight or a learning rate is not finite: the rows to blame are found, the
step is left out or the run stopped, and nothing of it is ever saved."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.batches import Step, load_batches
from data.tokenized import TokenizedDataset
from utils.evaluation.evaluate import NotFinite, apart
from utils.runs.run_log import RunLog
from utils.training.distributed import DistributedContext
from utils.training.optimization import find_nonfinite_state
from utils.training.state import TrainState
from utils.training.step import TrainingError, is_finite_rate
from utils.training.step_result import StepMetrics

SHOWN = 8  # rows in a message
KEY = "trainer_kwargs.skip_nonfinite_steps"
NONE_YET = "no checkpoint was written yet"


class BadRows(NamedTuple):
    """rows: of a table, by number. cause: what of their arguments, or which weight, is not finite, in words, or None.
    of_weights: whether it is a weight, so that every other step would be alike."""

    rows: list[int]
    cause: str | None
    of_weights: bool

    def told(self, table: TokenizedDataset) -> str:
        """`rows: id (row 3), ...`, with the cause behind."""
        more = f" and {len(self.rows) - SHOWN} more" if len(self.rows) > SHOWN else ""
        cause = f"; {self.cause}" if self.cause else ""
        return f"rows: {', '.join(table.names(self.rows[:SHOWN]))}{more}{cause}"


class NonFiniteHandler:
    """Watches over the steps of a training. All processes of a group ask it alike, and it answers them alike.

    most: steps in a run that may be left out. has_checkpoint: whether there is one to go on from.
    """

    def __init__(
        self, objective: nn.Module, pad_id: int, context: DistributedContext, log: RunLog, most: int,
        has_checkpoint: Callable[[], bool],
    ):
        self.objective, self.pad_id, self.context, self.log, self.most = objective, pad_id, context, log, most
        self.has_checkpoint = has_checkpoint

    def skip_step(self, state: TrainState, result: StepMetrics, table: TokenizedDataset, step: Step, bad: Step) -> None:
        """Count and tell a step that is left out; weights and optimizer stay as they are.

        step: its micro-batches; bad: those of this process whose loss is not finite.

        Raises:
            TrainingError: no (further) step may be left out, or it would help nothing.
        """
        number, found = state.step + 1, self.blame(table, chain(*bad), chain(*step))
        what = f"the loss is {result.losses['loss']} and the gradient norm {result.grad_norm}"
        if not is_finite_rate(result.learning_rate):
            what, remedy = f"the learning rate is {result.learning_rate}", "lower optimizer_kwargs.lm_lr"
        elif found.of_weights:
            remedy = "start anew, with a lower optimizer_kwargs.lm_lr"
            remedy += ", or resume from an earlier checkpoint" if self.has_checkpoint() else ""
        elif state.skipped_steps < self.most:
            state.skipped_steps += 1
            result.skipped = True
            self.log.record("skipped_step", number, epoch=state.epoch, skipped_steps=state.skipped_steps)
            self.log.info(f"optimizer step {number} is left out, {state.skipped_steps} of at most {self.most} ({KEY}): "
                         f"{what}; {found.told(table)}")
            return
        else:
            remedy = ("look at these rows, lower optimizer_kwargs.lm_lr, set trainer_kwargs.precision to float32, or "
                      f"{'raise' if self.most else 'set'} {KEY} to leave such steps out")
        before = f"{state.skipped_steps} steps were left out before ({KEY} is {self.most}); " if self.most else ""
        kept = "the last checkpoint is good" if self.has_checkpoint() else NONE_YET
        raise TrainingError(f"optimizer step {number}: {what}; stopped before the weights were changed; "
                            f"{found.told(table)}; {before}{kept}: {remedy}")

    def refuse(self, error: NotFinite, step: int) -> None:
        """Raises TrainingError for a loss that was measured. Nothing is saved: it would push out good checkpoints."""
        found = self.blame(error.table, error.rows, ())
        raise TrainingError(
            f"the {error.name} after optimizer step {step} is {error.loss}; stopped, {left(self.has_checkpoint())}; "
            f"{found.told(error.table)}: look at these rows, or lower optimizer_kwargs.lm_lr"
        ) from error

    def blame(self, table: TokenizedDataset, bad: Iterable[int], otherwise: Iterable[int]) -> BadRows:
        """The same on every process. Nothing of the training is changed.

        bad: this process's rows whose loss, of all of them or of a batch together, is not finite. They are computed
        alone, once more, without dropout; those with such a loss are named, or all of `bad` where none has.
        otherwise: the rows to name where no process has any (the gradient alone is not finite).
        """
        together, of_weights = [int(row) for row in bad], nonfinite_weights(self.objective)
        alone, of_rows = nonfinite_rows(self.objective, table, together, self.context, self.pad_id)
        of_all = self.context.all_gather_object((alone, together, of_weights, of_rows))
        *rows, weights, arguments = zip(*of_all, strict=True)
        alone, together = (list(chain(*each)) for each in rows)
        of_weights, of_rows = (next(filter(None, each), None) for each in (weights, arguments))
        named = alone or together or [int(row) for row in otherwise]
        return BadRows(named, of_weights or of_rows, of_weights is not None)


def left(has_checkpoint: bool) -> str:
    """What there is to go on from, for messages."""
    return "the checkpoints are those of before" if has_checkpoint else NONE_YET


def check_before_saving(
    module: nn.Module, optimizer: torch.optim.Optimizer, step: int, has_checkpoint: bool
) -> None:
    """Raises TrainingError where the weights or the optimizer's state are not finite: good checkpoints stay."""
    start, end = f"after optimizer step {step} the", f"not finite: not saved, {left(has_checkpoint)};"
    if nonfinite_weights(module):
        raise TrainingError(f"{start} weights are {end} lower optimizer_kwargs.lm_lr, or look at "
                            "optimizer_kwargs.kwargs")
    if name := find_nonfinite_state(optimizer):
        remedy = ("resume from one of them, with a lower optimizer_kwargs.lm_lr if it happens again" if has_checkpoint
                  else "start anew, with a lower optimizer_kwargs.lm_lr")
        raise TrainingError(f"{start} optimizer's {name} is {end} {remedy}")


def nonfinite_weights(module: nn.Module) -> str | None:
    """The first weight that is not finite, in words, or None."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights themselves are not finite, such as {name.removeprefix('language_model.model.')}"
    return None


def nonfinite_rows(
    objective: nn.Module, table: TokenizedDataset, rows: list[int], context: DistributedContext, pad_id: int
) -> tuple[list[int], str | None]:
    """(those of `rows` whose loss alone is not finite, what of their arguments is not); nothing is drawn for it."""
    found, cause = [], None
    with apart(objective):
        for row, arguments in one_by_one(objective, table, rows, pad_id):
            with context.autocast():
                loss = float(objective(*arguments).loss_sum)
            if not math.isfinite(loss):
                found.append(row)
                cause = cause or objective.find_nonfinite(*arguments)
    return found, None if cause is None else f"{cause} are not finite"


def one_by_one(
    objective: nn.Module, table: TokenizedDataset, rows: list[int], pad_id: int
) -> Iterator[tuple[int, tuple]]:
    """(row, arguments of the objective) of each row as a batch of its own."""
    batches = [np.array([row]) for row in rows]
    steps = objective.iter_steps(table, load_batches(table, batches, pad_id), [1] * len(batches))
    return zip(rows, chain.from_iterable(steps), strict=True)
