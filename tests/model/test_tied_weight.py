"""The gradient of a tied embedding and head, in one tensor: model/gpt2/tied_weight.py."""

import pytest
import torch
from torch.nn import functional as F

from model.gpt2.tied_weight import tied


class GivenGradient(torch.autograd.Function):
    """A loss whose gradient by the weight is a given tensor, handed out as it is."""

    @staticmethod
    def forward(ctx, weight, gradient):
        ctx.gradient = gradient
        return weight.sum()

    @staticmethod
    def backward(ctx, grad_loss):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None


def test_one_tensor_holds_both_gradients():
    """Fault: a third tensor as large as the embedding is made to add the two."""
    weight = torch.randn(50, 4, requires_grad=True)
    of_head = torch.randn(50, 4)
    place, expected = of_head.data_ptr(), of_head.clone()
    lookup, head = tied(weight)
    ids = torch.tensor([3, 7, 3])
    loss = GivenGradient.apply(head, of_head) + (F.embedding(ids, lookup, sparse=True) * 2).sum()
    del of_head
    loss.backward()
    expected[3] += 4
    expected[7] += 2
    assert weight.grad.data_ptr() == place
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("used", ["lookup", "head", "both", "twice"])
def test_equal_to_the_plain_weight(used):
    """Fault: a use of the weight is lost, or counted twice."""
    torch.manual_seed(0)
    weight, ids = torch.randn(20, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 1, 19])

    def loss(lookup, head):
        hidden = torch.tanh(F.embedding(ids, lookup, sparse=lookup is not weight))
        hidden = hidden.detach() if used == "head" else hidden
        return torch.logsumexp(hidden @ (weight.detach() if used == "lookup" else head).T, -1).sum()

    times = 2 if used == "twice" else 1
    plain = torch.autograd.grad(sum(loss(weight, weight) for _ in range(times)), weight)[0]
    lookup, head = tied(weight)
    found = torch.autograd.grad(sum(loss(lookup, head) for _ in range(times)), weight)[0]
    torch.testing.assert_close(found.to_dense() if found.is_sparse else found, plain, rtol=1e-12, atol=1e-12)
