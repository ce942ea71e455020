"""One optimizer step, top to bottom: from `zero_grad` to `optimizer.step`.

Micro-batches back-propagate SUMS over label tokens; the step divides its gradients once, by the label tokens of all its
micro-batches on all processes. So it is the same step whatever the micro-batch size, the accumulation and the number of
processes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model.objective import Objective
from utils.training.distributed import DistributedContext, all_reduce_gradients

MAX_PARTS = 32  # room in the message between processes for the parts of a loss


@dataclass
class StepMetrics:
    """Results of one optimizer step, the same on every process but for `bad_micro_batches`.

    losses: the loss and its parts, means over the step's label tokens; the parts are complete on the main process.
    grad_norm: of the mean gradient, before clipping. stop_requested: on any process. bad_micro_batches: indices of this
    process's micro-batches whose loss is not finite. skipped: the weights were left as they are.
    """

    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    label_tokens: int
    stop_requested: bool = False
    bad_micro_batches: list[int] = field(default_factory=list)
    skipped: bool = False


def optimizer_step(
    objective: Objective,
    micro_batches: Iterable[tuple],
    optimizer: torch.optim.Optimizer,
    context: DistributedContext,
    *,
    label_tokens: int,
    learning_rate: float,
    clip_norm: float | None = None,
    loss_scale: float = 1.0,
    stop_requested: bool = False,
) -> StepMetrics:
    """Forward and backward passes, and one update of the weights.

    micro_batches: arguments of `objective`, of this process's share of the step; may be empty. label_tokens: of the
    whole step, on all processes. If the loss or the gradient is not finite, weights and optimizer stay as they are and
    the result says so (`skipped`).
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)

    losses, parts = [], {}
    for arguments in micro_batches:
        with context.autocast():
            terms = objective(*arguments)
        loss = terms.loss_sum * loss_scale
        loss.backward()
        losses.append(loss.detach())
        for name, value in terms.parts.items():
            parts[name] = parts.get(name, 0.0) + value

    # Sums over all processes. A process without micro-batches knows no parts: the main process, which logs them, has
    # some in every step, and all name theirs alike.
    all_reduce_gradients(parameters, context)
    names = sorted(parts)
    sums = torch.zeros(2 + MAX_PARTS, dtype=torch.float64, device=context.device)
    sums[0].fill_(float(stop_requested))
    if losses:
        sums[1 : 2 + len(names)] = torch.stack([sum(losses).double(), *(parts[name].double() for name in names)])
    context.all_reduce(sums)

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients, foreach=True) / label_tokens
    # The step's only wait for the device.
    stops, loss, *values, grad_norm = torch.cat([sums[: 2 + len(names)], norm.double().view(1)]).tolist()
    means = {"loss": loss, **dict(zip(names, values, strict=True))}
    metrics = StepMetrics(
        {name: value / label_tokens for name, value in means.items()}, grad_norm, learning_rate, label_tokens,
        stop_requested=stops > 0,
    )
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        metrics.skipped = True
        metrics.bad_micro_batches = [index for index, loss in enumerate(losses) if not loss.isfinite()]
        return metrics

    torch._foreach_div_(gradients, label_tokens)
    if clip_norm is not None:
        clip_grads_with_norm_(parameters, clip_norm, norm, foreach=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return metrics


def first_nonfinite(values: Iterable[tuple[str, object]]) -> str | None:
    """The name of the first tensor that is not finite, or None."""
    return next((name for name, value in values if isinstance(value, Tensor) and not value.isfinite().all()), None)
