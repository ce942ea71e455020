"""Divergence distillation against its formula in float64: model/teacher_student.py. The teacher: test_teacher.py."""

import copy

import pytest
import torch

from model.language_model import LanguageModel
from model.losses.vocabulary_loss import TeacherTopK
from model.teacher import Teacher
from model.teacher_student import TeacherStudent
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.model.test_divergences import FORMULAS
from tests.small_kd_runs import predicted_from, random_rows, randomised, tiny_teacher

ROWS = [(12, [8, 9, 10, 11]), (5, [4]), (9, [3, 4, 7])]


def student_network(**shape):
    return randomised(tiny_gpt2(**{"seed": 3, "std": 0.2, "layers": 2, **shape}))


def teacher_network(**shape):
    return randomised(tiny_teacher(**shape))


def objective_of(student, teacher, **options) -> TeacherStudent:
    models = [LanguageModel(network, byte_tokenizer()) for network in (student, teacher)]
    return TeacherStudent(models[0], Teacher(models[1]), **options)


def formula(teacher, student, batch, kl_div: str, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of cross-entropy and divergence over label tokens, from both models' own full logits in float64."""
    input_ids, mask, labels = batch
    with torch.no_grad():
        teacher_logits = teacher(input_ids, attention_mask=mask).logits
    student_logits = student(input_ids, attention_mask=mask).logits
    cross_entropy = divergence = 0
    for row, column in predicted_from(labels):
        z_t, z_s = teacher_logits[row, column], student_logits[row, column]
        cross_entropy = cross_entropy - torch.log(torch.softmax(z_s, 0)[labels[row, column + 1]])
        p, q = torch.softmax(z_t / temperature, 0), torch.softmax(z_s / temperature, 0)
        divergence = divergence + FORMULAS[kl_div](p, q)
    return cross_entropy, divergence


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def assert_near(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        error = (value.double() - theirs[name].double()).abs().max() / theirs[name].abs().max()
        assert error <= tolerance, name


@pytest.mark.parametrize(("kl_div", "temperature", "chunk_size"), [
    ("forward", 1.0, 3), ("forward", 2.0, 64), ("reverse", 2.0, 1), ("JS", 2.0, 8)])  # 8 label tokens
def test_loss_and_gradients_equal_the_formula(kl_div, temperature, chunk_size):
    """Fault: a swapped direction, a missing temperature^2, another weight, or a wrong gradient (cases A1, A2, A10)."""
    student, teacher = student_network(), teacher_network()
    batch = random_rows(ROWS, columns=2)
    reference = copy.deepcopy(student).double()
    cross_entropy, divergence = formula(copy.deepcopy(teacher).double(), reference, batch, kl_div, temperature)
    expected = 0.7 * cross_entropy + 0.3 * temperature**2 * divergence
    expected.backward()
    objective = objective_of(student, teacher, kl_div=kl_div, temperature=temperature, kd_weight=0.3,
                             chunk_size=chunk_size)
    terms = objective(*batch)
    terms.loss_sum.backward()
    assert terms.token_count == 8
    assert terms.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.parts["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert terms.parts["divergence"].item() == pytest.approx(divergence.item(), rel=1e-5)
    assert terms.parts.keys() == {"cross_entropy", "divergence"}
    assert not any(part.requires_grad for part in terms.parts.values())
    assert_near(gradients(student), gradients(reference), 1e-5)


def test_no_label_is_exactly_zero():
    """Fault: NaN, or a constant without a graph, where a batch has no label (case A11)."""
    student = student_network()
    terms = objective_of(student, teacher_network(), kl_div="JS")(*random_rows([(3, []), (5, [0])]))
    assert (terms.loss_sum.item(), terms.token_count) == (0.0, 0)
    assert [part.item() for part in terms.parts.values()] == [0.0, 0.0]
    terms.loss_sum.backward()
    assert all(value.grad is None or not value.grad.any() for value in student.parameters())


def test_bfloat16_is_near():
    """Fault: softmax or sums in bfloat16, or a teacher that does not compute in the precision of the run (A24)."""
    batch = random_rows(ROWS)
    networks = tiny_gpt2(seed=3, std=0.1), tiny_gpt2(seed=4, std=0.1, width=32, layers=2)
    entered = []

    def autocast():
        entered.append(1)
        return torch.autocast("cpu", torch.bfloat16)

    exact = objective_of(*networks)(*batch).loss_sum.item()
    models = [LanguageModel(network, byte_tokenizer()) for network in networks]
    objective = TeacherStudent(models[0], Teacher(models[1], autocast=autocast))
    with torch.autocast("cpu", torch.bfloat16):
        entered.clear()
        loss = objective(*batch).loss_sum
    loss.backward()
    assert entered == [1]
    assert loss.dtype == torch.float32 and loss.item() != exact
    assert loss.item() == pytest.approx(exact, rel=1e-2)
    assert {value.grad.dtype for value in objective.parameters()} == {torch.float32}


def test_stored_top_k_outputs_are_taken():
    """Fault: outputs that come from disk are ignored, or read at another temperature."""
    student, teacher = student_network(), teacher_network()
    batch = random_rows(ROWS)
    objective = objective_of(student, teacher, temperature=2.0)
    expected = objective(*batch).loss_sum
    with torch.no_grad():
        logits = teacher(batch[0], attention_mask=batch[1]).logits
    log_p = torch.stack([torch.log_softmax(logits[place] / 2.0, 0) for place in predicted_from(batch[2])])
    ids = log_p.argsort(-1, descending=True)[:, :256]
    top = log_p.gather(1, ids)
    stored = TeacherTopK(ids, top, torch.log1p(-top.double().exp().sum(-1)).float())
    assert objective(*batch, stored).loss_sum.item() == pytest.approx(expected.item(), rel=1e-4)
    shorter = TeacherTopK(ids[:, :5], top[:, :5], torch.log1p(-top[:, :5].double().exp().sum(-1)).float())
    found = objective(*batch, shorter).parts["divergence"].item()
    assert 0 < found < objective(*batch).parts["divergence"].item()


def test_numbers_reach_the_divergence():
    """Fault: beta, lambda or mu of the config is not that of the loss."""
    batch = random_rows(ROWS)
    for kl_div, key, values in (("generalized_js", "beta", (0.2, 0.7)), ("skew_forward", "lambda_", (0.1, 0.6)),
                                ("symmetric", "mu", (0.1, 0.8))):
        found = [objective_of(student_network(), teacher_network(), kl_div=kl_div, **{key: value})(*batch)
                 .parts["divergence"].item() for value in values]
        assert abs(found[0] - found[1]) > 0.05, kl_div
