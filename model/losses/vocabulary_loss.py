"""Cross-entropy and divergences straight from hidden states and head weights, in chunks over label positions.

Only [chunk_size, V] logits exist at a time, and the gradients are formed in the forward pass, while the chunk's logits
are there: one product for the student's logits and two for the gradients of its hidden states and head, one for the
teacher's logits. Nothing is computed twice, and memory does not depend on the number of positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.losses.divergences import FLOOR, Divergence
from model.losses.output_head import OutputHead, aligned_empty, autocast_type, cut_head, head_logits

BLOCK = 16  # positions whose terms are formed at a time on a CPU


class TeacherHidden(NamedTuple):
    """The teacher's hidden states [N, Dt] at the label positions, and its head."""

    hidden: Tensor
    head: OutputHead


class TeacherTopK(NamedTuple):
    """The teacher's k most likely tokens at each label position, at the temperature of the loss.

    ids [N, k] int64; log_probs [N, k]; log_rest [N]: log of the mass of all other tokens. The rest counts as one token:
    divergences that obey the data-processing inequality (all but "adaptive") are then bounded from below, and equal
    at k = V - 1.
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
    factor: float = 1.0,
    chunk_size: int = 128,
) -> VocabularyLoss:
    """factor times the sum over positions of (1 - kd_weight) CE(z, target) + kd_weight temperature^2 D(p, q).

    hidden [N, D]: the student's states that predict `targets` [N] int64, on one device with head and teacher.
    vocabulary: number of real tokens; later rows of either head are padding of the matrix and are left out of every
    softmax. None: what the head says. divergence: of `choose_divergence`; p and q are at `temperature`, CE at 1.
    chunk_size: positions whose logits exist at a time.

    Reductions are in float32 at least; under autocast the products are in its type. Gradients flow to hidden, weight
    and bias. N = 0 gives exactly 0 with zero gradients.

    Raises:
        ValueError: sizes that do not fit, or a number out of range.
    """
    if len(hidden) != len(targets):
        raise ValueError(f"{len(hidden)} hidden states but {len(targets)} targets: expected one each")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: expected at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a number greater than 0")
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight is {kd_weight}: expected a number from 0 to 1")
    if teacher is not None and len(teacher[0]) != len(hidden):
        raise ValueError(f"{len(teacher[0])} teacher positions but {len(hidden)} of the student: expected as many")
    rows = [len(each.weight) for each in (head, teacher.head if isinstance(teacher, TeacherHidden) else head)]
    vocabulary = head.vocabulary if vocabulary is None else vocabulary
    size = rows[0] if vocabulary is None else vocabulary
    if not 1 <= size <= min(rows):
        raise ValueError(f"vocabulary is {size}: expected a number from 1 to the rows of the heads, {min(rows)}")
    kd_weight = 0.0 if teacher is None else kd_weight
    terms = partial(label_terms, targets=targets, divergence=divergence, temperature=temperature, kd_weight=kd_weight,
                    factor=factor)
    loss_sum, sums = chunked_loss(
        hidden, head, even_parts(len(hidden), chunk_size), terms, vocabulary=size, teacher=teacher,
        temperature=temperature,
    )
    return VocabularyLoss(loss_sum, sums[0], None if teacher is None else sums[1])


# Of one chunk: (logits [n, V], which positions they are of, the teacher's log-probabilities [n, V] or top k or None,
# whether the gradient is wanted) -> (sums [k], the first of which is the loss; its gradient [n, V] by the logits).
ChunkTerms = Callable[[Tensor, slice, "Tensor | TeacherTopK | None", bool], tuple[Tensor, Tensor | None]]


def even_parts(count: int, chunk_size: int) -> list[slice]:
    return [slice(start, start + chunk_size) for start in range(0, count, chunk_size)]


def chunked_loss(
    hidden: Tensor,
    head: OutputHead,
    parts: list[slice],
    terms: ChunkTerms,
    *,
    vocabulary: int,
    teacher: TeacherHidden | TeacherTopK | None = None,
    temperature: float = 1.0,
    in_blocks: bool = True,
) -> tuple[Tensor, Tensor]:
    """(loss with a graph, the other sums [k - 1] detached) over chunks of the positions of hidden [N, D].

    parts: the chunks, which cover all positions in order; `terms` may change the logits that it is handed. The
    teacher's log-probabilities are at `temperature`. in_blocks: whether `terms` may be asked for a part of a chunk.
    Gradients flow to hidden, weight and bias of the head.
    """
    work = Work(head, parts, terms, vocabulary, teacher, temperature, torch.is_grad_enabled(), in_blocks)
    return ChunkedLoss.apply(hidden, head.weight, head.bias, work)


class Work(NamedTuple):
    """What `ChunkedLoss` does; all but the tensors that gradients flow to."""

    head: OutputHead
    parts: list[slice]
    terms: ChunkTerms
    size: int
    teacher: TeacherHidden | TeacherTopK | None
    temperature: float
    with_gradients: bool
    in_blocks: bool


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: Work):
        wanted = [work.with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        product_type = autocast_type(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = all_chunks(hidden, weight, bias, work, wanted, product_type)
        ctx.gradients = gradients
        loss, others = sums[0].clone(), sums[1:]
        ctx.mark_non_differentiable(others)
        return loss, others

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *unused):
        # Handed out, not kept: so a head's gradient, as large as its weight, is scaled and accumulated in its place.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a second backward pass through a chunked loss: its gradients are handed out once")
        # As a rule it is 1, which on a CPU costs nothing to ask; on another device asking would mean waiting.
        if grad_loss.device.type != "cpu" or grad_loss != 1:
            for each in gradients:
                if each is not None:
                    each.mul_(grad_loss)
        return *gradients, None


def all_chunks(hidden, weight, bias, work: Work, wanted: list[bool], product_type: torch.dtype):
    """(sums of the terms, gradients of hidden, weight and bias where wanted)."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    student_head = cut_head(work.head, work.size)
    student_head = student_head._replace(weight=student_head.weight.to(product_type))
    states = hidden.to(product_type)
    teacher = work.teacher
    if isinstance(teacher, TeacherHidden):
        teacher_head = cut_head(teacher.head, work.size)
        teacher_head = teacher_head._replace(weight=teacher_head.weight.to(product_type))
        teacher = TeacherHidden(teacher.hidden.to(product_type), teacher_head)
    gradients = [torch.empty_like(each) if want else None
                 for each, want in zip((hidden, weight, bias), wanted, strict=True)]
    for each in gradients[1:]:
        if each is not None:
            each[work.size if len(hidden) else 0 :].zero_()  # the rest is written by the first chunk
    # No position is one empty chunk, which says how many terms there are.
    sums = None
    for part in work.parts or [slice(0, 0)]:
        logits, slope = head_logits(states[part], student_head, precision, any(wanted))
        of_teacher = None if teacher is None else chunk_of_teacher(teacher, part, precision)
        values = chunk_terms(logits, of_teacher, part, work, any(wanted))
        sums = values if sums is None else sums + values
        if any(wanted) and len(logits):
            gradient = logits if slope is None else logits.mul_(slope)
            add_products(gradients, gradient, part, states, student_head.weight, product_type)
    return sums, gradients


def chunk_terms(logits: Tensor, of_teacher, part: slice, work: Work, with_gradient: bool) -> Tensor:
    """Sums of the terms of one chunk; logits [n, V] become the gradient where it is wanted.

    of_teacher: the teacher's logits [n, V], its top-k entries or None. On a CPU the terms are formed in blocks of a few
    positions, where that is allowed: their many temporaries are then small, and stay in its cache.
    """
    rows = BLOCK if work.in_blocks and logits.device.type == "cpu" else max(1, len(logits))
    sums = None
    for start in range(0, max(1, len(logits)), rows):
        block = slice(start, min(start + rows, len(logits)))
        if isinstance(of_teacher, TeacherTopK):
            log_p = TeacherTopK(*(each[block] for each in of_teacher))
        else:
            log_p = None if of_teacher is None else teacher_log_probs(of_teacher[block], work.temperature)
        positions = slice(part.start + block.start, part.start + block.stop)
        values, gradient = work.terms(logits[block], positions, log_p, with_gradient)
        sums = values if sums is None else sums + values
        if gradient is not None:
            logits[block] = gradient
    return sums


def chunk_of_teacher(teacher: TeacherHidden | TeacherTopK, part: slice, precision: torch.dtype):
    """Logits [n, V] of one chunk, or its top-k entries."""
    if isinstance(teacher, TeacherTopK):
        ids, log_probs, log_rest = (each[part] for each in teacher)
        return TeacherTopK(ids, log_probs.to(precision), log_rest.to(precision))
    return head_logits(teacher.hidden[part], teacher.head, precision, with_slope=False)[0]


def teacher_log_probs(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), -1)


def label_terms(
    logits: Tensor, part: slice, of_teacher, with_gradient: bool, *, targets: Tensor, divergence: Divergence | None,
    temperature: float, kd_weight: float, factor: float,
):
    """(sums [3] of loss, cross-entropy and divergence, gradient [n, V] of the loss by the student's logits or None)."""
    targets, label_share, kd_share = targets[part], factor * (1 - kd_weight), factor * kd_weight
    log_q = torch.log_softmax(logits, -1)
    cross_entropy = -log_q.gather(1, targets[:, None]).sum()
    if of_teacher is None:
        values, gradient, q = logits.new_zeros(()), None, log_q.exp() if with_gradient else None
    else:
        soft = log_q if temperature == 1.0 else torch.log_softmax(logits.div_(temperature), -1)
        soft_q = soft.exp()
        if isinstance(of_teacher, TeacherTopK):
            values, gradient = top_k_terms(of_teacher, soft, divergence)
        else:
            values, gradient = divergence(of_teacher, soft, soft_q)
        values = values.sum()
        if with_gradient:
            gradient *= kd_share * temperature  # temperature^2, and 1 / temperature of the softmax
            q = soft_q if temperature == 1.0 else log_q.exp_()
    loss = label_share * cross_entropy + kd_share * temperature**2 * values
    sums = torch.stack([loss, cross_entropy, values])
    if not with_gradient:
        return sums, None
    if gradient is None:
        gradient = q if label_share == 1 else q.mul_(label_share)
    else:
        gradient.add_(q, alpha=label_share)
    gradient[torch.arange(len(targets), device=targets.device), targets] -= label_share
    return sums, gradient


def top_k_terms(top: TeacherTopK, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Divergence [n] and gradient [n, V] where the tokens that are not among the top k count as one.

    For a token of the rest the gradient is that of the rest, in the token's share of it.
    """
    rest = log_q.scatter(1, top.ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q_k = torch.cat([log_q.gather(1, top.ids), rest], 1).clamp(min=FLOOR)
    log_p_k = torch.cat([top.log_probs, top.log_rest[:, None]], 1).clamp(min=FLOOR)
    values, gradient_k = divergence(log_p_k, log_q_k, log_q_k.exp())
    gradient = (log_q - rest).exp_().mul_(gradient_k[:, -1:])
    return values, gradient.scatter_(1, top.ids, gradient_k[:, :-1])


def top_k_of(log_p: Tensor, k: int) -> TeacherTopK:
    """The k best of log-probabilities [N, V] and the log of the remaining mass (k is cut to V)."""
    best = log_p.topk(min(k, log_p.shape[1]), -1)
    return TeacherTopK(best.indices, best.values, log_p.scatter(1, best.indices, -torch.inf).logsumexp(-1))


def add_products(gradients: list, gradient: Tensor, part: slice, states: Tensor, rows: Tensor, product_type) -> None:
    """One chunk's share of the gradients of hidden states, head weight and bias; the first chunk's overwrites."""
    of_hidden, of_weight, of_bias = gradients
    first = part.start == 0
    if of_bias is not None:
        of_bias = of_bias[: len(rows)]
        torch.sum(gradient, 0, out=of_bias) if first else of_bias.add_(gradient.sum(0))
    if product_type != gradient.dtype:
        gradient = aligned_empty(*gradient.shape, like=rows).copy_(gradient)
    if of_hidden is not None:
        of_hidden[part] = gradient @ rows
    if of_weight is not None:
        of_weight = of_weight[: len(rows)]
        if product_type != of_weight.dtype:  # autocast: summed in the weight's own type
            share = gradient.T @ states[part]
            of_weight.copy_(share) if first else of_weight.add_(share)
        elif first:
            torch.mm(gradient.T, states[part], out=of_weight)
        else:
            of_weight.addmm_(gradient.T, states[part])
