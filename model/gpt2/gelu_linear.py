"""GPT-2's activation and the product after it, storing only its input for the backward pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.losses.output_head import autocast_type


def gelu_linear(inner: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(inner) @ weight + bias, [P, D], with the tanh form of gelu (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    inner [P, F]; weight [F, D]; bias [D]. gelu(inner), one of the two largest tensors of a block, is recomputed in the
    backward pass. Under autocast the product is in its type.
    """
    return GeluLinear.apply(inner, weight, bias, autocast_type(inner))


class GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inner: Tensor, weight: Tensor, bias: Tensor, product_type: torch.dtype):
        ctx.save_for_backward(inner, weight)
        ctx.product_type, ctx.types = product_type, (weight.dtype, bias.dtype)
        with torch.autocast(inner.device.type, enabled=False):
            active = F.gelu(inner, approximate="tanh").to(product_type)
            return torch.addmm(bias.to(product_type), active, weight.to(product_type))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inner, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[1]:
            active = F.gelu(inner, approximate="tanh").to(ctx.product_type)
            grads[1] = (active.T @ grad).to(ctx.types[0])
            del active
        if ctx.needs_input_grad[2]:
            grads[2] = grad.sum(0).to(ctx.types[1])
        if ctx.needs_input_grad[0]:
            grad_active = (grad @ weight.to(ctx.product_type).T).to(inner.dtype)
            grads[0] = torch.ops.aten.gelu_backward(grad_active, inner, approximate="tanh")
        return tuple(grads)
