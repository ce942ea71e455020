"""The policy-gradient loss at the positions of rollouts, in chunks, its gradient computed in the forward pass."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from model.losses.divergences import reverse_terms
from model.losses.output_head import OutputHead
from model.losses.penalties import diversity_penalty, entropy_penalty, frequency_penalty
from model.losses.vocabulary_loss import TeacherHidden, chunked_loss, even_chunks
from model.transfer import to_device


class PolicyTokens(NamedTuple):
    """The N tokens of some sequences with their constants, [N] each, one sequence after another.

    tokens int64; counts: number of tokens of each sequence. log_q: the student's log-probabilities when they were
    sampled. advantages: of the long-term part. weights: importance weights of the tokens; state_weights: those of the
    states in which they were sampled. rewards: r_t, only for the log.
    """

    tokens: Tensor
    counts: list[int]
    log_q: Tensor
    advantages: Tensor
    weights: Tensor
    state_weights: Tensor
    rewards: Tensor


class Penalties(NamedTuple):
    """Weights of the penalties (`model/losses/penalties.py`).

    entropy_floor: in nats, below which entropy is penalised; None = a tenth of log V. embeddings [V, D]: of unit norm;
    `TeacherStudent` fills in the present ones.
    """

    frequency: float = 0.1
    diversity: float = 0.1
    entropy: float = 0.01
    entropy_floor: float | None = None
    embeddings: Tensor | None = None


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
    scale: float = 1.0,
    chunk_size: int = 128,
) -> PolicyLoss:
    """Sum over tokens of the single-step and long-term parts, and of each sequence's penalties times its tokens.

    With q and p at `temperature`, in the state before token y_t (MiniLLM, arXiv 2306.08543, eqs. 3 to 8):
    single step  state_weight_t sum_v q(v) (log q(v) - log p(v)), differentiated through q;
    long term    max(-x A, -clip(x, 1 - epsilon, 1 + epsilon) A), x = weight_t q(y_t) / exp(log_q_t), A the advantage.
    loss_sum is `scale` times the sum of all; the other sums are not scaled.

    hidden [N, D]: the student's states that predict the tokens. chunk_size: positions whose logits exist at a time;
    with penalties a whole sequence at least.
    """
    sequences = torch.repeat_interleave(torch.arange(len(drawn.counts)), torch.tensor(drawn.counts, dtype=torch.int64))
    chunks = even_chunks(len(hidden), chunk_size) if penalties is None else whole_sequences(drawn.counts, chunk_size)
    chunk_loss = partial(
        loss_of_tokens, drawn=drawn, sequences=sequences, temperature=temperature, clip_epsilon=clip_epsilon,
        penalties=penalties, scale=scale,
    )
    loss, sums = chunked_loss(
        hidden, head, chunks, chunk_loss, vocabulary=vocabulary, teacher=teacher, temperature=temperature,
        in_blocks=penalties is None,
    )
    return PolicyLoss(loss, *sums)


def whole_sequences(counts: list[int], chunk_size: int) -> list[slice]:
    """Chunks of whole sequences, of at most `chunk_size` positions or of one sequence."""
    chunks: list[slice] = []
    start = end = 0
    for count in counts:
        if end > start and end + count - start > chunk_size:
            chunks.append(slice(start, end))
            start = end
        end += count
    return [*chunks, slice(start, end)] if end > start else chunks


def loss_of_tokens(
    logits: Tensor, positions: slice, log_p: Tensor, needs_grad: bool, *, drawn: PolicyTokens, sequences: Tensor,
    temperature: float, clip_epsilon: float | None, penalties: Penalties | None, scale: float,
) -> tuple[Tensor, Tensor | None]:
    """(sums [8] as in PolicyLoss, gradient [n, V] of the loss by the logits or None) of one chunk."""
    log_q = torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), -1)
    q = log_q.exp()
    entropy = -torch.linalg.vecdot(q, log_q).sum()
    tokens, state_weights = drawn.tokens[positions], drawn.state_weights[positions]
    single_step, grad = reverse_terms(log_p, log_q, q)
    single_step = (single_step * state_weights).sum()
    long_term, slope, clipped = clipped_surrogate(
        log_q.gather(1, tokens[:, None])[:, 0] - drawn.log_q[positions], drawn.weights[positions],
        drawn.advantages[positions], clip_epsilon,
    )
    long_term = long_term.sum()
    weighted, penalty_sums, penalty_grad = penalty_terms(log_q, q, sequences[positions], penalties, needs_grad)
    sums = torch.stack([scale * (single_step + long_term + weighted), single_step, long_term, entropy, clipped.sum(),
                        *penalty_sums])
    if not needs_grad:
        return sums, None
    share = scale / temperature
    grad.mul_(share * state_weights[:, None]).addcmul_(q, slope[:, None], value=-share)
    grad[torch.arange(len(tokens), device=tokens.device), tokens] += share * slope
    return sums, grad if penalty_grad is None else grad.add_(penalty_grad, alpha=share)


def clipped_surrogate(
    log_ratio: Tensor, weights: Tensor, advantages: Tensor, clip_epsilon: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, their derivatives by log q, 1 where clipping stops the gradient), [n] each.

    log_ratio: log q now less log q when the token was sampled. clip_epsilon: None = no clipping.
    """
    ratio = (log_ratio.exp() * weights).clamp(max=torch.finfo(weights.dtype).max)  # inf times an advantage of 0 is NaN
    plain = -ratio * advantages
    if clip_epsilon is None:
        return plain, plain, torch.zeros_like(plain)
    bounded = -ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    clipped = bounded > plain
    return torch.maximum(plain, bounded), torch.where(clipped, 0, plain), clipped.to(plain.dtype)


def penalty_terms(
    log_q: Tensor, q: Tensor, sequences: Tensor, penalties: Penalties | None, needs_grad: bool
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """(weighted sum, sums of [frequency, diversity, entropy], gradient [n, V] by the logits or None) of one chunk."""
    zero = log_q.new_zeros(())
    if penalties is None or not len(log_q):
        return zero, [zero] * 3, None
    # Counted on the CPU: the number of sequences decides shapes, and asking the device for it would mean waiting.
    rows, counts = (to_device(values, log_q.device) for values in torch.unique_consecutive(
        sequences, return_inverse=True, return_counts=True)[1:])
    frequency, diversity, entropy, floor, embeddings = penalties
    measures: list[tuple[float, Callable[[Tensor], Tensor]]] = [
        (frequency, lambda leaf: frequency_penalty(leaf, rows, counts)),
        (diversity, lambda leaf: diversity_penalty(leaf, rows, counts, embeddings)),
        (entropy, lambda leaf: entropy_penalty(leaf, rows, counts, floor)),
    ]
    with torch.set_grad_enabled(needs_grad):
        leaf = log_q.detach().requires_grad_(needs_grad)
        sums = [(measure(leaf) * counts).sum() if weight else zero for weight, measure in measures]
        weighted = sum(weight * value for (weight, _), value in zip(measures, sums, strict=True))
    grad = None
    if needs_grad and weighted.requires_grad:
        slope = torch.autograd.grad(weighted, leaf)[0]
        grad = slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1)
    return weighted.detach(), [value.detach() for value in sums], grad
