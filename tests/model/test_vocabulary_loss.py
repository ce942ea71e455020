"""The chunked loss from hidden states against full logits and autograd: model/losses/vocabulary_loss.py."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.losses.divergences import choose_divergence
from model.losses.output_head import OutputHead
from model.losses.vocabulary_loss import TeacherHidden, top_k_of, vocabulary_loss
from tests.model.test_divergences import FORMULAS, NAMES, NUMBERS

N, V = 37, 13  # positions: more than two blocks, no multiple of 7; real tokens
DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-5)]


def random_inputs(dtype=torch.float64, positions=N, vocabulary=V, padding=(3, 1), bias=True, scale_and_cap=((), ())):
    """(hidden, head, targets, teacher): random, of different widths, with rows of padding in both heads.

    All that could take a gradient, the teacher's parts too, is marked so.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    sides = []
    for width, padding_rows, transform in zip((5, 7), padding, scale_and_cap, strict=True):
        rows = vocabulary + padding_rows
        sides.append((draw(positions, width), OutputHead(draw(rows, width), draw(rows) if bias else None, *transform)))
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    return *sides[0], targets, TeacherHidden(*sides[1])


def leaves_of(hidden, head):
    return [part for part in (hidden, head.weight, head.bias) if part is not None]


def full_logits(hidden, head, vocabulary=V, products=torch.float64):
    logits = (hidden.to(products) @ head.weight.to(products).T).double()
    logits = logits if head.bias is None else logits + head.bias.double()
    logits = logits * head.scale if head.cap is None else head.cap * torch.tanh(logits * head.scale / head.cap)
    return logits[:, :vocabulary]


def plain_cross_entropy(hidden, head, targets, *given):
    q = torch.softmax(full_logits(hidden, head, *given), -1)
    return -sum(torch.log(q[position, target]) for position, target in enumerate(targets.tolist()))


def distributions(hidden, head, teacher, temperature=1.0, *given):
    logits = full_logits(*teacher, *given).detach(), full_logits(hidden, head, *given)
    return [torch.softmax(part / temperature, -1) for part in logits]


def divergence_called(name):
    return choose_divergence(name, **NUMBERS.get(name, {}))


def check_equal(loss, expected, leaves, tolerance):
    """The two losses and their gradients by `leaves`, relative to the largest entry; expected keeps its graph."""
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for leaf, ours, theirs in zip(leaves, torch.autograd.grad(loss, leaves),
                                  torch.autograd.grad(expected, leaves, retain_graph=True), strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


class Tensors(TorchDispatchMode):
    """The shapes of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.shapes |= {part.shape for part in tree_leaves(result) if isinstance(part, torch.Tensor)}
        return result


@pytest.mark.parametrize(("temperature", "dtype", "tolerance"), [
    (1.0, *DTYPES[0]), (2.0, *DTYPES[0]), (2.0, *DTYPES[1])])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_full_logits(name, temperature, dtype, tolerance):
    """Fault: A chunk is lost or counted twice, a weight or T^2 is missing, or padding rows take part."""
    hidden, head, targets, teacher = random_inputs(dtype)
    leaves = leaves_of(hidden, head)
    cross_entropy = plain_cross_entropy(hidden, head, targets)
    divergence = FORMULAS[name](*distributions(hidden, head, teacher, temperature)).sum()
    for kd_weight, chunk_size in ((0.0, 7), (0.3, 1), (0.3, 7), (0.3, N), (0.3, N + 5), (1.0, 7)):
        expected = (1 - kd_weight) * cross_entropy + kd_weight * temperature**2 * divergence
        loss = vocabulary_loss(hidden, head, targets, vocabulary=V, teacher=teacher, temperature=temperature,
                               divergence=divergence_called(name), kd_weight=kd_weight, chunk_size=chunk_size)
        assert loss.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=tolerance)
        assert loss.divergence.item() == pytest.approx(divergence.item(), rel=tolerance)
        assert not loss.cross_entropy.requires_grad and not loss.divergence.requires_grad
        check_equal(loss.loss_sum, expected, leaves, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("transforms", [((0.5,), (2.0,)), ((1.0, 3.0), (1.0, 5.0)), ((0.7, 2.0), ()), ((), (0.1, 1.0))])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_and_cap(transforms, bias, dtype, tolerance):
    """Fault: A family's factor or cap of logits is left out of values or gradients, or is the other model's."""
    hidden, head, targets, teacher = random_inputs(dtype, bias=bias, scale_and_cap=transforms)
    divergence = FORMULAS["reverse"](*distributions(hidden, head, teacher, 2.0)).sum()
    loss = vocabulary_loss(hidden, head, targets, vocabulary=V, teacher=teacher, temperature=2.0, chunk_size=7,
                           divergence=divergence_called("reverse"), kd_weight=0.3).loss_sum
    expected = 0.7 * plain_cross_entropy(hidden, head, targets) + 0.3 * 4 * divergence
    check_equal(loss, expected, leaves_of(hidden, head), tolerance)


@pytest.mark.parametrize("kd_weight", [0.0, 0.6])
def test_without_a_teacher(kd_weight):
    """Fault: Cross-entropy loses the share of a divergence that does not exist; or rows are cut unasked."""
    hidden, head, targets, _ = random_inputs()
    loss = vocabulary_loss(hidden, head, targets, kd_weight=kd_weight, temperature=2.0, chunk_size=7)
    assert loss.divergence is None
    check_equal(loss.loss_sum, plain_cross_entropy(hidden, head, targets, V + 3), leaves_of(hidden, head), 1e-11)


@pytest.mark.parametrize("kind", ["none", "hidden", "top_k"])
def test_no_position(kind):
    """Fault: A batch without labels gives NaN, or a constant whose backward pass fails (A11)."""
    hidden, head, targets, teacher = random_inputs(positions=0)
    top = top_k_of(torch.zeros(0, V), 3)
    loss = vocabulary_loss(hidden, head, targets, teacher={"none": None, "hidden": teacher, "top_k": top}[kind],
                           vocabulary=V, divergence=divergence_called("JS"), kd_weight=0.5).loss_sum
    assert loss.item() == 0
    loss.backward()
    assert not any(leaf.grad.any() for leaf in leaves_of(hidden, head))


def test_no_graph_under_no_grad():
    """Fault: Evaluation keeps a graph, forms gradients, or computes something else."""
    hidden, head, targets, teacher = random_inputs(padding=(2, 1))  # no shape is another's
    given = {"vocabulary": V, "teacher": teacher, "divergence": divergence_called("JS"), "kd_weight": 0.5}
    with torch.no_grad(), Tensors() as made:
        loss = vocabulary_loss(hidden, head, targets, **given).loss_sum
    assert not loss.requires_grad and head.weight.shape not in made.shapes  # no gradient either
    assert loss.item() == pytest.approx(vocabulary_loss(hidden, head, targets, **given).loss_sum.item(), rel=1e-14)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_frozen_parts(trained):
    """Fault: A gradient lands at another argument, or at a frozen one, where only some take one."""
    hidden, head, targets, _ = random_inputs(padding=(0, 0))
    leaves = leaves_of(hidden, head)
    expected = torch.autograd.grad(plain_cross_entropy(hidden, head, targets), leaves)[trained]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index == trained)
    vocabulary_loss(hidden, head, targets).loss_sum.backward()
    torch.testing.assert_close(leaves[trained].grad, expected, rtol=1e-11, atol=1e-12)
    assert sum(leaf.grad is not None for leaf in leaves) == 1


def test_factor_and_accumulation():
    """Fault: Gradients ignore what follows the loss, or a second micro-batch replaces the first one's."""
    hidden, head, targets, teacher = random_inputs()
    given = {"vocabulary": V, "teacher": teacher, "divergence": divergence_called("JS"), "kd_weight": 0.5}
    leaves = leaves_of(hidden, head)
    once = torch.autograd.grad(vocabulary_loss(hidden, head, targets, **given).loss_sum, leaves)
    for factor in (3.0, -0.25):
        (factor * vocabulary_loss(hidden, head, targets, **given).loss_sum).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2.75 * gradient, rtol=1e-12, atol=1e-14)
    assert not any(leaf.grad is not None for leaf in leaves_of(*teacher))  # the teacher is a constant


def bucketed(probabilities, ids):
    """[N, k + 1]: the probabilities of the ids, and that of all other tokens together."""
    named = probabilities.gather(1, ids)
    return torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("k", [1, 3, V - 1, V, V + 2])
@pytest.mark.parametrize("name", NAMES)
def test_top_k(name, k, dtype, tolerance):
    """Fault: The rest is left out or spread, another temperature is used, or k = V - 1 differs from all tokens."""
    hidden, head, targets, teacher = random_inputs(dtype)
    p, q = distributions(hidden, head, teacher, 2.0)
    ids = p.argsort(-1, descending=True)[:, :k]
    pair = (p, q) if k >= V - 1 else (bucketed(p, ids), bucketed(q, ids))
    expected = 0.7 * plain_cross_entropy(hidden, head, targets) + 0.3 * 4 * FORMULAS[name](*pair).sum()
    loss = vocabulary_loss(hidden, head, targets, vocabulary=V, teacher=top_k_of(p.log().to(dtype), k), chunk_size=7,
                           divergence=divergence_called(name), temperature=2.0, kd_weight=0.3).loss_sum
    check_equal(loss, expected, leaves_of(hidden, head), tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast(name):
    """Fault: More than the products is in bfloat16 under autocast (A24); gradients change their type."""
    hidden, head, targets, teacher = random_inputs(torch.float32, positions=64, vocabulary=200)
    given = {"vocabulary": 200, "teacher": teacher, "divergence": divergence_called(name), "kd_weight": 0.5}
    exact = vocabulary_loss(hidden, head, targets, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vocabulary_loss(hidden, head, targets, chunk_size=10, **given)
    assert all(part.dtype == torch.float32 for part in loss)
    assert [part.item() for part in loss] == pytest.approx([part.item() for part in exact], rel=1e-2)
    of_rounded = 200, torch.bfloat16
    divergence = FORMULAS[name](*distributions(hidden, head, teacher, 1.0, *of_rounded)).sum().item()
    assert loss.divergence.item() == pytest.approx(divergence, rel=1e-5)
    cross_entropy = plain_cross_entropy(hidden, head, targets, *of_rounded).item()
    assert loss.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-5)
    leaves = leaves_of(hidden, head)
    for ours, theirs in zip(*(torch.autograd.grad(part.loss_sum, leaves) for part in (loss, exact)), strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("kind", ["none", "hidden", "top_k"])
@pytest.mark.parametrize("name", NAMES)
def test_full_logits_never_exist(name, kind):
    """Fault: More than chunk_size rows of logits exist in the forward or the backward pass (A24, memory)."""
    hidden, head, targets, teacher = random_inputs(positions=60, vocabulary=211, padding=(0, 0))
    log_p = torch.log_softmax(full_logits(*teacher, 211).detach(), -1)
    of_teacher = {"none": None, "hidden": teacher, "top_k": top_k_of(log_p, 20)}[kind]
    with Tensors() as made:  # the weights have 211 * 5 and 211 * 7 elements, the hidden states 60 * 7
        vocabulary_loss(hidden, head, targets, teacher=of_teacher, divergence=divergence_called(name), kd_weight=0.5,
                        temperature=2.0, chunk_size=8).loss_sum.backward()
    assert max(shape.numel() for shape in made.shapes) == 8 * 211


@pytest.mark.parametrize("faulty", ["student", "teacher"])
def test_nan_stays_visible(faulty):
    """Fault: A NaN is repaired, so that a run which went wrong looks successful (A5, A11)."""
    hidden, head, targets, teacher = random_inputs()
    with torch.no_grad():
        (hidden if faulty == "student" else teacher.hidden)[3, 0] = math.nan
    loss = vocabulary_loss(hidden, head, targets, vocabulary=V, teacher=teacher, divergence=divergence_called("JS"),
                           kd_weight=0.5, chunk_size=7).loss_sum
    assert loss.isnan()


def test_second_backward_is_refused():
    """Fault: gradients that autograd has modified in place are used again."""
    hidden, weight = torch.randn(3, 6, requires_grad=True), torch.randn(30, 6)
    loss = vocabulary_loss(hidden, OutputHead(weight), torch.tensor([1, 2, 3])).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


@pytest.mark.parametrize("vocabulary", [0, -5, V + 10**6])
def test_a_wrong_vocabulary_is_refused(vocabulary):
    """Fault: a plausible loss over other tokens than those of the models."""
    hidden, head, targets, teacher = random_inputs(torch.float64)
    with pytest.raises(ValueError, match=f"vocabulary is {vocabulary}: expected a number from 1 to the rows"):
        vocabulary_loss(hidden, head, targets, vocabulary=vocabulary, teacher=teacher,
                        divergence=divergence_called("JS"))
