"""Divergences between teacher and student distributions over the vocabulary, one value a position.

`choose_divergence` returns one by name, as a function of log-probabilities that computes value and gradient together;
`from_logits` applies it to logits [N, V] of both and returns values [N] in nats, differentiable in the student's
logits; the teacher is a constant. Most gradients are written out: nothing is multiplied by an infinite log, so they are
finite for any finite logits. Formulas without one are differentiated by autograd. Names and parameters are in
model/losses/registry.py.

In the notation of the docstrings p is the teacher's distribution and q the student's, both at the temperature.
"""

import math
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from model.losses.registry import parameters_of

# (log_p [N, V], log_q [N, V], q [N, V]) -> (values [N], gradient with respect to the student's logits [N, V])
Divergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FLOOR = -1e30  # stands in for log 0: finite, so that 0 * log 0 is 0

FORMULAS: dict[str, Divergence] = {}  # filled by `formula`, below


def choose_divergence(name: str, **parameters: float) -> Divergence:
    """The divergence of a config's `kl_div`. parameters: `beta`, `lambda_` or `mu`, by default those of the registry.

    Raises:
        ValueError: an unknown name, or a number that is out of range.
    """
    values = parameters_of(name, parameters)
    if name == "symmetric" and values["mu"] in (0, 1):  # the other KL has no share, but might be infinite
        name, values = ("forward" if values["mu"] else "reverse"), {}
    return partial(FORMULAS[name], **values) if values else FORMULAS[name]


def check_range(name: str, value: float, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value}: expected a number {expected}")


# -- from logits -------------------------------------------------------------------------------------------------


def from_logits(teacher_logits: Tensor, student_logits: Tensor, temperature: float, divergence: Divergence) -> Tensor:
    """Values [N] of a divergence of `choose_divergence`; logits [N, V] of one shape, computed in float32 at least.

    A token excluded on both sides (logit -inf) contributes 0 with gradient 0. NaN stays NaN.

    Raises:
        ValueError: shapes that differ, a temperature of 0 or less, or an infinite divergence, naming the token.
    """
    if teacher_logits.shape != student_logits.shape or teacher_logits.dim() != 2:
        shapes = f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        raise ValueError(f"teacher and student logits have the shapes {shapes}: expected the same [N, V]")
    check_range("temperature", temperature, temperature > 0, "greater than 0")
    return FromLogits.apply(student_logits, teacher_logits.detach(), temperature, divergence)


class FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits: Tensor, teacher_logits: Tensor, temperature: float, divergence: Divergence):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        with torch.autocast(student_logits.device.type, enabled=False):
            log_p, log_q = (torch.log_softmax(logits.to(dtype) / temperature, -1)
                            for logits in (teacher_logits, student_logits))
            check_support(divergence, torch.isneginf(log_p), torch.isneginf(log_q))
            log_p, log_q = log_p.clamp(min=FLOOR), log_q.clamp(min=FLOOR)
            values, gradient = divergence(log_p, log_q, log_q.exp())
        ctx.save_for_backward(gradient / temperature)
        ctx.dtype = student_logits.dtype
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_values[:, None]).to(ctx.dtype), None, None, None


def check_support(divergence: Divergence, teacher_excludes: Tensor, student_excludes: Tensor) -> None:
    """Raises ValueError where a token that one side alone excludes makes the divergence infinite."""
    infinite_if = getattr(divergence, "func", divergence).infinite_if
    for who, excludes, other in (("teacher", teacher_excludes, student_excludes),
                                 ("student", student_excludes, teacher_excludes)):
        if who in infinite_if and (infinite := excludes & ~other).any():
            position, token = infinite.nonzero()[0].tolist()
            raise ValueError(f"the divergence is infinite at position {position}: the {who} excludes token {token} "
                             "(logit -inf) and the other model does not")


def formula(name: str, infinite_if: tuple[str, ...] = (), by_autograd: bool = False) -> Callable:
    """Registers a function as the divergence `name`.

    infinite_if: "teacher", "student": who makes it infinite by excluding a token that the other does not exclude.
    by_autograd: the function returns values [N] of (log_p, log_q, **parameters) alone; its gradient is autograd's.
    Otherwise it returns values and gradient of (log_p, log_q, q, **parameters), as `Divergence` says.
    """

    def register(function: Callable) -> Callable:
        terms = with_gradient(function) if by_autograd else function
        terms.infinite_if = infinite_if
        FORMULAS[name] = terms
        return terms

    return register


def with_gradient(values_of: Callable[..., Tensor]) -> Divergence:
    @wraps(values_of)
    def terms(log_p: Tensor, log_q: Tensor, q: Tensor, **parameters: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            values = values_of(log_p, leaf, **parameters)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slope - q * slope.sum(-1, keepdim=True)

    return terms


# -- from log-probabilities: value and gradient with respect to the student's logits -----------------------------
# With G = d value / d log q, the gradient is G - q sum_v G.


@formula("forward", infinite_if=("student",))
def forward_terms(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_v p (log p - log q) (Hinton et al. 2015, arXiv 1503.02531)."""
    p = log_p.exp()
    values = torch.linalg.vecdot(p, log_p - log_q)
    return values, q - p


@formula("reverse", infinite_if=("teacher",))
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


@formula("symmetric", infinite_if=("teacher", "student"))
def symmetric_terms(log_p: Tensor, log_q: Tensor, q: Tensor, mu: float | Tensor) -> tuple[Tensor, Tensor]:
    """mu KL(p || q) + (1 - mu) KL(q || p); Jeffreys' divergence, halved, at mu = 1/2."""
    forward, forward_gradient = forward_terms(log_p, log_q, q)
    reverse, reverse_gradient = reverse_terms(log_p, log_q, q)
    share = mu[:, None] if isinstance(mu, Tensor) else mu
    return mu * forward + (1 - mu) * reverse, share * forward_gradient + (1 - share) * reverse_gradient


@formula("adaptive", infinite_if=("teacher", "student"))
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
