"""Rewards and importance weights of policy-gradient distillation, after MiniLLM (arXiv 2306.08543, section 2.2).

In the docstrings y is a sampled sequence, p the teacher, q the student and p~ the distribution that y was sampled from.
Everything is [B, L], one sequence per row, with a mask that is True at the real tokens, from the left: 1..1 0..0.
Results have no gradient, are in float32 at least, and 0 where the mask is False; arguments may hold anything there, NaN
and infinity included. A row may have no real token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

ROUNDING = 1e-14  # of a mean in float64, relative to it


def immediate_rewards(teacher_log_probs: Tensor, student_log_probs: Tensor, mask: Tensor) -> Tensor:
    """r_t = log p(y_t) - log q(y_t), [B, L] in nats, from the log-probabilities [B, L] of the sampled tokens.

    Positive where the teacher finds the token more likely than the student does.
    """
    return log_ratio(teacher_log_probs, student_log_probs, mask)


def long_term_rewards(rewards: Tensor, mask: Tensor, normalize: bool = True) -> Tensor:
    """R_{t+1}, the sum of the rewards after token t, [B, L] from rewards [B, L]; exactly 0 at the last real token.

    It is the advantage of log q(y_t) in the policy gradient. r_t itself is excluded: the single-step part of the loss
    contains it exactly, and it would count twice. normalize: divide by the number of real tokens after t, so that long
    sequences do not weigh more (MiniLLM's length normalisation).
    """
    later = pad(sum_from_here(real_values(rewards, mask)), (0, 1))[:, 1:]
    if normalize:
        later = later / (sum_from_here(mask.long()) - 1).clamp(min=1)
    return torch.where(mask, later, 0)


def importance_weights(student_log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor, level: str) -> Tensor:
    """Weights [B, L] that turn tokens sampled from p~ into the student's, from log-probabilities [B, L] of the tokens.

    level: "token", q(y_t) / p~(y_t), MiniLLM's approximation; "sequence", the product over all real tokens of the
    sequence, the same at each of them: unbiased, with a variance that grows with the length. A weight too large for
    the number format is its largest number, so that weight times 0 is 0.

    Raises:
        ValueError: another level.
    """
    ratio = log_ratio(student_log_probs, sampling_log_probs, mask)
    if level == "sequence":
        ratio = ratio.sum(1, keepdim=True).expand_as(ratio)
    elif level != "token":
        raise ValueError(f"importance_weight is {level!r}: expected token or sequence")
    return exponential(ratio, mask)


def prefix_weights(student_log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Product of q / p~ over the tokens BEFORE t, [B, L]: the weight of the state at t; 1 at the first real token."""
    before = pad(log_ratio(student_log_probs, sampling_log_probs, mask), (1, 0))[:, :-1]
    return exponential(before.cumsum(1), mask)


def whiten(
    values: Tensor, mask: Tensor, all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """Values [B, L] shifted and scaled to mean 0 and standard deviation 1 over the real tokens of all processes.

    The standard deviation is the uncorrected one (divided by the number of tokens). Constant values, or a single token,
    give 0. all_reduce sums a tensor over processes; every process calls it twice, with tokens or without.
    """
    wide = real_values(values, mask).double()
    count, total = all_reduce(torch.stack([mask.sum().double(), wide.sum()])).unbind()
    mean = total / count.clamp(min=1)
    deviations = torch.where(mask, wide - mean, 0)
    # A second round over the processes: mean of squares minus square of the mean would cancel most digits.
    spread = (all_reduce(deviations.square().sum()) / count.clamp(min=1)).sqrt()
    varied = ~(spread <= ROUNDING * mean.abs())
    return torch.where(mask & varied, deviations / spread, 0).to(at_least_float32(values))


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """Difference of log-probabilities [B, L] at the real tokens."""
    return real_values(numerator, mask) - real_values(denominator, mask)


def exponential(log_weights: Tensor, mask: Tensor) -> Tensor:
    weights = log_weights.exp().clamp(max=torch.finfo(log_weights.dtype).max)
    return torch.where(mask, weights, 0)


def real_values(values: Tensor, mask: Tensor) -> Tensor:
    """Detached, in float32 at least, 0 where masked."""
    return torch.where(mask, values.detach().to(at_least_float32(values)), 0)


def sum_from_here(values: Tensor) -> Tensor:
    """Sum of each position of [B, L] and all later ones."""
    return values.flip(1).cumsum(1).flip(1)


def at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
