"""The policy-gradient loss at the positions of rollouts, in chunks, its gradient formed in the forward pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.losses.divergences import reverse_terms
from model.losses.output_head import OutputHead
from model.losses.penalties import diversity_penalty, entropy_penalty, frequency_penalty
from model.losses.vocabulary_loss import TeacherHidden, chunked_loss, even_parts
from model.transfer import to_device


class PolicyTokens(NamedTuple):
    """What is known of the N tokens of some sequences before the loss; constants, [N] each, one sequence after another.

    tokens int64; counts: how many each sequence has. log_q: the student's log-probabilities when they were drawn.
    advantages: what the long-term part rewards. weights: importance weights of the tokens; state_weights: those of the
    states in which they were drawn. rewards: r_t, for the log alone.
    """

    tokens: Tensor
    counts: list[int]
    log_q: Tensor
    advantages: Tensor
    weights: Tensor
    state_weights: Tensor
    rewards: Tensor


class Penalties(NamedTuple):
    """Weights of the penalties (`model/losses/penalties.py`); embeddings [V, D] of unit norm; entropy_floor in nats."""

    frequency: float
    diversity: float
    entropy: float
    entropy_floor: float
    embeddings: Tensor | None


class PolicyLoss(NamedTuple):
    """loss_sum: scalar with a graph. The rest: detached sums over the tokens, before their weights in the loss."""

    loss_sum: Tensor
    single_step: Tensor
    long_term: Tensor
    entropy: Tensor
    clipped: Tensor
    frequency_penalty: Tensor
    diversity_penalty: Tensor
    entropy_penalty: Tensor


def policy_loss(
    hidden: Tensor,
    head: OutputHead,
    drawn: PolicyTokens,
    teacher: TeacherHidden,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    clip_epsilon: float | None = 0.2,
    penalties: Penalties | None = None,
    factor: float = 1.0,
    chunk_size: int = 128,
) -> PolicyLoss:
    """Sum over tokens of the single-step and long-term parts, and of each sequence's penalties times its tokens.

    With q and p at `temperature`, in the state before token y_t (MiniLLM, arXiv 2306.08543, eqs. 3 to 8):
    single step  state_weight_t sum_v q(v) (log q(v) - log p(v)), differentiated through q;
    long term    max(-x A, -clip(x, 1 - epsilon, 1 + epsilon) A), x = weight_t q(y_t) / exp(log_q_t), A the advantage.
    Both at all tokens, times `factor`, are loss_sum; the other sums are before it.

    hidden [N, D]: the student's states that predict the tokens. chunk_size: positions whose logits exist at a time;
    with penalties a whole sequence at least.
    """
    sequences = torch.repeat_interleave(torch.arange(len(drawn.counts)), torch.tensor(drawn.counts, dtype=torch.int64))
    parts = even_parts(len(hidden), chunk_size) if penalties is None else whole_sequences(drawn.counts, chunk_size)
    terms = partial(
        policy_terms, drawn=drawn, sequences=sequences, temperature=temperature,
        clip_epsilon=clip_epsilon, penalties=penalties, factor=factor,
    )
    loss, sums = chunked_loss(
        hidden, head, parts, terms, vocabulary=vocabulary, teacher=teacher, temperature=temperature,
        in_blocks=penalties is None,
    )
    return PolicyLoss(loss, *sums)


def whole_sequences(counts: list[int], chunk_size: int) -> list[slice]:
    """Chunks that hold whole sequences, of at most `chunk_size` positions or of one sequence."""
    parts: list[slice] = []
    start = end = 0
    for count in counts:
        if end > start and end + count - start > chunk_size:
            parts.append(slice(start, end))
            start = end
        end += count
    return [*parts, slice(start, end)] if end > start else parts


def policy_terms(
    logits: Tensor, part: slice, log_p: Tensor, with_gradient: bool, *, drawn: PolicyTokens, sequences: Tensor,
    temperature: float, clip_epsilon: float | None, penalties: Penalties | None, factor: float,
):
    """(sums [8] as in PolicyLoss, gradient [n, V] of the loss by the logits or None) of one chunk."""
    log_q = torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), -1)
    q = log_q.exp()
    entropy = -torch.linalg.vecdot(q, log_q).sum()
    tokens, state_weights = drawn.tokens[part], drawn.state_weights[part]
    single_step, gradient = reverse_terms(log_p, log_q, q)
    single_step = (single_step * state_weights).sum()
    long_term, slope, clipped = clipped_surrogate(
        log_q.gather(1, tokens[:, None])[:, 0] - drawn.log_q[part], drawn.weights[part], drawn.advantages[part],
        clip_epsilon,
    )
    long_term = long_term.sum()
    weighted, of_penalties, by_logits = penalty_terms(log_q, q, sequences[part], penalties, with_gradient)
    sums = torch.stack([factor * (single_step + long_term + weighted), single_step, long_term, entropy, clipped.sum(),
                        *of_penalties])
    if not with_gradient:
        return sums, None
    scale = factor / temperature
    gradient.mul_(scale * state_weights[:, None]).addcmul_(q, slope[:, None], value=-scale)
    gradient[torch.arange(len(tokens), device=tokens.device), tokens] += scale * slope
    return sums, gradient if by_logits is None else gradient.add_(by_logits, alpha=scale)


def clipped_surrogate(
    log_ratio: Tensor, weights: Tensor, advantages: Tensor, clip_epsilon: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, their derivatives by log q, where the clip holds the gradient back), [n] each.

    log_ratio: log q now less log q when the token was drawn. clip_epsilon: None clips nothing.
    """
    factor = (log_ratio.exp() * weights).clamp(max=torch.finfo(weights.dtype).max)  # inf times an advantage of 0 is NaN
    plain = -factor * advantages
    if clip_epsilon is None:
        return plain, plain, torch.zeros_like(plain)
    bounded = -factor.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    held = bounded > plain
    return torch.maximum(plain, bounded), torch.where(held, 0, plain), held.to(plain.dtype)


def penalty_terms(log_q: Tensor, q: Tensor, sequences: Tensor, penalties: Penalties | None, with_gradient: bool):
    """(weighted sum, [frequency, diversity, entropy] sums, gradient [n, V] by the logits or None), whole sequences."""
    nothing = log_q.new_zeros(())
    if penalties is None or not len(log_q):
        return nothing, [nothing] * 3, None
    # Counted on the CPU: how many sequences there are decides shapes, and asking the device would mean waiting.
    rows, counts = (to_device(each, log_q.device) for each in torch.unique_consecutive(
        sequences, return_inverse=True, return_counts=True)[1:])
    frequency, diversity, entropy, floor, embeddings = penalties
    measures: list[tuple[float, Callable[[Tensor], Tensor]]] = [
        (frequency, lambda each: frequency_penalty(each, rows, counts)),
        (diversity, lambda each: diversity_penalty(each, rows, counts, embeddings)),
        (entropy, lambda each: entropy_penalty(each, rows, counts, floor)),
    ]
    with torch.set_grad_enabled(with_gradient):
        leaf = log_q.detach().requires_grad_(with_gradient)
        sums = [(measure(leaf) * counts).sum() if weight else nothing for weight, measure in measures]
        weighted = sum(weight * each for (weight, _), each in zip(measures, sums, strict=True))
    by_logits = None
    if with_gradient and weighted.requires_grad:
        by_log_q = torch.autograd.grad(weighted, leaf)[0]
        by_logits = by_log_q.addcmul_(q, by_log_q.sum(-1, keepdim=True), value=-1)
    return weighted.detach(), [each.detach() for each in sums], by_logits
