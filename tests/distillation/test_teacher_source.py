"""Which teacher a config means: errors of one line before anything is made, and notices: teacher.py."""

import json
from pathlib import Path

import pytest
import torch

from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.small_kd_runs import POSITIONS, make_kd_project, run_kd, save_model, tiny_teacher
from tests.small_runs import assert_equal_weights, changed, metrics, weights
from utils.config.distill import DistillConfig
from utils.distillation.teacher import find_teacher

KEY = "trainer_kwargs.teacher_ckpt_path"
NAMED = "model_arch.teacher_lang_model"


@pytest.fixture
def project(tmp_path) -> dict:
    return make_kd_project(tmp_path, rows=4)


def refusal(folder: Path, config: dict, capsys, **sections: dict) -> str:
    """The one line of a run that is refused, without its start; nothing is made in its folder."""
    capsys.readouterr()
    assert run_kd(folder, changed(config, **sections)) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    errors = [line for line in told.splitlines() if "error: " in line]
    assert len(errors) == 1 and told.strip().endswith(errors[0])
    assert not (folder / "run/config.json").exists() and not (folder / "run/model_checkpoints").exists()
    return errors[0].removeprefix("train_kd.py: error: ")


def with_teacher(path: Path | None, named: str | None = None) -> dict:
    return {"trainer_kwargs": {"teacher_ckpt_path": None if path is None else str(path)},
            "model_arch": {"teacher_lang_model": named}}


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- refused -----------------------------------------------------------------------------------------------------


def test_absent_teacher(tmp_path, project, capsys):
    """Fault: a wrong path ends in a traceback, or is asked of the hub."""
    for name in ("nowhere", "nowhere.pt"):
        named = str(tmp_path / "teacher")
        message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / name, named))
        assert message.startswith(f"{KEY}: {tmp_path / name} does not exist: expected a checkpoint folder")
        assert message.endswith("train the teacher first, with train.py")
    (tmp_path / "teacher/model.safetensors").rename(tmp_path / "one.safetensors")
    message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / "one.safetensors"))
    assert message.startswith(f"{KEY}: {tmp_path / 'one.safetensors'} is a file: expected a model folder")


def test_run_folder_instead_of_its_checkpoint(tmp_path, project, capsys):
    """Fault: the settings of a run are taken for a model's config."""
    (tmp_path / "earlier/model_checkpoints").mkdir(parents=True)
    (tmp_path / "earlier/config.json").write_text("{}")
    (tmp_path / "teacher").rename(tmp_path / "earlier/model_checkpoints/best")
    message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / "earlier"))
    assert message.startswith(f"{KEY}: ")
    assert message.endswith(f"did you mean {tmp_path / 'earlier/model_checkpoints/best'}?")


def test_demo_teacher_has_random_weights(tmp_path, project, capsys):
    """Fault: a student is distilled from noise."""
    for name in ("demo-teacher", "demo-student"):
        message = refusal(tmp_path, project, capsys, **with_teacher(None, name))
        assert message.startswith(f"{NAMED}: '{name}' has random weights, so it can teach nothing: ")
        assert KEY in message and "./demo.sh" in message


@pytest.mark.parametrize(("named", "told"), [
    ("gpt2-medium", "its num_hidden_layers is 2, 'gpt2-medium' has 24"),
    ("demo-teacher", "its num_hidden_layers is 2, 'demo-teacher' has 3"),
    ("{folder}/student", "its num_hidden_layers is 2, '{folder}/student' has 1"),
])
def test_checkpoint_of_another_architecture(tmp_path, project, capsys, named, told):
    """Fault: the checkpoint of another teacher than the one that the config names is used in silence."""
    named, told = (text.replace("{folder}", str(tmp_path)) for text in (named, told))
    message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / "teacher", named))
    assert message == f"{KEY}: the checkpoint is not a '{named}': {told}"


def test_another_vocabulary(tmp_path, project, capsys):
    """Fault: distributions over different tokens are compared id by id (case A7)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["storm"])
    network = tiny_teacher()
    network.resize_token_embeddings(258, mean_resizing=False)
    save_model(tmp_path / "teacher", network, DEFAULT_TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "teacher")
    message = refusal(tmp_path, project, capsys)
    assert message.startswith(f"{KEY}: teacher and student have different vocabularies (258 and 257 tokens; ")
    assert "id 257: 'storm' and none" in message


def test_another_prompt_template(tmp_path, project, capsys):
    """Fault: the teacher reads prompts that it was not trained on, and teaches how it guesses."""
    other = "{article} =>"
    message = refusal(tmp_path, project, capsys, dataset_kwargs={"prompt_template": other})
    assert message.startswith(f"{KEY}: the teacher {tmp_path / 'teacher'} was trained on the prompt_template ")
    for part in (repr(DEFAULT_TEMPLATE), f"dataset_kwargs.prompt_template is {other!r}", "write the teacher's there"):
        assert part in message
    # Named as a model, it says the same.
    sections = with_teacher(None, str(tmp_path / "teacher"))
    message = refusal(tmp_path, project, capsys, **sections, dataset_kwargs={"prompt_template": other})
    assert message.startswith(f"{NAMED}: the teacher ")


def test_too_short_a_context(tmp_path, project, capsys):
    """Fault: rows longer than the teacher's context end in an index error, hours later."""
    save_model(tmp_path / "teacher", tiny_teacher(positions=128), DEFAULT_TEMPLATE)
    message = refusal(tmp_path, project, capsys)
    assert message.startswith(f"{KEY}: the teacher's context is 128 tokens, the rows have up to {POSITIONS}: ")
    assert "dataset_kwargs.max_length" in message
    assert run_kd(tmp_path, changed(project, dataset_kwargs={"max_length": 128})) == 0


@pytest.mark.parametrize(("file", "told"), [
    ("model.safetensors", "no file named model.safetensors"), ("tokenizer.json", "has no tokenizer"),
    ("config.json", "has no config.json"),
])
def test_a_part_of_the_teacher_is_missing(tmp_path, project, capsys, file, told):
    """Fault: a teacher without weights teaches noise, or an error that does not name the teacher's key."""
    (tmp_path / "teacher" / file).unlink()
    message = refusal(tmp_path, project, capsys)
    assert message.startswith(f"{KEY}: {tmp_path / 'teacher'} ") and told in message


# -- notices -----------------------------------------------------------------------------------------------------


def told_by(folder: Path, config: dict, capsys, **sections: dict) -> list[str]:
    """Lines about the teacher, of a run that ends well."""
    capsys.readouterr()
    assert run_kd(folder, changed(config, **sections)) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("the teacher ")]


def test_a_teacher_that_is_not_bigger(tmp_path, project, capsys):
    """Fault: teacher and student exchanged, without a word."""
    save_model(tmp_path / "teacher", tiny_teacher(width=16, layers=1), DEFAULT_TEMPLATE)
    (line,) = told_by(tmp_path, project, capsys)
    assert line.startswith("the teacher is not bigger than its student")


# -- legacy files, fingerprints ----------------------------------------------------------------------------------


def test_legacy_teacher(tmp_path, project, capsys):
    """Fault: a .pt with `module.` prefixes is not loaded, or the named architecture's own weights teach (case A22)."""
    assert run_kd(tmp_path, changed(project, trainer_kwargs={"output_dir": str(tmp_path / "folder")})) == 0
    state = {f"module.{name}": value for name, value in tiny_teacher().state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "old.pt")
    save_model(tmp_path / "plain", tiny_teacher(seed=12))  # the architecture, with other weights
    (line,) = told_by(tmp_path, project, capsys, **with_teacher(tmp_path / "old.pt", str(tmp_path / "plain")))
    assert str(tmp_path / "old.pt") in line and "does not say which prompt" in line
    assert_equal_weights(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("folder", "run")))
    assert metrics(tmp_path / "folder") == metrics(tmp_path / "run")


def test_legacy_teacher_of_another_shape(tmp_path, project, capsys):
    """Fault: a .pt that does not fit is loaded in part (case A22)."""
    torch.save(tiny_gpt2(positions=POSITIONS).state_dict(), tmp_path / "old.pt")
    message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / "old.pt", str(tmp_path / "teacher")))
    assert message.startswith(f"{KEY}: {tmp_path / 'old.pt'} does not fit GPT2LMHeadModel")
    (tmp_path / "old.pt").write_bytes(b"no tensors")
    message = refusal(tmp_path, project, capsys, **with_teacher(tmp_path / "old.pt", str(tmp_path / "teacher")))
    assert message.startswith(f"{KEY}: {tmp_path / 'old.pt'} ")


def fingerprint(project: dict, **sections: dict) -> str:
    return find_teacher(DistillConfig.model_validate(changed(project, **sections))).fingerprint()


def test_fingerprint_follows_the_weights_alone(tmp_path, project):
    """Fault: a moved teacher is another one, or one that was trained on is still the same."""
    first = fingerprint(project)
    edit_config(tmp_path / "teacher", transformers_version="4.0", prompt_max_length=7)
    assert fingerprint(project) == first
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert fingerprint(project, **with_teacher(tmp_path / "moved")) == first
    found = {first}
    edit_config(tmp_path / "moved", layer_norm_epsilon=0.1)  # the same weights compute something else
    found.add(fingerprint(project, **with_teacher(tmp_path / "moved")))
    for seed in (5, 13):
        torch.save(tiny_teacher(seed=seed).state_dict(), tmp_path / "old.pt")
        found.add(fingerprint(project, **with_teacher(tmp_path / "old.pt", str(tmp_path / "moved"))))
    save_model(tmp_path / "moved", tiny_teacher(seed=13), DEFAULT_TEMPLATE)
    found.add(fingerprint(project, **with_teacher(tmp_path / "moved")))
    tiny_teacher(seed=14).save_pretrained(tmp_path / "moved", max_shard_size="30KB")
    (tmp_path / "moved/model.safetensors").unlink()
    found.add(fingerprint(project, **with_teacher(tmp_path / "moved")))
    shard = sorted((tmp_path / "moved").glob("*-of-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    found.add(fingerprint(project, **with_teacher(tmp_path / "moved")))
    assert len(found) == 7
