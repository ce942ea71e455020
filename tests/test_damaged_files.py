"""Damaged checkpoints, caches, logs and results are found before they are used, and named (tests/faults/damage.py)."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.damage import (
    checkpoint_targets,
    damages,
    result_targets,
    teacher_cache_targets,
    token_table_targets,
    tried,
)
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import assert_equal_weights, changed, make_project, metrics, run, weights
from utils.runs.checkpoint import CheckpointError, verify
from validate_model import main as validate_main

pytestmark = pytest.mark.usefixtures("one_thread")


def flip(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def error_line(capsys) -> str:
    """The one error that was told."""
    [line] = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if ".py: error: " in line]
    return line


HARMS = {"flipped": flip, "cut": lambda path: os.truncate(path, path.stat().st_size // 2), "deleted": Path.unlink,
         "emptied": lambda path: path.write_bytes(b""), "a folder": replace_by_folder}


# -- every file, at random places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    checkpoint_targets, token_table_targets, result_targets, lambda folder: teacher_cache_targets(folder, "hidden"),
    lambda folder: teacher_cache_targets(folder, "top_k"),
], ids=["checkpoint", "token table", "results", "hidden", "top-k"])
def test_no_damage_is_used(tmp_path, make):
    """A file cut short, emptied, deleted, replaced by a folder or with one bit changed is read as if it were whole."""
    endings, used = tried(make(tmp_path), tries=2, seed=7)
    assert used == []
    assert endings.total() > 10 and endings["harmless"] <= 2


def test_damages_are_of_every_kind_and_leave_no_trace(tmp_path):
    """The damages of these tests leave out a kind or the ends of a file, or damage the next test's files."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(64)))
    seen, bits = [], set()
    for what in damages(path, 20, random.Random(3)):
        seen.append(what.split()[0])
        if what.startswith("bit"):
            harmed = path.read_bytes()
            [place] = [place for place in range(64) if harmed[place] != place]
            bits.add(place)
            assert bin(harmed[place] ^ place).count("1") == 1
        elif what.startswith("cut"):
            assert bytes(range(64)).startswith(path.read_bytes()) and path.stat().st_size < 64
    assert {*seen} == {"emptied", "deleted", "replaced", "cut", "bit"} and {0, 63} <= bits and len(bits) > 10
    assert path.read_bytes() == bytes(range(64))


# -- a run goes on -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A run of four steps that keeps them all, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = changed(make_project(folder, rows=8, dropout=0.1), trainer_kwargs={
        "n_batch_ckpt_save": 1, "keep_checkpoints": 9, "precision": "float32"})
    assert run(folder, config) == 0
    return folder, config


@pytest.fixture
def again(finished, tmp_path) -> tuple[Path, dict]:
    """A copy of it that was killed after step 3, and its config."""
    folder, config = finished
    output_dir = tmp_path / "run"
    shutil.copytree(folder / "run", output_dir, symlinks=True)
    root = output_dir / "model_checkpoints"
    shutil.rmtree(root / "step-4")
    for link in ("last", "best"):
        (root / link).unlink()
        (root / link).symlink_to("step-3")
    return output_dir, changed(config, trainer_kwargs={"output_dir": str(output_dir)})


def assert_same_end(finished, output_dir: Path) -> None:
    whole = finished[0] / "run"
    assert_equal_weights(weights(whole / "model_checkpoints/last"), weights(output_dir / "model_checkpoints/last"))
    assert metrics(whole) == metrics(output_dir)
    verify(output_dir / "model_checkpoints/last")


@pytest.mark.parametrize(("name", "harm"), [
    ("model.safetensors", "flipped"), ("trainer_state/optimizer.pt", "cut"), ("trainer_state/random.pt", "emptied"),
    ("trainer_state/objective.pt", "deleted"), ("trainer_state/state.json", "flipped"),
    ("trainer_state/manifest.json", "a folder"), ("config.json", "cut"),
])
def test_the_next_older_checkpoint_is_taken(finished, again, tmp_path, capsys, name, harm):
    """A run goes on from a damaged checkpoint, or from the beginning, or ends in a traceback; or nothing is said."""
    output_dir, config = again
    HARMS[harm](output_dir / "model_checkpoints/step-3" / name)
    assert run(tmp_path, config) == 0
    told = capsys.readouterr().err
    assert "passed over step-3: " in told and str(output_dir / "model_checkpoints/step-3" / name) in told
    assert f"resuming from {output_dir / 'model_checkpoints/step-2'} (optimizer step 2)" in told
    assert_same_end(finished, output_dir)


def test_another_run_id_is_damage_like_any_other(finished, again, tmp_path, capsys):
    """One bit in the name of the run makes all its checkpoints those of another one."""
    output_dir, config = again
    path = output_dir / "model_checkpoints/step-3/trainer_state/state.json"
    flip(path, path.read_bytes().index(json.loads(path.read_text())["run_id"].encode()))
    assert run(tmp_path, config) == 0
    assert f"passed over step-3: {path}: changed since it was written" in capsys.readouterr().err
    assert_same_end(finished, output_dir)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(again, tmp_path, capsys):
    """`resume_from` goes on from damaged weights, or from another checkpoint than the one that was named."""
    output_dir, config = again
    damaged = output_dir / "model_checkpoints/step-2"
    flip(damaged / "model.safetensors")
    other = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "other"), "resume_from": str(damaged)})
    assert run(tmp_path, other) == 2
    line = error_line(capsys)
    assert f"trainer_kwargs.resume_from: {damaged / 'model.safetensors'}: changed since it was written" in line
    assert f"such as {output_dir / 'model_checkpoints/step-3'}, which is whole" in line
    assert not (tmp_path / "other/model_checkpoints").exists()


def test_no_whole_checkpoint_is_an_error(again, tmp_path, capsys):
    """Hours of training are begun anew, without a question, because every checkpoint is damaged."""
    output_dir, config = again
    for step in (1, 2, 3):
        flip(output_dir / f"model_checkpoints/step-{step}/model.safetensors")
    before = sorted(output_dir.rglob("*"))
    assert run(tmp_path, config) == 2
    line = error_line(capsys)
    assert "none of its checkpoints is whole" in line and "load_from_checkpoint to false" in line
    assert "step-3/model.safetensors" in line and sorted(output_dir.rglob("*")) == before
    assert run(tmp_path, changed(config, trainer_kwargs={"load_from_checkpoint": False})) == 0
    assert (output_dir / "earlier-run-1/model_checkpoints/step-3").is_dir()


@pytest.mark.parametrize("harm", ["deleted", "dangling", "a file", "a folder"])
def test_a_damaged_link_is_no_obstacle(finished, again, tmp_path, harm):
    """`last` is needed to go on, or a run of somebody else is taken for the newest where it is missing."""
    output_dir, config = again
    root = output_dir / "model_checkpoints"
    shutil.copytree(root / "step-1", root / "step-1000")
    state = json.loads((root / "step-1000/trainer_state/state.json").read_text())
    text = json.dumps({**state, "run_id": "another", "step": 1000, "saved_at": "2001-01-01T00:00:00+00:00"})
    (root / "step-1000/trainer_state/state.json").write_text(text)
    (root / "last").unlink()
    {"deleted": lambda: None, "dangling": lambda: (root / "last").symlink_to("step-77"),
     "a file": lambda: (root / "last").write_text("x"), "a folder": (root / "last").mkdir}[harm]()
    assert run(tmp_path, config) == 0
    assert_same_end(finished, output_dir)


@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped", "a key flipped"])
def test_the_config_of_a_run_is_not_needed_to_go_on(finished, again, tmp_path, harm, capsys):
    """A damaged config.json, which a run writes anew, keeps it from going on as if the folder were somebody else's."""
    output_dir, config = again
    path = output_dir / "config.json"
    place = path.read_bytes().index(b"environment") if harm == "a key flipped" else 0
    flip(path, place) if "flipped" in harm else HARMS[harm](path)
    assert run(tmp_path, config) == 0
    assert f"{path} is damaged" in capsys.readouterr().err
    assert_same_end(finished, output_dir)
    assert "_description_environment" in json.loads(path.read_text())


@pytest.mark.parametrize("harm", ["a bad line", "no end", "not text"])
def test_a_damaged_log_is_no_obstacle(finished, again, tmp_path, harm, capsys):
    """One damaged line of the log ends every later run, or is lost without a word."""
    output_dir, config = again
    path = output_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {"a bad line": b'{"split": "tr\n', "not text": b"\xff\xfe\n", "no end": b""}[harm]
    content = b"".join([lines[0], bad, *lines[1:]])
    path.write_bytes(content[:-9] if harm == "no end" else content)
    before = path.read_bytes()
    assert run(tmp_path, config) == 0
    assert_same_end(finished, output_dir)
    if harm != "no end":
        assert "line 2 cannot be read" in capsys.readouterr().err
        assert (output_dir / "metrics.damaged-1.jsonl").read_bytes() == before


def test_damaged_caches_are_made_anew_by_the_runs(tmp_path, capsys):
    """A run reads a damaged token table or teacher cache, ends because of it, or comes to other weights."""
    config = changed(make_kd_project(tmp_path, rows=6, kl_div="JS", teacher_cache={"kind": "hidden"}),
                     trainer_kwargs={"load_from_checkpoint": False}, dataset_kwargs={"cache_dir": None})
    assert run_kd(tmp_path, config) == 0
    expected = weights(tmp_path / "run/model_checkpoints/last")
    harmed = 0
    for pattern in ("teacher_cache/train-*/*", "token_cache/train-*/*"):
        for number, path in enumerate(sorted((tmp_path / "run").glob(pattern))):
            list(HARMS.values())[number % len(HARMS)](path)
            harmed += 1
        assert run_kd(tmp_path, config) == 0
        assert_equal_weights(expected, weights(tmp_path / "run/model_checkpoints/last"))
    assert harmed == 11 and "a damaged one was there" in capsys.readouterr().err


# -- a checkpoint as a model ---------------------------------------------------------------------------------------


@pytest.fixture
def harmed_model(finished, tmp_path) -> Path:
    """A checkpoint with a flipped bit in its weights, beside a whole one."""
    root = tmp_path / "of-another/model_checkpoints"
    for step in (3, 4):
        shutil.copytree(finished[0] / f"run/model_checkpoints/step-{step}", root / f"step-{step}")
    flip(root / "step-4/model.safetensors")
    return root / "step-4"


def refused(harmed_model: Path, capsys, key: str) -> None:
    line = error_line(capsys)
    assert f"{key}: {harmed_model / 'model.safetensors'}: changed since it was written (other SHA-256)" in line
    assert f"name another checkpoint, such as {harmed_model.parent / 'step-3'}, which is whole" in line


def test_a_damaged_checkpoint_is_not_fine_tuned(harmed_model, tmp_path, capsys):
    """A training begins from damaged weights that load without an error."""
    config = make_project(tmp_path)
    for key in ("lang_model", "tokenizer"):
        assert run(tmp_path, changed(config, model_arch={key: str(harmed_model)})) == 2
        refused(harmed_model, capsys, f"model_arch.{key}")


@pytest.mark.parametrize(("section", "key"), [
    ("trainer_kwargs", "teacher_ckpt_path"), ("trainer_kwargs", "student_ckpt_path"),
    ("model_arch", "student_lang_model"), ("model_arch", "teacher_lang_model"),
])
def test_a_damaged_checkpoint_teaches_and_learns_nothing(harmed_model, tmp_path, capsys, section, key):
    """A teacher or student with damaged weights is distilled."""
    config = make_kd_project(tmp_path)
    if key == "teacher_lang_model":
        config = changed(config, trainer_kwargs={"teacher_ckpt_path": None})
    assert run_kd(tmp_path, changed(config, **{section: {key: str(harmed_model)}})) == 2
    refused(harmed_model, capsys, f"{section}.{key}")


@pytest.mark.parametrize("key", ["model_path", "model_name"])
def test_a_damaged_checkpoint_is_not_evaluated(harmed_model, finished, tmp_path, capsys, key):
    """Scores of damaged weights are published."""
    arguments = {"csv_path": finished[0] / "validation.csv", "output_dir": tmp_path / "out", "device_id": -1,
                 "model_path": harmed_model.parent / "step-3", key: harmed_model}
    assert validate_main([text for name, value in arguments.items() for text in (f"--{name}", str(value))]) == 2
    refused(harmed_model, capsys, f"--{key}")
    assert not (tmp_path / "out/scores.json").exists()


def test_a_model_needs_no_optimizer(finished, tmp_path, capsys):
    """A checkpoint whose optimizer state was deleted to save room, or damaged, cannot be evaluated any more."""
    model = tmp_path / "model"
    shutil.copytree(finished[0] / "run/model_checkpoints/step-4", model)
    (model / "trainer_state/optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: missing"):
        verify(model)
    (tmp_path / "other").mkdir()
    config = changed(make_project(tmp_path / "other", rows=2), model_arch={"lang_model": str(model)})
    assert run(tmp_path, config) == 0
    shutil.rmtree(model / "trainer_state")  # a plain model folder, of which nothing is known
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "third")})) == 0
