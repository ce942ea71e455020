"""Faults of train_kd.py that a review found, each with its right outcome."""

import json
import shutil

import pytest
import torch
from transformers import GPT2Config

from model.language_model import LanguageModel, ModelError
from model.student_init import copy_teacher_layers
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.small_runs import assert_equal_weights, changed, make_project, run, weights
from utils.distillation.teacher import TeacherSource


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
    import train_kd

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
    """Fault: train_kd.py goes on in the folder of a train.py run, whose model becomes the student; or the reverse."""
    folder, fine_tuning = project
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    assert distil(project, tmp_path / "run", trainer={"epochs": 2})[0] == 2
    assert "cannot resume" in capsys.readouterr().err
    assert distil(project, tmp_path / "kd")[0] == 0
    back = changed(fine_tuning, trainer_kwargs={"output_dir": str(tmp_path / "kd"), "epochs": 2})
    assert run(folder, back) == 2
    assert "cannot resume" in capsys.readouterr().err


def test_another_start_of_the_student_is_not_continued(project, tmp_path, capsys):
    """Fault: a run with another student_ckpt_path goes on with the old student."""
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


def test_fingerprint_sees_every_shard(tmp_path):
    """Fault: a cache is used for another teacher whose weights lie in pytorch_model-*.bin shards."""
    source = TeacherSource(str(tmp_path), None, "key", GPT2Config(), None, str(tmp_path))
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    found = []
    for content in (b"one", b"two"):
        (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(content)
        found.append(source.fingerprint())
    assert found[0] != found[1] and source.fingerprint() == found[1]


@pytest.mark.parametrize("other", [
    {"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False},
])
def test_layers_that_would_compute_something_else(other):
    """Fault: teacher_layers copies blocks into a student that computes something else with them."""
    from transformers import GPT2LMHeadModel

    teacher = LanguageModel(tiny_gpt2(layers=2), byte_tokenizer())
    student = LanguageModel(GPT2LMHeadModel(GPT2Config(**{**teacher.model.config.to_dict(), "n_layer": 1, **other})),
                            byte_tokenizer())
    with pytest.raises(ModelError, match=next(iter(other))):
        copy_teacher_layers(teacher, student)


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
