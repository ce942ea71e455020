"""GPT-2's activation and the product after it: model/gpt2/gelu_linear.py."""

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import NewGELUActivation

from model.gpt2.gelu_linear import gelu_linear


def inputs(dtype):
    torch.manual_seed(0)
    shapes = (7, 12), (12, 5), (5,)
    return [torch.randn(*shape, dtype=dtype).mul_(3).requires_grad_() for shape in shapes]


def test_equal_to_the_formula():
    """Fault: the activation that is computed again is not the one of the forward pass."""
    inner, weight, bias = inputs(torch.float64)
    expected = NewGELUActivation()(inner) @ weight + bias
    found = gelu_linear(inner, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    scale = torch.randn_like(expected)
    for left, right in zip(torch.autograd.grad((found * scale).sum(), (inner, weight, bias)),
                           torch.autograd.grad((expected * scale).sum(), (inner, weight, bias)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(gelu_linear, (inner, weight, bias))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)])
def test_frozen_parts(frozen):
    """Fault: a gradient is computed for what is frozen, or lost for what is not."""
    parts = inputs(torch.float32)
    for index in frozen:
        parts[index].requires_grad_(False)
    gelu_linear(*parts).sum().backward()
    assert [index for index, part in enumerate(parts) if part.grad is None] == list(frozen)


def test_autocast_gives_what_it_gives_the_plain_product():
    """Fault: under autocast the product or its gradients are in other types than the plain product's."""
    inner, weight, bias = inputs(torch.float32)
    rounded = inner.detach().to(torch.bfloat16).requires_grad_()
    results = []
    for function in (gelu_linear, lambda *given: torch.addmm(bias, F.gelu(given[0], approximate="tanh"), weight)):
        with torch.autocast("cpu", torch.bfloat16):
            found = function(rounded, weight, bias)
        results.append([found, *torch.autograd.grad(found.float().square().sum(), (rounded, weight, bias))])
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_keeps_no_activation():
    """Fault: gelu(inner) is kept until the backward pass, as large as inner itself."""
    inner, weight, bias = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gelu_linear(inner, weight, bias)
    assert {tensor.data_ptr() for tensor in kept} == {inner.data_ptr(), weight.data_ptr()}
