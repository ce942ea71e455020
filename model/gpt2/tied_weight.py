"""A weight that is both embedding and head: its two gradients are added in place."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def tied(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight twice: for `F.embedding` with sparse=True, and for the head.

    Autograd would add the two gradients into a third tensor of that size. Nobody else may hold the head's gradient, as
    is the case for that of a product or a chunked loss: the embedding's rows are added to it.
    """
    return Tied.apply(weight)


class Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor):
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_embedding: Tensor | None, grad_head: Tensor | None):
        if grad_embedding is None or grad_head is None:
            return grad_head if grad_embedding is None else grad_embedding
        return grad_head.add_(grad_embedding)
