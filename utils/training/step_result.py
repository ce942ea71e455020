"""What one optimizer step gave, for the log."""

from dataclasses import dataclass

import torch

from utils.training.distributed import DistributedContext


@dataclass
class StepMetrics:
    """Means over the label tokens of one optimizer step, on all processes. skipped: its update was left out."""

    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    label_tokens: int
    skipped: bool = False


def means_of_all(
    sums: dict[str, torch.Tensor], norm: torch.Tensor, tokens: int, context: DistributedContext
) -> tuple[dict[str, float], float]:
    """(sums over this process's micro-batches as means over the step's label tokens on all processes, the same of the
    gradient's norm), equal on every process.

    norm: of the gradients that are added up over processes. One wait for the device a step. A process without
    micro-batches has no sums.
    """
    *values, norm_here = torch.stack([value.float() for value in (*sums.values(), norm)]).tolist()
    totals: dict[str, float] = {}
    of_processes = context.all_gather_object((dict(zip(sums, values, strict=True)), norm_here))
    for of_process, _ in of_processes:
        for name, value in of_process.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: value / tokens for name, value in totals.items()}, of_processes[0][1] / tokens
