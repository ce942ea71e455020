"""Rewards and importance weights against two-loop references and hand-worked values: model/losses/rewards.py."""

import math
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.losses import rewards
from model.losses.rewards import immediate_rewards, importance_weights, long_term_rewards

INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(torch.float32).max

def mask_of(lengths, width):
    return torch.tensor([[position < length for position in range(width)] for length in lengths], dtype=torch.bool)


# The formulas, in plain Python over one sequence without padding.
def loop_long_term(rewards, normalize):
    following = [rewards[now + 1:] for now in range(len(rewards))]
    return [sum(later) / (max(len(later), 1) if normalize else 1) for later in following]


def loop_weights(student, sampling, kind):
    ratios = [math.exp(q) / math.exp(sampled) for q, sampled in zip(student, sampling, strict=True)]
    if kind == "token":
        return ratios
    if kind == "sequence":
        return [math.prod(ratios)] * len(ratios)
    return [math.prod(ratios[:position]) for position in range(len(ratios))]


def loop_whiten(rows):
    tokens = [value for row in rows for value in row]
    mean, spread = statistics.fmean(tokens) if tokens else 0.0, statistics.pstdev(tokens) if tokens else 0.0
    return [[(value - mean) / spread if spread else 0.0 for value in row] for row in rows]


# Each function of two tensors [B, L] and a mask, and its formula for two rows; some leave the second out.
FORMULAS = {
    "immediate": (immediate_rewards, lambda a, b: [p - q for p, q in zip(a, b, strict=True)]),
    "long_term": (lambda a, b, mask: long_term_rewards(a, mask), lambda a, b: loop_long_term(a, True)),
    "long_term_sum": (lambda a, b, mask: long_term_rewards(a, mask, False), lambda a, b: loop_long_term(a, False)),
    "token_weights": (lambda a, b, mask: importance_weights(a, b, mask, "token"), partial(loop_weights, kind="token")),
    "sequence_weights": (lambda a, b, mask: importance_weights(a, b, mask, "sequence"),
                         partial(loop_weights, kind="sequence")),
    "prefix_weights": (rewards.prefix_weights, partial(loop_weights, kind="prefix")),
    "whiten": (lambda a, b, mask: rewards.whiten(a, mask), None),  # of all rows: loop_whiten
}
FUNCTIONS = {name: function for name, (function, _) in FORMULAS.items()}
every_function = pytest.mark.parametrize("name", FORMULAS)


def padded(rows, width, junk=0.0, dtype=torch.float64):
    return torch.tensor([[*row, *[junk] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


log_probabilities = st.floats(-6.0, 0.0, width=32)
row_pairs = st.lists(st.lists(st.tuples(log_probabilities, log_probabilities), max_size=6), min_size=1, max_size=4)


@every_function
@settings(max_examples=40, deadline=None)
@given(pairs=row_pairs, extra=st.integers(0, 3), junk=st.sampled_from([NAN, INF, -INF, 9.0]),
       dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equals_loops_whatever_the_padding_holds(name, pairs, extra, junk, dtype):
    """Fault: a sum, length, product or mean that counts padding, or is off by one token, in any shape of batch."""
    first, second = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    width = max(map(len, pairs)) + extra
    mask = mask_of(map(len, pairs), width)
    ours = FUNCTIONS[name](padded(first, width, junk, dtype), padded(second, width, junk, dtype), mask)
    assert ours.dtype == dtype and ours.shape == mask.shape
    assert (ours[~mask] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    by_row = FORMULAS[name][1]
    right = [by_row(*rows) for rows in zip(first, second, strict=True)] if by_row else loop_whiten(first)
    torch.testing.assert_close(ours.double(), padded(right, width), rtol=tolerance, atol=tolerance)


@every_function
def test_constants_in_float32(name):
    """Fault: an advantage or weight that gradients flow through, or one that is rounded to bfloat16."""
    first, second = (torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)).neg() for seed in (0, 1))
    mask = mask_of([5, 2, 0], 5)
    coarse = [values.bfloat16().requires_grad_() for values in (first, second)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = FUNCTIONS[name](*coarse, mask)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    fine = FUNCTIONS[name](*(values.detach().float() for values in coarse), mask)
    torch.testing.assert_close(ours, fine, rtol=1e-6, atol=1e-6)


@every_function
def test_batch_without_a_real_token(name):
    """Fault: 0 / 0, or an index error, where no row has a token."""
    for shape in ((1, 1), (2, 3), (2, 0), (0, 3)):
        ours = FUNCTIONS[name](torch.full(shape, NAN), torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool))
        assert torch.equal(ours, torch.zeros(shape))


def test_last_reward_is_zero_after_large_ones():
    """Fault: R_{t+1} by the difference R_t - r_t, which leaves rounding behind."""
    large = torch.tensor([[1e7, 0.1, 0.3, 1e-3], [-1e8, 1e-4, 7.0, 0.0]])
    ours = long_term_rewards(large, mask_of([4, 3], 4), normalize=False)
    assert ours[0, 3] == 0 and ours[1, 2] == 0 and ours[1, 1] == 7
    assert ours[0, 2].item() == pytest.approx(1e-3, rel=1e-6)


def test_weight_of_a_long_sequence():
    """Fault: 1.25^1024 overflows to infinity, and the zero advantage of the last token makes NaN of it."""
    student, mask = torch.full((1, 1024), -1.0), mask_of([1024], 1024)
    sampling = student - math.log(1.25)
    before = rewards.prefix_weights(student, sampling, mask)
    for weights in (before, importance_weights(student, sampling, mask, "sequence")):
        assert weights[0, -1] == LARGEST
        assert (weights * torch.zeros(1, 1024) == 0).all()
    assert before[0, 10].item() == pytest.approx(1.25 ** 10, rel=1e-5)
    assert importance_weights(sampling, student, mask, "sequence").max() < 1e-30


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_whiten_by_hand(scale):
    """Fault: a sample's standard deviation, padding in the mean, an epsilon beside small values, squares too large."""
    ours = rewards.whiten(torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, NAN]]) * scale, mask_of([2, 2], 3))
    root = math.sqrt(5)  # mean 4, variance (9 + 1 + 1 + 9) / 4
    torch.testing.assert_close(ours, torch.tensor([[-3 / root, -1 / root, 0], [1 / root, 3 / root, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whiten_constants(dtype):
    """Fault: the rounding of the mean of equal values is blown up to unit size, in one process or two; or different
    constants of two processes are given 0."""
    for constant in (0.0, 0.1, -1 / 3, 1e-30, 12345.678, -1e30):
        for lengths in ([7, 3, 0], [1, 0, 0], [333, 1, 1000]):
            mask = mask_of(lengths, 1000)
            assert (rewards.whiten(torch.full((3, 1000), constant, dtype=dtype), mask) == 0).all()
    mask, third = mask_of([3], 3), torch.full((1, 3), 1 / 3, dtype=dtype)
    assert all((part == 0).all() for part in whiten_in_processes([(third, mask), (third.clone(), mask)]))
    low, high = whiten_in_processes([(third, mask), (third + 2, mask)])
    torch.testing.assert_close(low, torch.full((1, 3), -1.0, dtype=dtype))
    torch.testing.assert_close(high, torch.full((1, 3), 1.0, dtype=dtype))


def whiten_in_processes(parts):
    """Whitened parts [(values, mask), ...], each in its own thread; one that leaves out a sum breaks the barrier."""
    barrier, given = threading.Barrier(len(parts), timeout=20), [None] * len(parts)

    def work(rank):
        def all_reduce(tensor):
            given[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return tensor.copy_(total)

        values, mask = parts[rank]
        return rewards.whiten(values, mask, all_reduce)

    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(work, range(len(parts))))


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("lengths", [[6, 2, 0, 6, 1, 4], [0, 0, 0, 0, 5, 6], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
def test_whiten_over_processes(offset, lengths):
    """Fault: each process whitens by its own mean or spread, or one without tokens leaves the others waiting; the
    variance is the mean of squares less the square of the mean, which loses the digits."""
    values = offset + torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6.0)[:, None] * 10
    mask = mask_of(lengths, 6)
    rows = [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]
    alone = rewards.whiten(values, mask)
    torch.testing.assert_close(alone.double(), padded(loop_whiten(rows), 6), rtol=1e-5, atol=1e-6)
    for split in (1, 5):
        parts = [(values[:split], mask[:split]), (values[split:], mask[split:])]
        torch.testing.assert_close(torch.cat(whiten_in_processes(parts)), alone, rtol=1e-6, atol=1e-6)
