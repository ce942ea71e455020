"""Where a student's weights come from: model/student_init.py and utils/distillation/student.py."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from data.prompts import DEFAULT_TEMPLATE
from model.errors import ModelError
from model.language_model import LanguageModel
from model.student_init import copy_teacher_layers, spread_layers
from tests.conftest import END, byte_tokenizer, tiny_gpt2
from tests.small_kd_runs import POSITIONS, make_kd_project, random_rows, randomised, run_kd, save_model, tiny_teacher
from tests.small_runs import assert_equal_weights, changed, largest_difference, weights

INIT, LAYERS = "distillation_kwargs.student_init", "distillation_kwargs.student_layers"


def wrapped(network) -> LanguageModel:
    return LanguageModel(network, byte_tokenizer())


def teacher_network(layers: int = 4, **shape):
    return randomised(tiny_teacher(layers=layers, **shape))


def student_network(layers: int = 2, **shape):
    return tiny_gpt2(**{"seed": 7, "width": 32, "layers": layers, "positions": POSITIONS, **shape})


def assert_made_of(student, teacher, layers: list[int]) -> None:
    """Each block is that block of the teacher; all else is the teacher's."""
    assert len(student.transformer.h) == len(layers)
    for block, number in zip(student.transformer.h, layers, strict=True):
        assert_equal_weights(block.state_dict(), teacher.transformer.h[number].state_dict())
    assert_equal_weights(student.transformer.ln_f.state_dict(), teacher.transformer.ln_f.state_dict())
    for name in ("wte", "wpe"):
        own, theirs = (getattr(network.transformer, name).weight for network in (student, teacher))
        assert torch.equal(own, theirs[: len(own)])


# -- blocks of the teacher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_teacher", "of_student", "expected"), [
    (12, 2, [0, 11]), (12, 3, [0, 6, 11]), (12, 4, [0, 4, 7, 11]), (12, 6, [0, 2, 4, 7, 9, 11]), (5, 3, [0, 2, 4]),
    (24, 12, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]), (12, 12, list(range(12))), (12, 1, [0]), (1, 1, [0]),
    (2, 2, [0, 1]), (3, 2, [0, 2]),
])
def test_even_spread_by_hand(of_teacher, of_student, expected):
    """Fault: the first or the last block is left out, or the blocks stand close together."""
    assert spread_layers(of_teacher, of_student) == expected


@pytest.mark.parametrize(("layers", "expected"), [(None, [0, 3]), ([1, 2], [1, 2]), ([3, 0], [3, 0])])
def test_copied_weights_are_the_teacher_s(layers, expected):
    """Fault: a tensor that stays random, a block at another place, or a teacher that is changed or shared."""
    teacher, student = teacher_network(), student_network()
    before = copy.deepcopy(teacher)
    assert copy_teacher_layers(wrapped(teacher), wrapped(student), layers) == expected
    assert_made_of(student, teacher, expected)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1.0
    assert_equal_weights(teacher.state_dict(), before.state_dict())


def test_head_stays_tied():
    """Fault: the head is a copy of the embedding afterwards, at once or after an optimizer step (case A22)."""
    student = student_network()
    copy_teacher_layers(wrapped(teacher_network()), wrapped(student))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    for _ in range(2):
        head, embedding = student.lm_head.weight, student.transformer.wte.weight
        assert head is embedding and head.data_ptr() == embedding.data_ptr()
        student(random_rows([(6, [])])[0]).logits.sum().backward()
        optimizer.step()


def test_longer_context_and_padded_embedding_are_cut():
    """Fault: a teacher with more positions, or rows that pad its embedding, cannot start a student (case A7)."""
    teacher, student = teacher_network(positions=POSITIONS), student_network(positions=64)
    teacher.resize_token_embeddings(260, mean_resizing=False)
    assert copy_teacher_layers(wrapped(teacher), wrapped(student)) == [0, 3]
    assert_made_of(student, teacher, [0, 3])
    assert student.transformer.wpe.weight.shape == (64, 32) and student.lm_head.weight.shape == (257, 32)


def test_another_family():
    """Fault: only GPT-2's names of blocks are known, or a head that is not tied stays random."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
             "max_position_embeddings": 64, "bos_token_id": END, "eos_token_id": END, "tie_word_embeddings": False}
    torch.manual_seed(0)
    teacher, student = (AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **sizes),
                                                         dtype=torch.float32) for layers in (3, 2))
    assert copy_teacher_layers(wrapped(teacher), wrapped(student)) == [0, 2]
    for block, number in zip(student.model.layers, (0, 2), strict=True):
        assert_equal_weights(block.state_dict(), teacher.model.layers[number].state_dict())
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])


@pytest.mark.parametrize(("shape", "layers", "start", "part"), [
    ({"width": 16}, None, INIT, "hidden_size of the teacher is 32 and of the student 16"),
    ({"layers": 5}, None, INIT, "the number of blocks of the teacher is 4 and of the student 5"),
    ({}, [0, 4], LAYERS, "[0, 4]: expected 2 numbers from 0 to 3"),
    ({}, [0], LAYERS, "[0]: expected 2 numbers from 0 to 3"),
    ({}, [0, 1, 2], LAYERS, "[0, 1, 2]: expected 2 numbers from 0 to 3"),
    ({"positions": 400}, None, INIT, "transformer.wpe.weight"),
    ({"n_head": 4}, None, INIT, "num_attention_heads of the teacher is 2 and of the student 4"),
    ({"n_inner": 48}, None, INIT, "n_inner of the teacher is None and of the student 48"),
])
def test_what_does_not_fit_is_refused(shape, layers, start, part):
    """Fault: a student is filled in part, computes something else, or ends in a library's error about shapes."""
    named = {key: value for key, value in shape.items() if not key.startswith("n_")}
    config = student_network(**named).config
    config.update({key: value for key, value in shape.items() if key.startswith("n_")})
    student = AutoModelForCausalLM.from_config(config)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ModelError) as caught:
        copy_teacher_layers(wrapped(teacher_network()), wrapped(student), layers)
    message = str(caught.value)
    assert message.startswith(start) and len(message.splitlines()) == 1 and part in message
    assert_equal_weights(student.state_dict(), before)


# -- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> dict:
    """A teacher of 4 blocks, a student of 2 of the same width, and a run that changes no weight."""
    config = changed(make_kd_project(tmp_path, rows=4), optimizer_kwargs={"lm_lr": 1e-12})
    save_model(tmp_path / "teacher", teacher_network(), DEFAULT_TEMPLATE)
    save_model(tmp_path / "student", student_network())
    return config


def started(folder: Path, config: dict, **sections: dict) -> dict[str, torch.Tensor]:
    """The student's weights."""
    assert run_kd(folder, changed(config, **sections)) == 0
    return weights(folder / "run/model_checkpoints/last")


def from_there(path: Path, named: str | None = None) -> dict:
    return {"trainer_kwargs": {"student_ckpt_path": str(path)},
            "model_arch": {} if named is None else {"student_lang_model": named}}


def from_layers(*layers: int) -> dict:
    return {"distillation_kwargs": {"student_init": "teacher_layers", "student_layers": list(layers) or None}}


@pytest.mark.parametrize(("layers", "expected"), [((), (0, 3)), ((1, 2), (1, 2))])
def test_run_from_teacher_layers(tmp_path, project, layers, expected):
    """Fault: student_init or student_layers is not used, or the student is the teacher itself."""
    found, teacher = started(tmp_path, project, **from_layers(*layers)), weights(tmp_path / "teacher")
    assert found.keys() == weights(tmp_path / "student").keys()
    for name, value in found.items():
        if name.startswith("transformer.h."):
            _, _, number, part = name.split(".", 3)
            name = f"transformer.h.{expected[int(number)]}.{part}"
        assert (value - teacher[name]).abs().max() < 1e-6, name


def test_run_from_a_checkpoint(tmp_path, project):
    """Fault: student_ckpt_path is ignored, and the weights of student_lang_model are distilled."""
    save_model(tmp_path / "earlier", student_network(seed=21))
    found = started(tmp_path, project, **from_there(tmp_path / "earlier"))
    assert largest_difference(found, weights(tmp_path / "earlier")) < 1e-6
    assert largest_difference(found, weights(tmp_path / "student")) > 1e-3


def test_run_from_a_legacy_file(tmp_path, project):
    """Fault: a .pt with `module.` prefixes is not loaded, or loaded in part (case A22)."""
    network = student_network(seed=21)
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "old.pt")
    found = started(tmp_path, project, **from_there(tmp_path / "old.pt"))
    assert largest_difference(found, {**network.state_dict()}) < 1e-6
