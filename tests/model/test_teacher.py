"""A teacher that is only read, works one batch ahead and has its student's vocabulary: model/teacher.py."""

from copy import deepcopy
from functools import partial

import pytest
import torch

from model.language_model import LanguageModel
from model.teacher import Teacher
from model.teacher_student import TeacherStudent
from tests.conftest import byte_tokenizer
from tests.model.test_families import FAMILIES, tiny_family
from tests.model.test_teacher_student import (
    ROWS,
    assert_near,
    gradients,
    objective_of,
    student_network,
    teacher_network,
)
from tests.small_kd_runs import random_rows

PARTS = ("input_ids", "attention_mask", "labels")


# -- the teacher is only read ------------------------------------------------------------------------------------


def test_teacher_is_frozen_and_in_eval_mode():
    """Fault: the teacher is trained, saved, or computes with dropout (case A19)."""
    student, teacher = student_network(dropout=0.1), teacher_network(dropout=0.1)
    objective = objective_of(student, teacher)
    own = {f"language_model.model.{name}" for name, _ in student.named_parameters()}
    assert {name for name, _ in objective.named_parameters()} == own
    assert not any("teacher" in name for name in objective.state_dict())
    objective.eval()
    objective.train()
    assert all(part.training for part in objective.modules())
    assert not any(part.training for part in teacher.modules())
    assert not any(value.requires_grad for value in teacher.parameters())
    batch = random_rows([(20, [18, 19])])
    first, second = (objective.teacher.outputs(*batch) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert not first.hidden.requires_grad and not first.head.weight.requires_grad
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.1)
    objective(*batch).loss_sum.backward()
    optimizer.step()
    assert all(value.grad is None for value in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(part.training for part in student.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_cast_once_give_what_autocast_gives(family):
    """Fault: the teacher's products run in bfloat16 on weights that are cast again in each step, or its embedding and
    norms are rounded with them."""
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    batch = random_rows([(20, [17, 18, 19]), (12, [10, 11])])
    plain = tiny_family(family).eval()
    teacher = Teacher(deepcopy(plain), autocast=bfloat16)
    with torch.no_grad(), bfloat16():
        expected = plain.label_hidden(*batch)[0]
    hidden, head = teacher.outputs(*batch)
    assert torch.equal(hidden, expected)
    assert torch.equal(head.weight, plain.output_head().weight.to(torch.bfloat16))
    types = {name: value.dtype for name, value in teacher.language_model.model.base_model.named_parameters()}
    rounded = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert rounded and not any(part in name for name in rounded for part in ("norm", "ln_", "wte", "wpe", "embed"))


# -- one batch ahead ---------------------------------------------------------------------------------------------


def test_next_batch_is_started_before_this_one_is_handed_out():
    """Fault: the teacher waits for the student, a copy waits behind the next batch, or a batch is lost or exchanged."""
    events = []

    class NotedTeacher(Teacher):
        def hidden(self, input_ids, *others):
            events.append(f"start {input_ids[0, 0]}")
            return super().hidden(input_ids, *others)

        def to_student(self, hidden):
            events.append("finish")
            return super().to_student(hidden)

    teacher = NotedTeacher(LanguageModel(teacher_network(), byte_tokenizer()))
    assert list(teacher.iter_steps(None, [])) == []
    batches = [random_rows(ROWS, seed) for seed in range(3)]
    for number, (ids, _, _) in enumerate(batches):
        ids[0, 0] = number
    for (*batch, outputs), expected in zip(teacher.iter_steps(None, dicts(batches)), batches, strict=True):
        events.append(f"got {batch[0][0, 0]}")
        assert all(map(torch.equal, batch, expected))
        assert torch.equal(outputs.hidden, Teacher.hidden(teacher, *expected))
    assert events == ["start 0", "finish", "start 1", "got 0", "finish", "start 2", "got 1", "finish", "got 2"]


def dicts(batches) -> list[dict]:
    return [dict(zip(PARTS, batch, strict=True)) for batch in batches]


def test_outputs_go_to_the_student_s_device():
    """Fault: states or head stay on the teacher's device, or the head is copied for each batch."""
    model = LanguageModel(teacher_network(), byte_tokenizer())
    teacher = Teacher(model, "meta")
    batch = random_rows(ROWS)
    assert teacher.hidden(*batch).device.type == "cpu"
    outputs = [teacher.outputs(*batch), next(iter(teacher.iter_steps(None, dicts([batch]))))[3]]
    for output in outputs:
        assert output.hidden.device.type == output.head.weight.device.type == "meta"
        assert output.hidden.shape == (8, 32)
    assert outputs[0].head.weight is outputs[1].head.weight is teacher.head.weight
    assert Teacher(model).student_device.type == "cpu"


# -- vocabularies ------------------------------------------------------------------------------------------------


def with_more_rows(network, tokens: int = 260):
    """The network with rows in its embedding that belong to no token, and would win every softmax."""
    rows = network.transformer.wte.weight.detach().clone()
    network.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        network.transformer.wte.weight[:257] = rows
        network.transformer.wte.weight[257:] = 9.0
    return network


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(260, 257), (257, 260), (259, 260)])
def test_padding_of_the_embedding_is_left_out(teacher_rows, student_rows):
    """Fault: rows that pad the embedding's matrix take probability, or mass is lost by cutting too late (case A7)."""
    batch = random_rows(ROWS)
    results = []
    for sizes in ((257, 257), (teacher_rows, student_rows)):
        teacher, student = (with_more_rows(network, rows) for network, rows in
                            zip((teacher_network(), student_network()), sizes, strict=True))
        terms = objective_of(student, teacher)(*batch)
        terms.loss_sum.backward()
        results.append((terms.loss_sum.item(), gradients(student)))
    (expected, theirs), (found, ours) = results
    assert found == pytest.approx(expected, rel=1e-6)
    embedding = "transformer.wte.weight"
    assert not ours[embedding][257:].any()
    assert_near({**ours, embedding: ours[embedding][:257]}, theirs, 1e-6)


def test_pad_token_added_to_one_side():
    """Fault: a [PAD] that old scripts added makes equal vocabularies differ, or takes part (cases A7, A13)."""
    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    batch = random_rows(ROWS)
    plain = objective_of(student_network(), teacher_network())(*batch).loss_sum.item()
    teacher = LanguageModel(with_more_rows(teacher_network(), 258), padded)
    objective = TeacherStudent(LanguageModel(student_network(), byte_tokenizer()), Teacher(teacher))
    assert objective.vocabulary == 257
    assert objective(*batch).loss_sum.item() == pytest.approx(plain, rel=1e-6)
