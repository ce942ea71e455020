"""Whether an optimizer step over the longest training rows fits into memory: tried, with learning rate 0."""

import gc
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.batches import load_batches
from data.token_cache import TokenTable
from model.objective import ObjectiveError
from utils.batch_numbers import rows_of_step
from utils.config import FineTuneConfig
from utils.devices import Place
from utils.optimization import build_optimizer
from utils.random_state import seed_everything
from utils.run_folder import Start
from utils.run_log import RunLog
from utils.train_step import TrainingError, add_gradients, add_up, is_finite, update
from utils.training_run import Build


class Trial(NamedTuple):
    """What steps are tried with. order: all rows, the longest first. step_rows: rows of the user's optimizer step."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    table: TokenTable
    order: np.ndarray
    step_rows: int
    clip_norm: float | None
    place: Place


def make_trial(config: FineTuneConfig, build: Build, place: Place, log: RunLog) -> Trial:
    """The parts of a run that starts anew, none of which writes into the run folder."""
    seed_everything(config.trainer_kwargs.seed)
    parts = build(place, config, log, Start(""), keep=False)
    kwargs = config.optimizer_kwargs
    optimizer = build_optimizer(parts.objective, kwargs.type, kwargs.kwargs, kwargs.lm_lr, kwargs.decay_all)
    parameters = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]
    order = np.argsort(-parts.train_table.lengths, kind="stable")
    parts.objective.train()
    return Trial(parts.objective, optimizer, parameters, parts.train_table, order, rows_of_step(config),
                 config.trainer_kwargs.clip_norm, place)


def try_step(trial: Trial, rows: int) -> None:
    """The part of a step that takes most memory: two micro-batches of the `rows` longest rows, so that the gradients of
    one are there with all that the other needs; before it, a step of one row, so that the optimizer has its state.

    Where sequences are drawn, they are for as many rows as a step has.
    """
    if not trial.optimizer.state:
        take_step(trial, [trial.order[-1:]])
    longest, others = trial.order[:rows], trial.order[rows:]
    others = np.resize(others if len(others) else longest, max(0, trial.step_rows - 2 * rows))
    take_step(trial, [longest, longest, *(others[start : start + rows] for start in range(0, len(others), rows))])


def take_step(trial: Trial, batches: list[np.ndarray]) -> None:
    """Over the first two of a step's micro-batches; the weights stay."""
    pad_id = trial.objective.language_model.tokenizer.pad_token_id
    trial.optimizer.zero_grad(set_to_none=True)
    try:
        steps = trial.objective.ahead(trial.table, load_batches(trial.table, batches, pad_id), [len(batches)])
        _, sums = add_gradients(trial.objective, islice(next(steps), 2), trial.place)
    except ObjectiveError as error:
        raise TrainingError(str(error)) from error
    tokens = int(trial.table.label_counts[np.concatenate(batches[:2])].sum())
    result = add_up(trial.parameters, sums, tokens, 0.0, trial.place)
    if not is_finite(result):  # what a step needs does not depend on it, and the weights are needed for the next
        torch._foreach_zero_([each.grad for each in trial.parameters if each.grad is not None])
        result.grad_norm = 0.0
    update(trial.optimizer, trial.parameters, result, trial.clip_norm)


def free(trial: Trial) -> None:
    """Give back what a step that failed has left."""
    trial.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if trial.place.device.type == "cuda":
        torch.cuda.empty_cache()


def peak_on_gpu(device: torch.device, work: Callable[[], None]) -> int:
    """Bytes that the work, and what was there before it, took of a GPU at most."""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)
