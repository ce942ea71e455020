"""Folders that scripts write into: shared by no two runs, none that a training needs, earlier runs archived."""

from pathlib import Path

import pytest

import validate_model
from tests.runs.test_run_lock import snapshot
from tests.small_runs import changed, error_line, make_project, run
from utils.runs.run_folder import archive_previous_run

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
    "model_checkpoints", "model_checkpoints/step-2/scores", "model_checkpoints/step-9", "link",
])
def test_a_place_for_checkpoints_is_refused(finished, tmp_path, capsys, name):
    """Fault: the folder is locked, or replaced, beside a training that saves there: it waits, and loses its epoch."""
    folder, config = finished
    root = folder / "run/model_checkpoints"
    if name == "link":
        (tmp_path / "link").symlink_to(root)
    output_dir = (folder / "run" if name.startswith("model") else tmp_path) / name
    before, words = snapshot(folder), f"{output_dir} is reserved for checkpoints of a training run: name another folder"
    capsys.readouterr()
    assert evaluate(output_dir, folder / "validation.csv") == 2
    assert f"--output_dir: {words}" in error_line(capsys)
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(output_dir)})) == 2
    assert f"trainer_kwargs.output_dir: {words}" in error_line(capsys)
    assert snapshot(folder) == before


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
        assert f"--output_dir: {output_dir} is a training run's folder" in (line := error_line(capsys))
        assert snapshot(folder) == before
        assert evaluate(Path(line.rpartition("such as ")[2]), folder / "validation.csv") == 0
    finally:
        (folder / "aside").rename(output_dir / other)


# -- earlier runs --------------------------------------------------------------------------------------------------

NAMES = ["model_checkpoints", "metrics.jsonl", "scores.json"]


def test_an_earlier_run_is_archived(tmp_path):
    """Fault: a new run in a used folder overwrites the earlier one, or moves what is not a run's."""
    assert archive_previous_run(tmp_path, NAMES) is None and not list(tmp_path.iterdir())
    (tmp_path / "earlier-run-9").mkdir()
    for name in ("mine.txt", "metrics.jsonl"):
        (tmp_path / name).write_text("1")
    (tmp_path / "model_checkpoints/step-1").mkdir(parents=True)
    assert archive_previous_run(tmp_path, NAMES) == tmp_path / "earlier-run-10"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-run-10", "earlier-run-9", "mine.txt"]
    assert (tmp_path / "earlier-run-10/metrics.jsonl").read_text() == "1"
    assert (tmp_path / "earlier-run-10/model_checkpoints/step-1").is_dir()


# -- names and places ----------------------------------------------------------------------------------------------


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
