"""A weight that is the embedding and the head: its two gradients added in place."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def tied(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight twice: for `F.embedding` with sparse=True, and for the head.

    Autograd would add the two gradients into a third tensor of that size. The head's must be one that nobody else
    holds, such as a product's or a chunked loss's: the embedding's rows are added to it.
    """
    return Tied.apply(weight)


class Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor):
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_lookup: Tensor | None, of_head: Tensor | None):
        if of_lookup is None or of_head is None:
            return of_head if of_lookup is None else of_lookup
        return of_head.add_(of_lookup)
