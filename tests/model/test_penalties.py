"""Penalties against brute force over pairs, hand-worked values and finite differences: model/losses/penalties.py."""

import math

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


# The formulas, in plain Python over the positions of one sequence, each a list of V probabilities.
def brute_force(name, positions, embeddings, floor):
    n, vocabulary = len(positions), range(len(positions[0]) if positions else 0)
    if name == "entropy":
        entropies = [-sum(q * math.log(q) for q in position if q > 0) for position in positions]
        return sum(max(0.0, 1 - entropy / floor) for entropy in entropies) / n if n else 0.0
    if n < 2:
        return 0.0
    pairs = [(t, s) for t in range(n) for s in range(n) if t != s]
    if name == "frequency":
        return sum(positions[t][v] * positions[s][v] for t, s in pairs for v in vocabulary) / len(pairs)
    expected = [[sum(position[v] * embeddings[v][d] for v in vocabulary) for d in range(len(embeddings[0]))]
                for position in positions]
    distances = [sum((a - b) ** 2 for a, b in zip(expected[t], expected[s], strict=True)) for t, s in pairs]
    return math.exp(-sum(distances) / len(pairs))


def by_brute_force(name, log_q, lengths, embeddings, floor=1.0):
    """Values [B] in float64."""
    embeddings = None if embeddings is None else embeddings.double().tolist()
    sequences = log_q.detach().double().exp().split(list(lengths))
    return torch.tensor([brute_force(name, sequence.tolist(), embeddings, floor) for sequence in sequences],
                        dtype=torch.float64)


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


# -- values ------------------------------------------------------------------------------------------------------


@every_penalty
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), vocabulary=st.integers(2, 6),
       width=st.integers(1, 4), scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]), seed=st.integers(0, 999),
       floor=st.sampled_from([0.05, 0.7, 5.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equals_brute_force(name, lengths, vocabulary, width, scale, seed, floor, dtype):
    """Fault: a closed form that differs from the sum over pairs, or takes positions of another sequence."""
    logits, embeddings = random_case(lengths, vocabulary, width, scale, seed, dtype)
    log_q = torch.log_softmax(logits, -1)
    ours = penalty(name, log_q, lengths, embeddings, floor)
    assert ours.dtype == dtype and ours.shape == (len(lengths),)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), by_brute_force(name, log_q, lengths, embeddings, floor),
                               rtol=tolerance, atol=tolerance)


# -- gradients ---------------------------------------------------------------------------------------------------


@every_penalty
@pytest.mark.parametrize("log_zero", [None, FLOOR])
def test_gradient_by_finite_differences(name, log_zero):
    """Fault: a gradient that is not that of the value, for any weights of the sequences; NaN at excluded tokens."""
    lengths = [4, 1, 0, 3, 2]
    logits, embeddings = random_case(lengths, scale=1.5, seed=3)
    log_q = torch.log_softmax(logits, -1)
    if log_zero is not None:
        log_q[:, 1] = log_zero
        log_q = torch.log_softmax(log_q, -1)
        log_q[:, 1] = log_zero
    weights, floor, step = torch.tensor([1.0, -2.0, 0.5, 0.3, 3.0]).double(), 1.2, 1e-6
    values, ours = with_gradient(name, log_q, lengths, embeddings, floor, weights)
    torch.testing.assert_close(values, by_brute_force(name, log_q, lengths, embeddings, floor))
    right = torch.zeros_like(log_q)
    for position in range(log_q.shape[0]):
        for token in range(log_q.shape[1]):
            if log_q[position, token] <= FLOOR:
                continue  # q and its derivative are 0
            up, down = log_q.clone(), log_q.clone()
            up[position, token] += step
            down[position, token] -= step
            above, below = (by_brute_force(name, moved, lengths, embeddings, floor) for moved in (up, down))
            right[position, token] = (weights * (above - below)).sum() / (2 * step)
    torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-8)
    assert right.abs().max() > 1e-2


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


def test_embeddings_are_a_constant():
    """Fault: the penalty is lessened by moving the embeddings instead of the predictions."""
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits, _ = random_case([4], dtype=torch.float32)
    log_q = torch.log_softmax(logits, -1).requires_grad_()
    penalty("diversity", log_q, [4], unit_embeddings(weight)).sum().backward()
    penalty("diversity", log_q, [4], weight).sum().backward()
    assert weight.grad is None and log_q.grad.abs().max() > 0


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
    """Fault: columns scaled instead of rows, 0 / 0 for a row of zeros, bfloat16 norms."""
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -7.0]], requires_grad=True)
    ours = unit_embeddings(weight)
    torch.testing.assert_close(ours, torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]))
    assert not ours.requires_grad and weight[0].tolist() == [3, 4]
    coarse = unit_embeddings(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    torch.testing.assert_close(coarse.double().square().sum(-1), torch.ones(20).double(), rtol=1e-6, atol=0)
