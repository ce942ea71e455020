"""Gradients of one optimizer step: summed over micro-batches and processes, divided once, clipped once."""

import torch
from torch import Tensor, nn

from utils.training.distributed import DistributedContext

BUCKET = 1 << 24  # gradient values sent together between processes: 64 MiB


def sum_gradients(parameters: list[nn.Parameter], context: DistributedContext) -> None:
    """Adds up the gradients of all processes, in place, in a few big messages."""
    if context.world_size == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:  # this process had no micro-batch in the step
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= BUCKET:
            sum_bucket(bucket, context)
            bucket, size = [], 0
    sum_bucket(bucket, context)


def sum_bucket(gradients: list[Tensor], context: DistributedContext) -> None:
    if not gradients:
        return
    flat = context.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients: a scalar on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def normalize_and_clip(parameters: list[nn.Parameter], tokens: int, norm: float, clip_norm: float | None) -> None:
    """Divide summed gradients by the step's label tokens, and shorten them to `clip_norm` where they are longer.

    norm: their length after the division. One multiplication does both.
    """
    factor = 1.0 / tokens
    if clip_norm is not None and norm > clip_norm:
        factor *= clip_norm / norm
    torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)
