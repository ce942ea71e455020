"""Cross-entropy and divergences straight from hidden states and head weights, in chunks over label positions.

Only [chunk_size, V] logits exist at a time. The gradients are computed in the forward pass, while a chunk's logits are
there: one product for the student's logits, two for the gradients of its hidden states and head, one for the teacher's
logits. Nothing is computed twice, and memory does not depend on the number of positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.losses.divergences import FLOOR, Divergence
from model.losses.output_head import OutputHead, aligned_empty, autocast_type, cut_head, head_logits

BLOCK = 16  # positions whose losses are computed at a time on a CPU


class TeacherHidden(NamedTuple):
    """The teacher's hidden states [N, Dt] at the label positions, and its head."""

    hidden: Tensor
    head: OutputHead


class TeacherTopK(NamedTuple):
    """The teacher's k most likely tokens at each label position, at the temperature of the loss.

    ids [N, k] int64; log_probs [N, k]; log_rest [N]: log of the mass of all other tokens. The rest counts as one token:
    for divergences that obey the data-processing inequality (all but "adaptive") the result is a lower bound, exact at
    k = V - 1.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor


class VocabularyLoss(NamedTuple):
    """loss_sum: scalar with a graph. cross_entropy, divergence: detached sums over positions, in nats."""

    loss_sum: Tensor
    cross_entropy: Tensor
    divergence: Tensor | None


def vocabulary_loss(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    *,
    vocabulary: int | None = None,
    teacher: TeacherHidden | TeacherTopK | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    kd_weight: float = 0.0,
    scale: float = 1.0,
    chunk_size: int = 128,
) -> VocabularyLoss:
    """scale times the sum over positions of (1 - kd_weight) CE(z, target) + kd_weight temperature^2 D(p, q).

    hidden [N, D]: the student's states that predict `targets` [N] int64, on one device with head and teacher.
    vocabulary: number of real tokens; later rows of either head are padding of the matrix and excluded from every
    softmax. None: the head's. divergence: of `choose_divergence`; p and q are at `temperature`, CE at 1. Without a
    teacher kd_weight counts as 0. chunk_size: positions whose logits exist at a time.

    Reductions are in float32 at least; under autocast the products are in its type. Gradients flow to hidden, weight
    and bias. N = 0 gives exactly 0 with zero gradients.
    """
    chunk_loss = partial(label_loss, targets=targets, divergence=divergence, temperature=temperature,
                         kd_weight=0.0 if teacher is None else kd_weight, scale=scale)
    loss_sum, sums = chunked_loss(
        hidden, head, even_chunks(len(hidden), chunk_size), chunk_loss, vocabulary=vocabulary, teacher=teacher,
        temperature=temperature,
    )
    return VocabularyLoss(loss_sum, sums[0], None if teacher is None else sums[1])


# (logits [n, V], their positions, the teacher's log-probabilities [n, V] or top k or None, whether the gradient is
# needed) -> (sums [k], the first of which is the loss; its gradient [n, V] with respect to the logits, or None)
ChunkLoss = Callable[[Tensor, slice, "Tensor | TeacherTopK | None", bool], tuple[Tensor, Tensor | None]]


def even_chunks(count: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, count, chunk_size)]


def chunked_loss(
    hidden: Tensor,
    head: OutputHead,
    chunks: list[slice],
    chunk_loss: ChunkLoss,
    *,
    vocabulary: int | None = None,
    teacher: TeacherHidden | TeacherTopK | None = None,
    temperature: float = 1.0,
    in_blocks: bool = True,
) -> tuple[Tensor, Tensor]:
    """(loss with a graph, the other sums [k - 1] detached) over chunks of the positions of hidden [N, D].

    chunks: cover all positions in order. chunk_loss: may overwrite the logits that it gets. The teacher's
    log-probabilities are at `temperature`. in_blocks: whether `chunk_loss` may be called with a part of a chunk.
    Gradients flow to hidden, weight and bias of the head.
    """
    inputs = (hidden, head.weight, head.bias)
    grads = [torch.empty_like(value) if torch.is_grad_enabled() and value is not None and value.requires_grad else None
             for value in inputs]
    needs_grad = any(grad is not None for grad in grads)
    product_type, precision = autocast_type(hidden), torch.promote_types(hidden.dtype, torch.float32)
    block_size = BLOCK if in_blocks and hidden.device.type == "cpu" else None
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head, states = cut_head(head, vocabulary, product_type), hidden.to(product_type)
        if isinstance(teacher, TeacherHidden):
            teacher = TeacherHidden(teacher.hidden.to(product_type), cut_head(teacher.head, vocabulary, product_type))
        for grad in grads[1:]:
            if grad is not None:
                grad[len(head.weight) if len(hidden) else 0 :].zero_()  # the first chunk writes the other rows
        sums = 0
        for chunk in chunks or [slice(0, 0)]:  # an empty chunk tells how many sums there are
            logits, slope = head_logits(states[chunk], head, precision, needs_grad)
            sums = sums + loss_of_chunk(logits, chunk, chunk_loss, teacher, temperature, block_size, needs_grad)
            if needs_grad and len(logits):
                accumulate(grads, logits if slope is None else logits.mul_(slope), chunk, states, head.weight)
    return WithGradients.apply(sums[0], grads, *inputs), sums[1:]


class WithGradients(torch.autograd.Function):
    """A loss whose gradients with respect to its inputs are there already."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor | None], *inputs: Tensor | None):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        # Drop our reference, so that autograd can accumulate the head's gradient in place.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("a second backward pass through a chunked loss: its gradients can be used only once")
        # It is nearly always 1. On a CPU comparing costs nothing; on another device it would mean waiting.
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss)
        return None, None, *grads


def loss_of_chunk(
    logits: Tensor, chunk: slice, chunk_loss: ChunkLoss, teacher: TeacherHidden | TeacherTopK | None,
    temperature: float, block_size: int | None, needs_grad: bool,
) -> Tensor:
    """Sums of one chunk; its logits [n, V] are overwritten by their gradient if that is needed.

    block_size: positions whose losses are computed at a time, None = all. On a CPU small blocks are faster: their many
    temporaries stay in its cache.
    """
    if isinstance(teacher, TeacherHidden):
        teacher_logits = head_logits(teacher.hidden[chunk], teacher.head, logits.dtype, with_slope=False)[0]
    count, sums = max(1, len(logits)), 0
    for start in range(0, count, block_size or count):
        block = slice(start, min(start + (block_size or count), len(logits)))
        positions = slice(chunk.start + block.start, chunk.start + block.stop)
        log_p = None
        if isinstance(teacher, TeacherTopK):
            ids, *logs = (values[positions] for values in teacher)
            log_p = TeacherTopK(ids, *(values.to(logits.dtype) for values in logs))
        elif teacher is not None:
            own = teacher_logits[block]
            log_p = torch.log_softmax(own if temperature == 1.0 else own.div_(temperature), -1)
        block_sums, grad = chunk_loss(logits[block], positions, log_p, needs_grad)
        sums = sums + block_sums
        if grad is not None:
            logits[block] = grad
    return sums


def accumulate(grads: list[Tensor | None], grad_logits: Tensor, chunk: slice, states: Tensor, rows: Tensor) -> None:
    """Adds one chunk's share to the gradients of hidden states, head weight and bias; the first chunk overwrites.

    rows [V, D]: of the head, in the type of the products.
    """
    grad_hidden, grad_weight, grad_bias = grads
    first = chunk.start == 0
    if grad_bias is not None:
        grad_bias = grad_bias[: len(rows)]
        torch.sum(grad_logits, 0, out=grad_bias) if first else grad_bias.add_(grad_logits.sum(0))
    if rows.dtype != grad_logits.dtype:
        grad_logits = aligned_empty(*grad_logits.shape, like=rows).copy_(grad_logits)
    if grad_hidden is not None:
        grad_hidden[chunk] = grad_logits @ rows
    if grad_weight is not None:
        grad_weight = grad_weight[: len(rows)]
        if rows.dtype != grad_weight.dtype:  # autocast: summed in the weight's own type
            share = grad_logits.T @ states[chunk]
            grad_weight.copy_(share) if first else grad_weight.add_(share)
        elif first:
            torch.mm(grad_logits.T, states[chunk], out=grad_weight)
        else:
            grad_weight.addmm_(grad_logits.T, states[chunk])


def label_loss(
    logits: Tensor, positions: slice, teacher: Tensor | TeacherTopK | None, needs_grad: bool, *, targets: Tensor,
    divergence: Divergence | None, temperature: float, kd_weight: float, scale: float,
) -> tuple[Tensor, Tensor | None]:
    """(sums [3] of loss, cross-entropy and divergence; gradient [n, V] of the loss by the student's logits or None)."""
    targets, label_share, kd_share = targets[positions], scale * (1 - kd_weight), scale * kd_weight
    log_q = torch.log_softmax(logits, -1)
    cross_entropy = -log_q.gather(1, targets[:, None]).sum()
    if teacher is None:
        values, grad, q = logits.new_zeros(()), None, log_q.exp() if needs_grad else None
    else:
        soft = log_q if temperature == 1.0 else torch.log_softmax(logits.div_(temperature), -1)
        soft_q = soft.exp()
        if isinstance(teacher, TeacherTopK):
            values, grad = top_k_terms(teacher, soft, divergence)
        else:
            values, grad = divergence(teacher, soft, soft_q)
        values = values.sum()
        if needs_grad:
            grad *= kd_share * temperature  # temperature^2, and 1 / temperature of the softmax
            q = soft_q if temperature == 1.0 else log_q.exp_()
    loss = label_share * cross_entropy + kd_share * temperature**2 * values
    sums = torch.stack([loss, cross_entropy, values])
    if not needs_grad:
        return sums, None
    if grad is None:
        grad = q if label_share == 1 else q.mul_(label_share)
    else:
        grad.add_(q, alpha=label_share)
    grad[torch.arange(len(targets), device=targets.device), targets] -= label_share
    return sums, grad


def top_k_terms(top: TeacherTopK, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence [n] and gradient [n, V], the tokens that are not among the top k counted as one.

    The gradient of that one is divided among its tokens by their shares of it.
    """
    rest = log_q.scatter(1, top.ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q_k = torch.cat([log_q.gather(1, top.ids), rest], 1).clamp(min=FLOOR)
    log_p_k = torch.cat([top.log_probs, top.log_rest[:, None]], 1).clamp(min=FLOOR)
    values, gradient_k = divergence(log_p_k, log_q_k, log_q_k.exp())
    gradient = (log_q - rest).exp_().mul_(gradient_k[:, -1:])
    return values, gradient.scatter_(1, top.ids, gradient_k[:, :-1])


def top_k_of(log_p: Tensor, k: int) -> TeacherTopK:
    """The k best of log-probabilities [N, V] and the log of the remaining mass (at most V)."""
    best = log_p.topk(min(k, log_p.shape[1]), -1)
    return TeacherTopK(best.indices, best.values, log_p.scatter(1, best.indices, -torch.inf).logsumexp(-1))
