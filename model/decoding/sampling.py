"""Sampling tokens from the student, the teacher or a mixture of both, with the probability they were sampled with."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class SamplingOptions(NamedTuple):
    """alpha: the teacher's share of the mixture alpha p + (1 - alpha) q; 0 = pure student, 1 = pure teacher.

    temperature: of both softmaxes. top_k, top_p: sample among the k most likely tokens of the mixture, and among the
    fewest that together have a mass of top_p; None = all.
    """

    alpha: float = 0.2
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def row_uniforms(seed: int, draw: int, rows: list[int], count: int) -> Tensor:
    """Numbers in [0, 1), float64 [len(rows), count]; those of a row do not depend on the other rows.

    draw: index of the set of rollouts, so that a row is not sampled alike each time.
    """
    uniforms = [np.random.default_rng([seed, draw, row]).random(count) for row in rows]
    return torch.from_numpy(np.array(uniforms).reshape(len(rows), count))


def sample(
    student: Tensor, teacher: Tensor | None, options: SamplingOptions, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """(tokens [n] int64, the log [n] of the probability that each was sampled with), from the mixture p~ of the
    rollout, truncated if asked (and then renormalised).

    student, teacher: log-probabilities [n, V] at the rollout's temperature; teacher is None if alpha is 0.
    uniforms [n]: numbers in [0, 1) that decide. The distribution is inverted in float64, and a token of probability 0
    is never sampled.
    """
    probabilities = student.to(torch.float64, copy=True).exp_()
    if teacher is not None and options.alpha > 0:
        probabilities.mul_(1 - options.alpha).add_(teacher.to(torch.float64, copy=True).exp_(), alpha=options.alpha)
    probabilities = truncate(probabilities, options.top_k, options.top_p)
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # The last token that has a share, for a number that rounding puts behind all of them.
    last = (cumulated < total).sum(-1, keepdim=True)
    tokens = torch.searchsorted(cumulated, uniforms[:, None].to(total) * total, right=True).minimum(last)
    return tokens[:, 0], (probabilities.gather(1, tokens) / total).log()[:, 0].to(student.dtype)


def truncate(probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities [n, V] with 0 outside the k most likely, and outside the fewest that reach a mass of top_p."""
    size = probabilities.shape[-1]
    if (top_k is None or top_k >= size) and (top_p is None or top_p == 1):
        return probabilities
    best = probabilities.topk(size if top_k is None else min(top_k, size), -1)
    values = best.values
    if top_p is not None and top_p < 1:
        mass = values.sum(-1, keepdim=True)
        before = F.pad(values.cumsum(-1)[:, :-1], (1, 0))  # summed, not subtracted: rounding never keeps one too many
        values = values.masked_fill(before >= top_p * mass, 0)
    return torch.zeros_like(probabilities).scatter_(-1, best.indices, values)


def log_prob_of(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The entries [n] of log-probabilities [n, V] at tokens [n]."""
    return log_probs.gather(1, tokens[:, None])[:, 0]
