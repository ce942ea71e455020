"""Models and losses on a CUDA GPU against float64 on the CPU; the scripts: test_cuda_runs.py, test_cuda_memory.py.

TESTS_CUDA_ON=cpu runs here on the CPU what can run there, to try the tests themselves.
"""

import copy
import os
import traceback
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.decoding.loop import greedy_decode
from model.decoding.rollout_buffer import RolloutBuffer
from model.decoding.rollouts import RolloutConfig
from model.decoding.sampling import SamplingOptions
from model.fine_tuning import FineTuning
from model.language_model import LanguageModel
from model.losses.output_head import OutputHead
from model.losses.vocabulary_loss import TeacherHidden, TeacherTopK, top_k_of, vocabulary_loss
from model.teacher import Teacher
from model.teacher_student import TeacherStudent
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.model import test_fine_tuning, test_policy_gradient, test_teacher_student
from tests.model.test_decoding import ending_model, generated, random_prompts
from tests.model.test_divergences import FORMULAS, NAMES
from tests.model.test_packed_forward import BATCHES, SWITCHES, library_states, network_of, relative, targets_of, wrapped
from tests.model.test_policy_gradient import ROWS, STEPS, in_batches, network, take_step
from tests.model.test_rollouts import MOST, OPTIONS, PROMPTS, SIZE, UNIFORMS, forward, log_softmax, rolled, sampled
from tests.model.test_sampling import word_model
from tests.model.test_teacher_student import gradients
from tests.model.test_vocabulary_loss import (
    V,
    bucketed,
    distributions,
    divergence_called,
    leaves_of,
    plain_cross_entropy,
    random_inputs,
)
from tests.small_kd_runs import random_rows, randomised, tiny_teacher

DEVICE = torch.device(os.environ.get("TESTS_CUDA_ON", "cuda"))
pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA alone")
FLOAT32, BFLOAT16 = 1e-4, 5e-2  # relative to the largest entry; bfloat16 keeps 8 bits


@pytest.fixture
def exact_products():
    """Products of float32 in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def precision_of(autocast: bool):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast)


def on_device(module, dtype=torch.float32):
    """A copy; `module` stays on the CPU."""
    return copy.deepcopy(module).to(DEVICE, dtype)


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, name: str = "") -> None:
    """Relative to the largest entry of `theirs`; fails with the figure if it is not."""
    found = relative(ours.detach().cpu().double(), theirs.detach().double())
    assert found <= tolerance, f"{name}: {found:.2e} > {tolerance}"


def near_all(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        near(ours[name], value, tolerance, name)


def on_cpu(tensors: dict) -> dict:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


# -- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, FLOAT32), (True, BFLOAT16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("pack_rows", "prune_last_block"), SWITCHES)
def test_packed_rows_equal_the_library_on_the_cpu(pack_rows, prune_last_block, autocast, tolerance):
    """Fault: a kernel of the GPU that takes mask, scale or padding of attention otherwise, or a lost gradient."""
    batches = [random_rows(rows, columns=2) for rows in BATCHES.values()]
    batches.append(random_rows([(length, [length - 3, length - 1]) for length in (100, 37, 64, 65, 9)]))
    for batch in batches:
        reference = network_of(layers=2, positions=128).double()
        ours = on_device(reference)
        expected, targets = library_states(reference, *batch), targets_of(batch[2])
        F.cross_entropy(reference.lm_head(expected), targets, reduction="sum").backward()
        with precision_of(autocast):
            hidden, found = wrapped(ours, pack_rows, prune_last_block).label_hidden(*batch)
            logits = ours.lm_head(hidden)
        assert hidden.device.type == found.device.type == DEVICE.type and torch.equal(found.cpu(), targets)
        F.cross_entropy(logits.float(), found, reduction="sum").backward()
        near(hidden, expected, tolerance, "hidden states")
        near_all(gradients(ours), gradients(reference), tolerance)


@pytest.mark.parametrize("device_of_batch", ["cpu", DEVICE.type])
def test_fine_tuning_equals_the_formula(device_of_batch):
    """Fault: the tied embedding loses the rows' share of its gradient on a GPU, or a batch must be on one device."""
    rows = test_fine_tuning.ROWS
    reference = tiny_gpt2(seed=3, width=32, layers=2, std=0.2).double()
    ours = on_device(reference)
    expected = test_fine_tuning.formula(reference, rows)
    expected.backward()
    batch = [tensor.to(device_of_batch) for tensor in test_fine_tuning.right_padded(rows, columns=3)]
    terms = FineTuning(LanguageModel(ours, byte_tokenizer()), chunk_size=5)(*batch)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(expected.item(), rel=FLOAT32)
    near_all(gradients(ours), gradients(reference), FLOAT32)


@pytest.mark.parametrize("device_of_teacher", ["cpu", DEVICE.type])
@pytest.mark.parametrize(("kl_div", "temperature"), [("forward", 1.0), ("reverse", 2.0), ("JS", 2.0)])
def test_divergence_equals_the_formula(kl_div, temperature, device_of_teacher):
    """Fault: the teacher's states or head stay on its device, or are copied before they are computed."""
    student, teacher = (network.double() for network in (test_teacher_student.student_network(),
                                                   test_teacher_student.teacher_network()))
    batch = random_rows(test_teacher_student.ROWS, columns=2)
    cross_entropy, divergence = test_teacher_student.formula(teacher, student, batch, kl_div, temperature)
    (0.5 * cross_entropy + 0.5 * temperature**2 * divergence).backward()
    own = LanguageModel(on_device(student), byte_tokenizer())
    of_teacher = LanguageModel(copy.deepcopy(teacher).float().to(device_of_teacher), byte_tokenizer())
    objective = TeacherStudent(own, Teacher(of_teacher, DEVICE), kl_div, temperature, chunk_size=3)
    terms = objective(*batch)
    terms.loss_sum.backward()
    assert terms.parts["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=FLOAT32)
    assert terms.parts["divergence"].item() == pytest.approx(divergence.item(), rel=FLOAT32)
    near_all(gradients(own.model), gradients(student), FLOAT32)


# -- the loss over the vocabulary ------------------------------------------------------------------------------------


def put(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A leaf of its own on the device, in float32."""
    return None if tensor is None else tensor.detach().to(DEVICE, torch.float32).requires_grad_()


def put_head(head: OutputHead) -> OutputHead:
    return head._replace(weight=put(head.weight), bias=put(head.bias))


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, FLOAT32), (True, BFLOAT16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("k", [None, 4], ids=["hidden", "top_k"])
@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_loss_equals_full_logits(name, k, autocast, tolerance):
    """Fault: chunks, bias, padding rows or top k go wrong on a GPU, where terms are formed in whole chunks."""
    hidden, head, targets, teacher = random_inputs()
    products = torch.bfloat16 if autocast else torch.float64
    own, ours_head = put(hidden), put_head(head)
    for temperature in (1.0, 2.0):
        p, q = distributions(hidden, head, teacher, temperature, V, products)
        given = TeacherHidden(put(teacher.hidden), put_head(teacher.head))
        if k is not None:
            ids = p.argsort(-1, descending=True)[:, :k]
            given = TeacherTopK(*(tensor.to(DEVICE) for tensor in top_k_of(p.log().float(), k)))
            p, q = bucketed(p, ids), bucketed(q, ids)
        expected = 0.7 * plain_cross_entropy(hidden, head, targets, V, products)
        expected = expected + 0.3 * temperature**2 * FORMULAS[name](p, q).sum()
        right = torch.autograd.grad(expected, leaves_of(hidden, head))
        for chunk_size in (7, 128):
            with precision_of(autocast):
                loss = vocabulary_loss(own, ours_head, targets.to(DEVICE), vocabulary=V, teacher=given, kd_weight=0.3,
                                       divergence=divergence_called(name), temperature=temperature,
                                       chunk_size=chunk_size)
            assert loss.loss_sum.dtype == torch.float32 and loss.loss_sum.device.type == DEVICE.type
            found = torch.autograd.grad(loss.loss_sum, leaves_of(own, ours_head))
            assert loss.loss_sum.item() == pytest.approx(expected.item(), rel=FLOAT32 if not autocast else 1e-3)
            for part, mine, theirs in zip(("hidden", "weight", "bias"), found, right, strict=True):
                near(mine, theirs, tolerance, part)


# -- policy gradient -------------------------------------------------------------------------------------------------

POLICY = STEPS | {"no clip, whitened": {"clip_epsilon": None, "whiten": True, "penalty": True}}


@pytest.mark.parametrize("options", POLICY.values(), ids=POLICY)
def test_policy_steps_on_the_device_equal_the_formula(options):
    """Fault: drawing, rewards, weights, whitening or penalties are of another device or another row."""
    student, teacher = network(1), network(2, width=12)
    objective = test_policy_gradient.objective_of(on_device(student, torch.float64), on_device(teacher, torch.float64),
                                                  chunk_size=4, **options)
    means, slopes, sequences = take_step(objective, in_batches(ROWS, 3))
    assert all(slope.device.type == DEVICE.type for slope in slopes.values())
    right = test_policy_gradient.formula(student, teacher, ROWS, sequences, **options)
    test_policy_gradient.assert_same((means, on_cpu(slopes)), right)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"penalty": True, "lm_weight": 0.2}, {"importance_weight": "sequence"}],
                         ids=str)
def test_policy_loss_of_given_rollouts(options, autocast):
    """Fault: rollouts drawn elsewhere, or in float64, give another loss or gradient on the device in float32."""
    student, teacher = network(1), network(2, width=12)
    reference = test_policy_gradient.objective_of(student, teacher, chunk_size=4, **options)
    ours = test_policy_gradient.objective_of(on_device(student), on_device(teacher), chunk_size=4, **options)
    ((arguments,),) = (list(step) for step in reference.iter_steps(None, in_batches(ROWS, 4), [1]))
    *batch, rollout = arguments
    expected = reference(*batch, rollout)
    expected.loss_sum.backward()
    drawn = rollout.drawn._replace(**{name: value.float() for name, value in rollout.drawn._asdict().items()
                                      if isinstance(value, torch.Tensor) and value.is_floating_point()})
    states = TeacherHidden(rollout.teacher.hidden.to(DEVICE, torch.float32), ours.teacher.head)
    with precision_of(autocast):
        terms = ours(*batch, rollout._replace(drawn=drawn, teacher=states))
    terms.loss_sum.backward()
    assert terms.parts.keys() == expected.parts.keys()
    tolerance = BFLOAT16 if autocast else FLOAT32
    for name, value in expected.parts.items():
        assert terms.parts[name].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name
    theirs = gradients(student)
    largest = max(tensor.abs().max() for tensor in theirs.values())
    for name, found in on_cpu(gradients(ours.language_model.model)).items():
        assert (found - theirs[name]).abs().max() <= tolerance * largest, name


# -- decoding --------------------------------------------------------------------------------------------------------


def test_greedy_decoding_equals_generate():
    """Fault: with 8 tokens between two looks, what follows a row's end is kept, or a waiting prompt gets its cache."""
    language_model = ending_model().to(DEVICE)
    prompts = random_prompts([3, 80, 1, 41, 80, 7, 25, 2, 60, 33])
    expected = [generated(language_model, prompt, 20) for prompt in prompts]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 3 and any((length + 1) % 8 for length in lengths if length < 20)
    for slots in (1, 3, 10):
        assert greedy_decode(language_model, prompts, 20, slots) == expected, slots
    equal = random_prompts([12] * 5)
    assert greedy_decode(language_model, equal, 15, 4) == [generated(language_model, prompt, 15) for prompt in equal]


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[4], OPTIONS[6]], ids=str)
def test_rollouts_equal_a_plain_sampler(options):
    """Fault: tokens drawn behind a row's end spoil what was noted, or slots change what a row draws."""
    student, teacher = (model.to(DEVICE) for model in (word_model(8, SIZE), word_model(18, SIZE, width=16, layers=3)))
    right = [sampled(student, teacher, *row, options) for row in zip(PROMPTS, UNIFORMS, strict=True)]
    for slots in (1, 3, 50):
        rollouts = rolled(student, teacher, options, slots)
        assert rollouts.tokens == [tokens for tokens, _ in right], slots
        for row, (tokens, logs) in enumerate(right):
            found = rollouts.behavior_log_probs[row, : len(tokens)].tolist()
            assert found == pytest.approx(logs, abs=1e-10), (slots, row)


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.12)], ids=["float32", "bfloat16"])
def test_what_rollouts_note_is_what_forward_passes_give(autocast, tolerance):
    """Fault: log q, log p, log p~ or the teacher's states belong to another place or another row."""
    student, teacher = (model.to(DEVICE, torch.float32) for model in (
        word_model(8, SIZE), word_model(18, SIZE, width=16, layers=3)))
    with precision_of(autocast):
        rollouts = rolled(student, teacher, OPTIONS[2], temperature=1.5)
    assert {len(tokens) for tokens in rollouts.tokens} != {MOST}
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, rollouts.tokens, strict=True)):
        places, picked = np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), (np.arange(len(tokens)), tokens)
        q, p = (forward(model, prompt + tokens)[1][places] for model in (student, teacher))
        mixed = 0.3 * np.exp(log_softmax(p, 0.7)) + 0.7 * np.exp(log_softmax(q, 0.7))
        states = forward(teacher, prompt + tokens)[0][places]
        for name, right in (("log_q", log_softmax(q, 1.5)[picked]), ("log_p", log_softmax(p, 1.5)[picked]),
                            ("behavior_log_probs", np.log(mixed)[picked]), ("hidden", states)):
            ours = getattr(rollouts, name)[row, : len(tokens)].float().cpu().numpy()
            np.testing.assert_allclose(ours, right, rtol=0.03 if autocast else 0, atol=tolerance, err_msg=name)


# -- nothing waits for the device ------------------------------------------------------------------------------------


def objectives() -> dict:
    """Of every kind, with the arguments of a micro-batch, in pinned memory of the CPU as the loop has it.

    So few rows that all kernels of the passes find room in the queue.
    """
    own = LanguageModel(randomised(tiny_gpt2(seed=6, width=32, layers=2, positions=1024)), byte_tokenizer()).to(DEVICE)
    of_teacher = Teacher(LanguageModel(tiny_teacher(positions=1024), byte_tokenizer()).to(DEVICE))
    batch = random_rows([(length, list(range(length - 20, length))) for length in (1000, 1000, 1000, 200)])
    ids, mask, labels = batch
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels, "rows": list(range(len(ids)))}
    drawing, mixed = (RolloutBuffer(own, of_teacher, RolloutConfig(SamplingOptions(alpha), 6), 257,
                                    log=lambda text: None) for alpha in (0.0, 0.2))
    found = {"fine-tuning": (FineTuning(own), batch)}
    for kl_div in NAMES:
        found[kl_div] = TeacherStudent(own, of_teacher, kl_div, 2.0), batch
    for name, objective in (
        ("policy gradient", test_policy_gradient.TeacherStudent(own, of_teacher, penalty=True, rollouts=mixed)),
        ("on policy", TeacherStudent(own, of_teacher, on_policy_fraction=1.0, rollouts=drawing)),
    ):
        ((arguments,),) = (list(step) for step in objective.train().iter_steps(None, [rows], [1]))
        found[name] = objective, arguments
    return {name: (objective, tuple(part.pin_memory() if isinstance(part, torch.Tensor) else part for part in given))
            for name, (objective, given) in found.items()}


@contextmanager
def waits_are_errors():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_no_micro_batch_waits_for_the_device(autocast):
    """Fault: an .item(), a blocking copy or a size that the device decides, in the passes of a micro-batch.

    Seen in two ways: torch's own watch, and a kernel of some 0.3 seconds that still runs when all is queued.
    """
    waiting = {}
    for name, (objective, arguments) in objectives().items():
        def passes(objective=objective, arguments=arguments):
            with precision_of(autocast):
                terms = objective(*arguments)
            terms.loss_sum.backward()

        passes()  # the libraries set themselves up, and the memory is there
        torch.cuda.synchronize()
        try:
            with waits_are_errors():
                passes()
        except RuntimeError as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            waiting[name] = f"{place.filename}:{place.lineno}: {str(error)[:150]}"
            continue
        for _ in range(2):  # at the first time pinned memory is still had from the system, which may wait
            torch.cuda.synchronize()
            done = torch.cuda.Event()
            torch.cuda._sleep(500_000_000)
            done.record()
            passes()
            waited = done.query()
        if waited:
            waiting[name] = "the passes ended after the kernel before them"
        torch.cuda.synchronize()
    assert waiting == {}
