"""Which weights scores are of: recorded beside them, and told by utils.compare where they are gone."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import validate_model
from tests import small_runs
from tests.conftest import ROOT, tiny_language_model, write_rows
from tests.score_folders import objects_of, refusal, shown, write_run, write_scores
from utils.evaluation.weights import weights_of


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def remarks(capsys, *arguments) -> list[str]:
    return [line for line in shown(capsys, *arguments).splitlines() if line.startswith("the weights behind")]


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


def test_digest_of_several_files(tmp_path):
    """Fault: a change of one shard goes unseen, or the digest depends on the order in which a folder lists them."""
    gpt2 = tiny_language_model().model
    found = []
    for name, value in (("a", None), ("b", None), ("c", 1.0)):
        if value is not None:
            gpt2.transformer.ln_f.bias.data[0] = value  # in the last shard alone
        gpt2.save_pretrained(tmp_path / name, max_shard_size="10KB")
        found.append(weights_of(tmp_path / name)["sha256"])
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert found[0] == found[1] != found[2]


def test_checkpoints_are_not_read_again(tmp_path):
    """Fault: a comparison reads gigabytes of checkpoints; or it takes a manifest for what it does not say."""
    assert small_runs.run(tmp_path, small_runs.make_project(tmp_path, rows=8)) == 0
    step = tmp_path / "run/model_checkpoints/step-4"
    before = {"sha256": digest(step / "model.safetensors"), "step": 4}
    (step / "model.safetensors").write_bytes(b"")
    assert weights_of(step) == weights_of(step.parent / "best") == before


def test_scores_say_their_weights(tmp_path):
    """Fault: scores of a training or of validate_model.py that cannot be told from those of other weights."""
    config = small_runs.changed(small_runs.make_project(tmp_path, rows=8),
                                trainer_kwargs={"metrics": ["rouge"], "epochs": 2})
    assert small_runs.run(tmp_path, config) == 0
    root = tmp_path / "run/model_checkpoints"
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["weights"] == {"sha256": digest(root / "step-8/model.safetensors"), "step": 8}
    assert validate(tmp_path, root / "step-4")["weights"] == {"path": str(root / "step-4"),
        "sha256": digest(root / "step-4/model.safetensors"), "step": 4}
    assert validate(tmp_path, tmp_path / "model")["weights"]["step"] is None
    assert validate(tmp_path, "lead-3")["weights"] == {"sha256": None, "step": None}


def validate(tmp_path: Path, model_path, out: str = "out") -> dict:
    arguments = ["--csv_path", tmp_path / "validation.csv", "--model_path", model_path, "--output_dir", tmp_path / out,
                 "--device_id", "-1", "--max_generation_length", "8", "--precision", "float32"]
    assert validate_model.main(list(map(str, arguments))) == 0
    return json.loads((tmp_path / out / "scores.json").read_text())


def test_weights_that_are_not_kept(tmp_path, capsys):
    """Fault: scores of an epoch whose weights are not kept name those of another, or are told to be gone."""
    config = small_runs.changed(
        small_runs.make_project(tmp_path, rows=8), trainer_kwargs={"metrics": ["rouge"], "epochs": 2},
        optimizer_kwargs={"lm_lr": 9.0},  # no word is right in either epoch, so that the first stays best
        callbacks_kwargs={"kwargs": {"save_final_model": False, "mode": "max"}})
    assert small_runs.run(tmp_path, config) == 0
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert not (tmp_path / "run/model_checkpoints/step-8").exists()
    assert scores["weights"] == {"sha256": None, "step": 8}
    capsys.readouterr()
    assert remarks(capsys, tmp_path / "run") == []


def test_kill_between_checkpoint_and_scores(tmp_path):
    """Fault: scores lack their weights for ever where a kill came after the checkpoint and before they were noted."""
    config = small_runs.changed(small_runs.make_project(tmp_path, rows=8), trainer_kwargs={"metrics": ["rouge"]})
    assert small_runs.run(tmp_path, config) == 0
    path = tmp_path / "run/scores.json"
    whole = path.read_bytes()
    path.write_text(json.dumps({**json.loads(whole), "weights": {"sha256": None, "step": 4}}))
    assert small_runs.run(tmp_path, config) == 0  # it is finished, and says so
    assert path.read_bytes() == whole


# -- what compare says ---------------------------------------------------------------------------------------------


def test_scores_of_an_earlier_training(tmp_path, capsys):
    """Fault: old scores under the new run's name and speed, after a new training in the same folder."""
    config = small_runs.make_project(tmp_path, rows=8)
    assert small_runs.run(tmp_path, config) == 0
    best = tmp_path / "run/model_checkpoints/best"
    validate(tmp_path, best, "run/test")
    capsys.readouterr()
    assert remarks(capsys, tmp_path / "run/test") == []
    assert objects_of(capsys, tmp_path / "run/test")["test"]["tokens_per_second"] > 0
    again = small_runs.changed(config, trainer_kwargs={"load_from_checkpoint": False, "seed": 5})
    assert small_runs.run(tmp_path, again) == 0
    capsys.readouterr()
    folder = tmp_path / "run/test"
    assert remarks(capsys, folder) == [
        f"the weights behind test (step 4, {best}) are no longer there, deleted or replaced since: score what is there "
        f"now with validate_model.py --output_dir {folder}"]
    assert objects_of(capsys, folder)["test"]["tokens_per_second"] is None
    validate(tmp_path, best, "run/test")
    capsys.readouterr()
    assert remarks(capsys, folder) == []


def test_model_folder_that_was_written_anew(tmp_path, capsys):
    """Fault: scores of a model folder of any other origin stay, whatever is in it now."""
    tiny_language_model().save(tmp_path / "model")
    write_rows(tmp_path / "validation.csv", small_runs.make_rows(3))
    validate(tmp_path, tmp_path / "model")
    capsys.readouterr()
    assert remarks(capsys, tmp_path / "out") == []
    tiny_language_model(seed=2).save(tmp_path / "model")
    (told,) = remarks(capsys, tmp_path / "out")
    assert told.startswith(f"the weights behind out ({tmp_path / 'model'}) are no longer there")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert remarks(capsys, tmp_path / "out") == [told]


def checkpoint(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def recorded(run: Path, content: bytes, step: int = 7) -> Path:
    path = run / "scores.json"
    weights = {"sha256": sha256(content).hexdigest(), "step": step}
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": weights}))
    return run


def test_step_that_a_training_no_longer_keeps(tmp_path, capsys):
    """Fault: a training whose scored step was deleted by keep_checkpoints loses its speed, or nothing is said."""
    run = recorded(write_run(tmp_path / "run", speeds=(1, 20), validation=[0.5]), b"seven")
    checkpoint(run / "model_checkpoints/step-9", b"nine")
    assert remarks(capsys, run) == [
        f"the weights behind run (step 7, {run}/model_checkpoints/step-7) are no longer there, deleted or replaced "
        f"since: score what is there now with validate_model.py --output_dir {run}/evaluation"]
    assert objects_of(capsys, run)["run"]["tokens_per_second"] == 20
    step = checkpoint(run / "model_checkpoints/step-7", b"other")
    assert len(remarks(capsys, run)) == 1
    assert objects_of(capsys, run)["run"]["tokens_per_second"] is None
    (step / "model.safetensors").write_bytes(b"seven")
    assert remarks(capsys, run) == []
    assert objects_of(capsys, run)["run"]["tokens_per_second"] == 20


@pytest.mark.parametrize(("weights", "model_path"), [
    (None, "absent"), ({}, "absent"), ({"sha256": None, "step": None}, "gpt2"), ({"sha256": None, "step": 3}, "absent"),
])
def test_weights_that_nothing_is_known_of(tmp_path, capsys, weights, model_path):
    """Fault: scores of an older version, or of a model of the hub, are told to be of weights that are gone."""
    assert remarks(capsys, write_scores(tmp_path / "a", weights=weights, settings={"model_path": model_path})) == []


@pytest.mark.parametrize("model_path", [None, 3, "a\0b", "\x1b[31m"])
def test_paths_of_another_kind(tmp_path, capsys, model_path):
    """Fault: a traceback, or control characters on the console, for a path that no script wrote."""
    known = {"sha256": "00" * 32, "step": None}
    folder = write_scores(tmp_path / "a", weights=known, settings={"model_path": model_path})
    (told,) = remarks(capsys, folder)
    assert told.isprintable()
    for weights in ("x", {"sha256": "00", "step": "\x1b"}):
        assert "is not a scores.json" in refusal(capsys, write_scores(tmp_path / "b", weights=weights))


def test_comparing_needs_no_torch():
    """Fault: a table takes ten seconds because something that it needs takes torch with it."""
    code = "import sys, utils.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
