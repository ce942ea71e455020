"""What one optimizer step gave, for the log."""

from dataclasses import dataclass

import torch

from utils.devices import Place


@dataclass
class StepResult:
    """Means over the label tokens of one optimizer step."""

    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    label_tokens: int


def mean_losses(sums: dict[str, torch.Tensor], tokens: int, place: Place) -> dict[str, float]:
    """Sums over this process's micro-batches as means over the step's label tokens on all processes.

    One wait for the device a step. A process without micro-batches has no sums.
    """
    values = torch.stack([value.float() for value in sums.values()]).tolist() if sums else []
    totals: dict[str, float] = {}
    for of_process in place.gather(dict(zip(sums, values, strict=True))):
        for name, value in of_process.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: value / tokens for name, value in totals.items()}
