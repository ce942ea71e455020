"""Which weights scores are of: recorded beside them, and a remark of utils.compare if they are gone."""

import json
from hashlib import sha256
from pathlib import Path

import torch

import validate_model
from tests import small_runs
from tests.conftest import tiny_language_model
from tests.score_folders import objects_of, shown
from utils.evaluation.weights import weights_of


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def remarks(capsys, *arguments) -> list[str]:
    capsys.readouterr()
    return [line for line in shown(capsys, *arguments).splitlines() if line.startswith("the weights behind")]


def speed(capsys, folder: Path) -> float | None:
    return objects_of(capsys, folder)[folder.name]["tokens_per_second"]


def validate(tmp_path: Path, model_path, out: str = "out") -> dict:
    arguments = ["--csv_path", tmp_path / "validation.csv", "--model_path", model_path, "--output_dir", tmp_path / out,
                 "--device_id", "-1", "--max_generation_length", "8", "--precision", "float32"]
    assert validate_model.main(list(map(str, arguments))) == 0
    return json.loads((tmp_path / out / "scores.json").read_text())


# -- what is recorded ----------------------------------------------------------------------------------------------


def test_digest_of_a_file_is_that_of_sha256sum(tmp_path):
    """Fault: a digest that no tool can check, or one of a file that is not loaded."""
    model = tiny_language_model()
    model.save(tmp_path / "model")
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"older")
    torch.save(model.model.state_dict(), tmp_path / "old.pt")
    for path, file in (("model", "model/model.safetensors"), ("old.pt", "old.pt")):
        assert weights_of(tmp_path / path) == {"sha256": digest(tmp_path / file), "step": None}
    (tmp_path / "model/model.safetensors").unlink()
    assert weights_of(tmp_path / "model")["sha256"] == sha256(b"older").hexdigest()
    assert weights_of("gpt2") == weights_of(tmp_path) == {"sha256": None, "step": None}


def test_scores_say_their_weights(tmp_path):
    """Fault: scores do not say which weights they are of, never if a kill came before that was noted, or gigabytes of
    checkpoints are read to find out."""
    config = small_runs.changed(small_runs.make_project(tmp_path, rows=8),
                                trainer_kwargs={"metrics": ["rouge"], "epochs": 2})
    assert small_runs.run(tmp_path, config) == 0
    root, path = tmp_path / "run/model_checkpoints", tmp_path / "run/scores.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    weights = {"sha256": digest(root / "step-8/model.safetensors"), "step": 8}
    assert content["weights"] == weights
    assert validate(tmp_path, root / "step-4")["weights"] == {
        "path": str(root / "step-4"), "sha256": digest(root / "step-4/model.safetensors"), "step": 4}
    assert validate(tmp_path, tmp_path / "model")["weights"]["step"] is None
    assert validate(tmp_path, "lead-3")["weights"] == {"sha256": None, "step": None}
    path.write_text(json.dumps({**content, "weights": {"sha256": None, "step": 8}}))
    assert small_runs.run(tmp_path, config) == 0  # it is finished, and says so
    assert json.loads(path.read_text())["weights"] == weights
    (root / "step-8/model.safetensors").write_bytes(b"")
    assert weights_of(root / "step-8") == weights


# -- what compare says ---------------------------------------------------------------------------------------------


def test_scores_of_an_earlier_training(tmp_path, capsys):
    """Fault: old scores under the new run's name and speed, after a new training in the same folder."""
    config = small_runs.make_project(tmp_path, rows=8)
    assert small_runs.run(tmp_path, config) == 0
    best, folder = tmp_path / "run/model_checkpoints/best", tmp_path / "run/test"
    validate(tmp_path, best, "run/test")
    assert remarks(capsys, folder) == [] and speed(capsys, folder) > 0
    again = small_runs.changed(config, trainer_kwargs={"load_from_checkpoint": False, "seed": 5})
    assert small_runs.run(tmp_path, again) == 0
    assert remarks(capsys, folder) == [
        f"the weights behind test (step 4, {best}) are no longer there, deleted or replaced since: score what is there "
        f"now with validate_model.py --output_dir {folder}"]
    assert speed(capsys, folder) is None
