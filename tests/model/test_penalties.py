"""Penalties against brute force over pairs, hand-worked gradients: model/losses/penalties.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.losses.divergences import FLOOR
from model.losses.penalties import diversity_penalty, entropy_penalty, frequency_penalty, unit_embeddings
from tests.model.test_vocabulary_loss import Tensors

NAMES = ["frequency", "diversity", "entropy"]
every_penalty = pytest.mark.parametrize("name", NAMES)


def layout(lengths):
    """(rows [N], counts [B]) of sequences of these lengths, one after the other."""
    counts = torch.tensor(lengths, dtype=torch.long)
    return torch.repeat_interleave(torch.arange(len(lengths)), counts), counts


def penalty(name, log_q, lengths, embeddings=None, floor=1.0):
    rows, counts = layout(lengths)
    if name == "frequency":
        return frequency_penalty(log_q, rows, counts)
    if name == "diversity":
        return diversity_penalty(log_q, rows, counts, embeddings)
    return entropy_penalty(log_q, rows, counts, floor)


# The formulas, pair by pair of one sequence's positions [n, V], in float64 with autograd.
def brute_force(name, log_q, embeddings, floor):
    q, n = log_q.exp(), len(log_q)
    if name == "entropy":
        return sum((torch.relu(1 + (row * logs).sum() / floor) for row, logs in zip(q, log_q, strict=True)),
                   log_q.new_zeros(())) / max(n, 1)
    pairs = [(t, s) for t in range(n) for s in range(n) if t != s]
    if not pairs:
        return log_q.new_zeros(())
    if name == "frequency":
        return sum((q[t] * q[s]).sum() for t, s in pairs) / len(pairs)
    points = q @ embeddings
    return torch.exp(-sum((points[t] - points[s]).square().sum() for t, s in pairs) / len(pairs))


def by_brute_force(name, log_q, lengths, embeddings, floor, weights):
    """(values [B], gradient [N, V] of their weighted sum by log_q), both float64."""
    log_q = log_q.detach().double().requires_grad_()
    values = torch.stack([brute_force(name, sequence, embeddings.double(), floor)
                          for sequence in log_q.split(list(lengths))])
    (gradient,) = torch.autograd.grad((values * weights).sum() + 0 * log_q.sum(), log_q)
    return values.detach(), gradient


def random_case(lengths, vocabulary=5, width=3, scale=2.0, seed=0, dtype=torch.float64):
    """(logits [N, V], embeddings [V, D] of unit norm)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(sum(lengths), vocabulary, generator=generator, dtype=dtype)
    embeddings = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    return logits, embeddings / embeddings.square().sum(-1, keepdim=True).sqrt()


def one_hot(*tokens, vocabulary, dtype=torch.float64):
    """log_q [N, V] of positions that are sure of their token."""
    log_q = torch.full((len(tokens), vocabulary), FLOOR, dtype=dtype)
    log_q[range(len(tokens)), tokens] = 0.0
    return log_q


def with_gradient(name, log_q, lengths, embeddings=None, floor=1.0, weights=None):
    """(values [B], gradient [N, V] of their (weighted) sum by log_q)."""
    log_q = log_q.detach().clone().requires_grad_()
    values = penalty(name, log_q, lengths, embeddings, floor)
    (values if weights is None else values * weights).sum().backward()
    return values.detach(), log_q.grad


# -- values and gradients ----------------------------------------------------------------------------------------


@every_penalty
@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), vocabulary=st.integers(2, 6),
       width=st.integers(1, 4), scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]), seed=st.integers(0, 999),
       floor=st.sampled_from([0.05, 0.75, 5.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
       excluded=st.booleans())
def test_equals_brute_force(name, lengths, vocabulary, width, scale, seed, floor, dtype, excluded):
    """Fault: a closed form that differs from the sum over pairs, or takes positions of another sequence; a gradient
    that is not that of the value, for any weights of the sequences; NaN at excluded tokens."""
    logits, embeddings = random_case(lengths, vocabulary, width, scale, seed, dtype)
    if excluded:
        logits[:, 1] = FLOOR
    log_q = torch.log_softmax(logits, -1)
    log_q[:, 1].clamp_(min=FLOOR)
    weights = torch.linspace(-2, 3, len(lengths), dtype=torch.float64)
    values, gradient = with_gradient(name, log_q, lengths, embeddings, floor, weights.to(dtype))
    assert values.dtype == gradient.dtype == dtype and values.shape == (len(lengths),)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    right, right_gradient = by_brute_force(name, log_q, lengths, embeddings, floor, weights)
    torch.testing.assert_close(values.double(), right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=tolerance, atol=tolerance / floor)


@pytest.mark.parametrize("excess", [0.0, 1e-7, 3e-7, -1e-7])
def test_gradient_where_rounding_leaves_the_range(excess):
    """Fault: a clamp that cuts the gradient off exactly where the penalty is largest."""
    for n in (2, 3, 7, 30):
        log_q = one_hot(*[1] * n, vocabulary=4, dtype=torch.float32) + excess
        values, gradient = with_gradient("frequency", log_q, [n])
        assert values.item() == pytest.approx(1, abs=1e-5)
        right = torch.zeros(n, 4)
        right[:, 1] = 2 / n  # 2 (S_v - q_t) / (n (n - 1)) with S_v = n
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-7)
        values, gradient = with_gradient("entropy", log_q, [n], floor=0.05)
        assert values.item() == pytest.approx(1, abs=1e-4)
        right[:, 1] = 1 / 0.05 / n  # (log q + 1) q / floor / n
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)


# -- sequences ---------------------------------------------------------------------------------------------------


@every_penalty
def test_bfloat16_and_autocast(name):
    """Fault: probabilities or expected embeddings rounded to bfloat16 under autocast."""
    lengths = [5, 3]
    logits, embeddings = random_case(lengths, 40, 16, dtype=torch.float32)
    log_q = torch.log_softmax(logits, -1).bfloat16()
    right, right_gradient = with_gradient(name, log_q.float(), lengths, embeddings, 3.0)
    log_q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = penalty(name, log_q, lengths, embeddings, 3.0)
    values.sum().backward()
    assert values.dtype == torch.float32 and log_q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(values.detach(), right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_q.grad, right_gradient.bfloat16())


@every_penalty
@pytest.mark.parametrize("lengths", [[600], [3] * 200])
def test_memory_is_linear(name, lengths):
    """Fault: a matrix of all pairs of positions, or one of sequences times positions."""
    logits, embeddings = random_case(lengths, 5, 3)
    with Tensors() as made:
        _, gradient = with_gradient(name, torch.log_softmax(logits, -1), lengths, embeddings, 1.5)
    assert gradient.abs().max() > 0
    assert logits.numel() <= max(shape.numel() for shape in made.shapes) <= 2 * logits.numel()


def test_unit_embeddings():
    """Fault: columns scaled instead of rows, 0 / 0 for a row of zeros, bfloat16 norms; or the penalty is lessened by
    moving the embeddings instead of the predictions."""
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -7.0]], requires_grad=True)
    ours = unit_embeddings(weight)
    torch.testing.assert_close(ours, torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]))
    assert not ours.requires_grad and weight[0].tolist() == [3, 4]
    log_q = torch.log_softmax(random_case([4], 3, dtype=torch.float32)[0], -1)
    assert with_gradient("diversity", log_q, [4], weight)[1].any() and weight.grad is None
    coarse = unit_embeddings(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    torch.testing.assert_close(coarse.double().square().sum(-1), torch.ones(20).double(), rtol=1e-6, atol=0)
