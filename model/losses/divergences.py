"""Divergences between teacher and student distributions over the vocabulary, one value a position.

`choose_divergence` returns one by name, as a function of log-probabilities that computes value, in nats, and gradient
together; the teacher is a constant. log 0 is given as FLOOR: nothing is multiplied by an infinite log, so values and
gradients are finite for any finite logits. A gradient is written out, or left to autograd. Names and parameters are in
model/losses/registry.py.

In the notation of the docstrings p is the teacher's distribution and q the student's, both at the temperature.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from model.losses.registry import parameters_of

# (log_p [N, V], log_q [N, V], q [N, V]) -> (values [N], gradient with respect to the student's logits [N, V])
Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FLOOR = -1e30  # stands in for log 0: finite, so that 0 * log 0 is 0

FORMULAS: dict[str, Divergence] = {}  # filled by `formula`, below


def choose_divergence(name: str, **parameters: float) -> Divergence:
    """The divergence of a config's `kl_div`. parameters: its own, such as `beta`; by default those of the registry.

    Raises:
        ValueError: an unknown name or parameter, or a number out of range.
    """
    parameters = parameters_of(name, parameters)
    return partial(FORMULAS[name], **parameters)


def formula(name: str, by_autograd: bool = False) -> Callable:
    """Registers a function as the divergence `name`.

    by_autograd: the function returns values [N] of (log_p, log_q, **parameters) alone; its gradient is autograd's.
    Otherwise it returns values and gradient of (log_p, log_q, q, **parameters), as `Divergence` says.
    """

    def register(function: Callable) -> Callable:
        FORMULAS[name] = with_gradient(function) if by_autograd else function
        return function

    return register


def with_gradient(values_of: Callable[..., Tensor]) -> Divergence:
    def terms(log_p: Tensor, log_q: Tensor, q: Tensor, **parameters: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            values = values_of(log_p, leaf, **parameters)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slope - q * slope.sum(-1, keepdim=True)

    return terms


# With G = d value / d log q, the gradient is G - q sum_v G.


@formula("forward")
def forward_terms(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_v p (log p - log q) (Hinton et al. 2015, arXiv 1503.02531)."""
    p = log_p.exp()
    values = torch.linalg.vecdot(p, log_p - log_q)
    return values, q - p


@formula("reverse")
def reverse_terms(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum_v q (log q - log p) (MiniLLM, arXiv 2306.08543)."""
    ratio = log_q - log_p
    values = torch.linalg.vecdot(q, ratio)
    return values, ratio.sub_(values[:, None]).mul_(q)


@formula("JS")
@formula("generalized_js")
def generalized_js_terms(log_p: Tensor, log_q: Tensor, q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1).

    JS is that of beta = 1/2: symmetric, at most log 2. The value tends to 0 at both ends: divided by beta to forward KL
    as beta -> 0, divided by 1 - beta to reverse KL as beta -> 1. So the strength of the training depends on beta.
    """
    ratio = log_q - log_p
    # log(m / p) and log(m / q); each by its own logaddexp, since their difference would lose small ones.
    m_to_p = log_mixture(ratio, beta)
    m_to_q = log_mixture(ratio.neg_(), 1 - beta)
    from_teacher, from_student = torch.linalg.vecdot(log_p.exp(), m_to_p).neg_(), torch.linalg.vecdot(q, m_to_q).neg_()
    gradient = m_to_q.add_(from_student[:, None]).mul_(q).mul_(beta - 1)
    return beta * from_teacher + (1 - beta) * from_student, gradient


def log_mixture(ratio: Tensor, share: float) -> Tensor:
    """log((share a + (1 - share) b) / a) from ratio = log(b / a), by logaddexp; exactly 0 at a = b, share = 1/2."""
    # softplus(x) is logaddexp(0, x); torch computes it with vector instructions on a CPU, logaddexp without.
    shift = math.log1p(-share) - math.log(share)
    return softplus(ratio if shift == 0 else ratio + shift, threshold=40).add_(math.log(share))


@formula("skew_forward")
def skew_forward_terms(log_p: Tensor, log_q: Tensor, q: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """KL(p || lambda p + (1 - lambda) q) (DistiLLM, arXiv 2402.03898); at most -log(lambda)."""
    m_to_p = log_mixture(log_q - log_p, lambda_)
    p = log_p.exp()
    values = torch.linalg.vecdot(p, m_to_p).neg_()
    weight = (log_q - m_to_p).exp_()  # p q / m
    return values, (q * weight.sum(-1, keepdim=True)).sub_(weight).mul_(1 - lambda_)


@formula("skew_reverse")
def skew_reverse_terms(log_p: Tensor, log_q: Tensor, q: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """KL(q || lambda q + (1 - lambda) p) (DistiLLM, arXiv 2402.03898); at most -log(lambda)."""
    m_to_q = log_mixture(log_p - log_q, lambda_)
    values = torch.linalg.vecdot(q, m_to_q).neg_()
    inner = m_to_q.neg().exp_().mul_(-lambda_).sub_(m_to_q)  # log(q / m) - lambda q / m
    return values, inner.sub_(torch.linalg.vecdot(q, inner)[:, None]).mul_(q)


@formula("total_variation")
def total_variation_terms(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """sum_v |p - q| / 2, in [0, 1] (arXiv 2307.15190)."""
    difference = q - log_p.exp()
    values = difference.abs().sum(-1).mul_(0.5)
    sign = difference.sign_().mul_(0.5)
    return values, sign.sub_(torch.linalg.vecdot(q, sign)[:, None]).mul_(q)


@formula("symmetric")
def symmetric_terms(log_p: Tensor, log_q: Tensor, q: Tensor, mu: float | Tensor) -> tuple[Tensor, Tensor]:
    """mu KL(p || q) + (1 - mu) KL(q || p); Jeffreys' divergence, halved, at mu = 1/2."""
    forward, forward_gradient = forward_terms(log_p, log_q, q)
    reverse, reverse_gradient = reverse_terms(log_p, log_q, q)
    share = mu[:, None] if isinstance(mu, Tensor) else mu
    return mu * forward + (1 - mu) * reverse, share * forward_gradient + (1 - share) * reverse_gradient


@formula("adaptive")
def adaptive_terms(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """w KL(p || q) + (1 - w) KL(q || p), w at each position by where p and q differ (after arXiv 2404.02657).

    w = gap_head / (gap_head + gap_tail), where the head is the smallest set of the teacher's most likely tokens with
    mass of at least one half, and a gap is the sum of |p - q| over the set. w is a constant for the gradient.
    """
    p, order = log_p.exp().sort(-1, descending=True)
    gap = (p - q.gather(-1, order)).abs_()
    head = p.cumsum(-1).sub_(p) < 0.5  # what lies before a token of the head is less than half
    gap_head, gap_all = (gap * head).sum(-1), gap.sum(-1)
    share = torch.where(gap_all > 0, gap_head / gap_all, 0.5)
    return symmetric_terms(log_p, log_q, q, share)
