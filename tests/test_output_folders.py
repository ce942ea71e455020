"""Folders that scripts write into: none that a training needs, none left behind by a failed start, `~` is the home."""

import errno
import tempfile
from pathlib import Path

import pytest

import validate_model
from tests.conftest import write_rows
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import changed, make_project, make_rows, metrics, run
from tests.test_damaged_files import error_line
from tests.test_run_lock import snapshot
from utils.config.load import ConfigError
from utils.runs import result_folder
from utils.runs.result_folder import is_of_training, output_folder, write_results

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(output_dir: Path, csv: Path, model: str = "lead-3") -> int:
    return validate_model.main(["--csv_path", str(csv), "--model_path", model, "--output_dir", str(output_dir),
                                "--device_id", "-1"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A project with a finished run, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = changed(make_project(folder, rows=4), trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    assert run(folder, config) == 0
    return folder, config


# -- a training's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "model_checkpoints", "model_checkpoints/last", "model_checkpoints/step-2", "model_checkpoints/step-2/scores",
    "model_checkpoints/step-9", "link", "renamed",
])
def test_a_place_for_checkpoints_is_refused(finished, tmp_path, capsys, name):
    """Fault: the folder is locked, or replaced, beside a training that saves there: it waits, and loses its epoch."""
    folder, config = finished
    root = folder / "run/model_checkpoints"
    if name == "link":
        (tmp_path / "link").symlink_to(root)
    elif name == "renamed":
        (tmp_path / "renamed/step-3/trainer_state").mkdir(parents=True)
    output_dir = (folder / "run" if name.startswith("model") else tmp_path) / name
    before, words = snapshot(folder), f"{output_dir} is a place for the checkpoints of a training: name another folder"
    capsys.readouterr()
    assert evaluate(output_dir, folder / "validation.csv") == 2
    assert f"--output_dir: {words}" in error_line(capsys)
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(output_dir)})) == 2
    assert f"trainer_kwargs.output_dir: {words}" in error_line(capsys)
    assert snapshot(folder) == before


def test_folders_with_such_names_of_somebody_else_are_taken(tmp_path):
    """Fault: whoever keeps runs below a folder model_checkpoints, or names them step-1, cannot work there."""
    for name in ("model_checkpoints/mine", "step-1", "last"):
        with output_folder(tmp_path / name, "key"):
            (tmp_path / name / "x").write_text("x")
    with output_folder(tmp_path, "key"):
        pass


@pytest.mark.parametrize("sign", ["model_checkpoints", "config.json"])
def test_scores_of_a_training_are_not_replaced(finished, capsys, sign):
    """Fault: an evaluation into the folder of a training replaces its scores.json without a word."""
    folder, _ = finished
    output_dir, other = folder / "run", {"model_checkpoints": "config.json", "config.json": "model_checkpoints"}[sign]
    (output_dir / other).rename(folder / "aside")
    try:
        before = snapshot(folder)
        capsys.readouterr()
        assert evaluate(output_dir, folder / "validation.csv") == 2
        assert f"--output_dir: {output_dir} is the folder of a training" in (line := error_line(capsys))
        assert snapshot(folder) == before
        assert evaluate(Path(line.rpartition("such as ")[2]), folder / "validation.csv") == 0
    finally:
        (folder / "aside").rename(output_dir / other)


def test_an_evaluation_repeats_into_its_own_folder(tmp_path):
    """Fault: a second evaluation is refused where the first one wrote."""
    csv = write_rows(tmp_path / "x.csv", make_rows(3))
    assert [evaluate(tmp_path / "out", csv) for _ in "ab"] == [0, 0]
    assert not is_of_training(tmp_path / "out")


# -- failed starts -----------------------------------------------------------------------------------------------


def test_a_failed_start_leaves_no_folders(tmp_path):
    """Fault: a mistyped path leaves an empty output_dir, its parents and caches; or what was there before goes."""
    config = make_project(tmp_path, rows=4)
    write_rows(tmp_path / "bad.csv", [{"id": "a", "article": "", "highlights": "b"}])
    (tmp_path / "there").mkdir()
    before = {*tmp_path.rglob("*"), tmp_path / "config.json"}
    for parent in ("there", "new"):
        into = {"output_dir": str(tmp_path / parent / "a/b")}
        for section, values in (("model_arch", {"lang_model": str(tmp_path / "absent")}),
                                ("dataset_kwargs", {"train_dataset": "absent.csv"}),
                                ("dataset_kwargs", {"train_dataset": "bad.csv", "cache_dir": None}),
                                ("dataset_kwargs", {"train_dataset": "bad.csv"}),
                                ("trainer_kwargs", {"resume_from": str(tmp_path / "absent")})):
            assert run(tmp_path, changed(changed(config, trainer_kwargs=into), **{section: values})) == 2
        assert evaluate(tmp_path / parent / "c/d", tmp_path / "train.csv", str(tmp_path / "absent")) == 2
        assert {*tmp_path.rglob("*")} == before


def test_a_failed_start_with_a_teacher_leaves_no_folders(tmp_path):
    """Fault: a mistyped teacher leaves an empty output_dir."""
    config = make_kd_project(tmp_path, rows=4)
    assert run_kd(tmp_path, changed(config, trainer_kwargs={"teacher_ckpt_path": str(tmp_path / "absent")})) == 2
    assert not (tmp_path / "run").exists()


def test_what_was_put_into_a_new_folder_stays(tmp_path):
    """Fault: a start that fails takes along what somebody has put into the folder meanwhile."""
    with pytest.raises(ConfigError), output_folder(tmp_path / "a/b", "key"):
        (tmp_path / "a/mine").write_text("x")
        raise ConfigError("later")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_leaves_no_parents(tmp_path):
    """Fault: the parents of a name that no file system takes stay."""
    with pytest.raises(ConfigError, match="File name too long"), output_folder(tmp_path / "a" / ("b" * 300), "key"):
        pass
    assert not list(tmp_path.iterdir())


# -- names and results -------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Fault: output_dir "~/run" makes a folder named ~ where the command was started."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    config = make_project(tmp_path / "home", rows=2)
    paths = changed(config, model_arch={"lang_model": "~/model"}, trainer_kwargs={"output_dir": "~/run"},
                    dataset_kwargs={"data_dir": "~", "cache_dir": "~/cache"})
    assert run(tmp_path, paths) == 0
    assert (tmp_path / "home/run/model_checkpoints/last").is_dir()
    assert validate_model.main(["--csv_path=~/validation.csv", "--model_path=~/run/model_checkpoints/last",
                                "--output_dir=~/out", "--max_generation_length=2", "--device_id=-1"]) == 0
    assert (tmp_path / "home/out/scores.json").is_file()
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": "~nobody-of-this-name/run"})) == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["~nobody-of-this-name"]


def test_no_empty_folder_where_neither_disk_has_room(tmp_path, monkeypatch):
    """Fault: results that find no room in the temporary folder either leave an empty folder there."""
    def full(folder, texts):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    monkeypatch.setattr(result_folder, "write_together", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_results(tmp_path, {"scores.json": ""})
    assert caught.value.filename == str(tmp_path)
    assert not list((tmp_path / "system").iterdir())


def test_folders_on_another_disk(tmp_path):
    """Fault: whoever keeps checkpoints and curves on another disk, by links to folders, is refused."""
    config = changed(make_project(tmp_path, rows=4), trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    assert run(tmp_path, config) == 0
    (tmp_path / "disk").mkdir()
    for name in ("model_checkpoints", "tensorboard", "predictions"):
        (tmp_path / "run" / name).rename(tmp_path / "disk" / name)
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    assert run(tmp_path, changed(config, trainer_kwargs={"epochs": 2})) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert {path.name for path in (tmp_path / "disk/predictions").iterdir()} == {
        "validation-step-2.json", "validation-step-4.json"}
