"""Penalties on the student's distributions along a sequence, each a number from 0 to 1 a sequence, but for rounding.

Each grows with the fault it penalises and is ADDED to the loss. The arguments hold the n real positions of several
sequences one after another, without padding:

    log_q   [N, V] the student's log-probabilities q_t, in nats; finite, FLOOR where a token is excluded
    rows    [N] int64, which sequence a position belongs to, 0..B-1
    counts  [B] the n of each sequence; may be 0

The results [B] are in float32 at least and differentiable once in log_q. An excluded token has gradient 0. Memory is
linear in the positions and in B: pairs of positions are summed in closed form.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def frequency_penalty(log_q: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """The chance that two different positions of a sequence emit the same token, [B]; grows with repetition.

    With S_v = sum_t q_t(v): (sum_v S_v^2 - sum_t sum_v q_t(v)^2) / (n (n - 1)). Without the second sum confidence would
    be punished too. 0 where n < 2.
    """
    q = in_float32(log_q).exp()
    counts = counts.to(q)
    expected_uses = sum_rows(q, rows, counts)
    same_position = sum_rows(q.square().sum(-1), rows, counts)
    chance = (expected_uses.square().sum(-1) - same_position) / (counts * (counts - 1)).clamp(min=1)
    return torch.where(counts >= 2, chance, 0)


def diversity_penalty(log_q: Tensor, rows: Tensor, counts: Tensor, embeddings: Tensor) -> Tensor:
    """exp(-D^2), [B], D^2 in [0, 4] the mean squared distance of the positions' expected embeddings; 1 when collapsed.

    embeddings: [V, D] of unit norm (`unit_embeddings`), a constant. With e_t = sum_v q_t(v) embeddings[v], the mean
    over pairs t != s of ||e_t - e_s||^2 is 2n / (n - 1) (mean_t ||e_t||^2 - ||mean_t e_t||^2). The bracket is taken as
    mean_t ||e_t - mean e||^2, the same number, which rounding cannot make negative. No square root is taken: its
    gradient is infinite at 0. 0 where n < 2.
    """
    q = in_float32(log_q).exp()
    counts = counts.to(q)
    with torch.autocast(q.device.type, enabled=False):
        expected = q @ embeddings.detach().to(q.dtype)
    mean = sum_rows(expected, rows, counts) / counts[:, None].clamp(min=1)
    deviations = expected - mean.index_select(0, rows)
    squares = sum_rows(deviations.square().sum(-1), rows, counts)
    return torch.where(counts >= 2, torch.exp(-2 * squares / (counts - 1).clamp(min=1)), 0)


def entropy_penalty(log_q: Tensor, rows: Tensor, counts: Tensor, entropy_floor: float) -> Tensor:
    """mean_t max(0, 1 - H(q_t) / entropy_floor), [B]; grows with over-confidence, 0 where all are spread enough.

    H is the entropy, entropy_floor > 0 a number of nats. After the confidence penalty of arXiv 1701.06548. 0 if n = 0.
    """
    log_q = in_float32(log_q)
    entropy = -(log_q.exp() * log_q).sum(-1)
    shortfall = torch.relu(1 - entropy / entropy_floor)
    counts = counts.to(log_q)
    return sum_rows(shortfall, rows, counts) / counts.clamp(min=1)


def unit_embeddings(weight: Tensor) -> Tensor:
    """Rows of an embedding matrix [V, D] scaled to unit norm: [V, D] detached, in float32 at least.

    A row of zeros stays zero.
    """
    return normalize(in_float32(weight.detach()), dim=-1)


def sum_rows(values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Sums over the positions of each sequence: [B, ...] from [N, ...]."""
    return values.new_zeros(len(counts), *values.shape[1:]).index_add(0, rows, values)


def in_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
