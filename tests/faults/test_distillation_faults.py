"""Runs of train_kd.py that must not be mixed up: with other scripts, other students, other teachers."""

import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import train_kd
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.small_runs import assert_equal_weights, changed, make_project, run, weights


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Folder with a trained teacher of width 32 (`run`), a student of width 16 and the configs (of both scripts)."""
    folder = tmp_path_factory.mktemp("project")
    fine_tuning = changed(make_project(folder, rows=12, layers=2, width=32), trainer_kwargs={"monitor_val": False})
    assert run(folder, fine_tuning) == 0
    tiny_gpt2(seed=3, positions=320, dropout=0.1).save_pretrained(folder / "student")
    byte_tokenizer().save_pretrained(folder / "student")
    return folder, fine_tuning


def distil(project, output, teacher=None, **kwargs) -> tuple[int, dict]:
    """(exit code of train_kd.py, its config) for a teacher folder and more trainer_kwargs / distillation_kwargs."""
    folder, fine_tuning = project
    config = {
        **fine_tuning,
        "model_arch": {"teacher_lang_model": None, "student_lang_model": str(folder / "student"),
                       **kwargs.pop("arch", {})},
        "lr_scheduler_kwargs": {"num_training_steps": 8},
        "trainer_kwargs": {**fine_tuning["trainer_kwargs"], "output_dir": str(output),
                           "teacher_ckpt_path": str(teacher or folder / "run/model_checkpoints/last"),
                           **kwargs.pop("trainer", {})},
        "distillation_kwargs": kwargs,
    }
    path = output.parent / f"{output.name}.json"
    path.write_text(json.dumps(config))
    return train_kd.main(["--config", str(path)]), config


def test_runs_of_the_other_script_are_not_continued(project, tmp_path, capsys):
    """Fault: train_kd.py continues in the folder of a train.py run, whose model becomes the student; or the reverse."""
    folder, fine_tuning = project
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    assert distil(project, tmp_path / "run", trainer={"epochs": 2})[0] == 2
    assert "cannot resume" in capsys.readouterr().err
    assert distil(project, tmp_path / "kd")[0] == 0
    back = changed(fine_tuning, trainer_kwargs={"output_dir": str(tmp_path / "kd"), "epochs": 2})
    assert run(folder, back) == 2
    assert "cannot resume" in capsys.readouterr().err


def test_another_start_of_the_student_is_not_continued(project, tmp_path, capsys):
    """Fault: a run with another student_ckpt_path continues with the old student."""
    folder, _ = project
    assert distil(project, tmp_path / "kd")[0] == 0
    again = {"epochs": 2, "student_ckpt_path": str(folder / "student")}
    assert distil(project, tmp_path / "kd", trainer=again)[0] == 2
    assert "student_ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_legacy_teacher_with_cache_resumes_exactly(project, tmp_path, kind):
    """Fault: loading a .pt teacher when a row is first missing draws random weights, so dropout does not repeat."""
    folder, _ = project
    torch.save(weights_of(folder / "run/model_checkpoints/last"), tmp_path / "teacher.pt")
    options = {"teacher": tmp_path / "teacher.pt", "arch": {"teacher_lang_model": str(folder / "model")},
               "teacher_cache": {"kind": kind}}
    for name, stops in (("whole", [6]), ("resumed", [2, 6])):
        for stop in stops:
            assert distil(project, tmp_path / name, trainer={"max_steps": stop}, **options)[0] == 0
    assert_equal_weights(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("whole", "resumed")))


def weights_of(folder) -> dict:
    return {f"module.{name}": value for name, value in weights(folder).items()}


@pytest.mark.parametrize("other", [
    {"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
])
def test_layers_that_would_compute_something_else(project, tmp_path, capsys, other):
    """Fault: teacher_layers copies blocks into a student that computes something else with them."""
    student = GPT2LMHeadModel(GPT2Config(**{**tiny_gpt2(width=32, positions=320).config.to_dict(), **other}))
    student.save_pretrained(tmp_path / "student")
    byte_tokenizer().save_pretrained(tmp_path / "student")
    arch = {"student_lang_model": str(tmp_path / "student")}
    assert distil(project, tmp_path / "kd", arch=arch, student_init="teacher_layers")[0] == 2
    assert next(iter(other)) in capsys.readouterr().err


def test_weights_in_the_run_folder_are_refused(project, tmp_path, capsys):
    """Fault: the teacher or the student lies in the folder that the run sets aside and writes."""
    folder, _ = project
    shutil.copytree(folder / "run/model_checkpoints", tmp_path / "kd/model_checkpoints", symlinks=True)
    inside = tmp_path / "kd/model_checkpoints/last"
    for trainer in ({"teacher_ckpt_path": str(inside)}, {"student_ckpt_path": str(inside)}):
        code, _ = distil(project, tmp_path / "kd", trainer={"load_from_checkpoint": False, **trainer})
        assert code == 2
        assert "lies in trainer_kwargs.output_dir" in capsys.readouterr().err
        assert inside.exists()


def test_broken_teacher_is_found_before_the_earlier_run_is_moved(project, tmp_path, capsys):
    """Fault: an earlier result is set aside for a run whose teacher cannot be loaded."""
    folder, _ = project
    assert distil(project, tmp_path / "kd")[0] == 0
    shutil.copytree(folder / "run/model_checkpoints/last", tmp_path / "broken")
    file = tmp_path / "broken/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for kind in ("hidden", "top_k"):
        code, _ = distil(project, tmp_path / "kd", tmp_path / "broken", trainer={"load_from_checkpoint": False},
                         teacher_cache={"kind": kind})
        assert code == 2
        assert "teacher_ckpt_path" in capsys.readouterr().err
        assert not list((tmp_path / "kd").glob("earlier-run-*"))
