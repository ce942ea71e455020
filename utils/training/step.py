"""One optimizer step over micro-batches: gradients added up, looked at, divided once, applied.

Shared by training and `--find_batch_size`.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.training.distributed import DistributedContext
from utils.training.gradients import gradient_norm, normalize_and_clip, sum_gradients
from utils.training.step_result import StepMetrics, means_of_all


class TrainingError(RuntimeError):
    """Training cannot go on: one line for the user."""

    exit_code = 1


def accumulate_gradients(
    objective: nn.Module, arguments: Iterable[tuple], context: DistributedContext, scale: float = 1.0
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Forward and backward passes of this process's micro-batches, one after the other.

    scale: of the loss. Returns the loss of each micro-batch, and the sums of the loss and its parts, detached scalars.
    """
    sums: dict[str, Tensor] = {}
    losses = []
    for each in arguments:
        with context.autocast():
            terms = objective(*each)
        loss = terms.loss_sum if scale == 1.0 else terms.loss_sum * scale
        loss.backward()
        losses.append(loss.detach())
        for name, value in {"loss": loss.detach(), **terms.parts}.items():
            sums[name] = sums[name] + value if name in sums else value
    return losses, sums


def add_up(
    parameters: list[nn.Parameter], sums: dict[str, Tensor], tokens: int, learning_rate: float,
    context: DistributedContext,
) -> StepMetrics:
    """Gradients and sums of all processes together; the same result on each of them.

    tokens: label tokens of the step on all processes. The gradients are not divided yet.
    """
    sum_gradients(parameters, context)
    means, norm = means_of_all(sums, gradient_norm(parameters), tokens, context)
    return StepMetrics(means, norm, learning_rate, tokens)


def is_finite(result: StepMetrics) -> bool:
    """Whether the step may be taken: loss, gradient and learning rate are numbers that float32 can hold."""
    numbers = result.losses["loss"], result.grad_norm
    return is_finite_rate(result.learning_rate) and all(map(math.isfinite, numbers))


def is_finite_rate(learning_rate: float) -> bool:
    """Whether float32, the type of the weights, can hold it."""
    return abs(learning_rate) <= torch.finfo(torch.float32).max


def update(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], result: StepMetrics, clip_norm: float | None
) -> None:
    """Divide, clip, and change the weights."""
    normalize_and_clip(parameters, result.label_tokens, result.grad_norm, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = result.learning_rate
    optimizer.step()
