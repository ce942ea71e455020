"""Checkpoints are whole or absent, verified, retired in order and repeat the run: utils/runs/checkpoint.py."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.files import folder_lock
from utils.runs import checkpoint
from utils.runs.checkpoint import CheckpointError, Checkpoints, load_state, verify
from utils.runs.earlier_runs import archive_previous_run
from utils.training.random_state import random_state, seed_everything, set_random_state

PARTS = ["weights.bin", "config.json", "trainer_state/optimizer.pt", "trainer_state/state.json"]


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by path."""
    paths = {str(path.relative_to(root)): path for path in root.rglob("*")}
    links = {name: str(path.readlink()) for name, path in paths.items() if path.is_symlink()}
    return links | {name: path.read_bytes() for name, path in paths.items() if path.is_file() and not path.is_symlink()}


def writer(step: int):
    """Stands for `save_pretrained`: two files that tell the step."""

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes([step % 256]) * 3000)
        (folder / "config.json").write_text(json.dumps({"of_step": step}))

    return write


def save(checkpoints: Checkpoints, step: int, write=None, **options) -> Path:
    tensors = {"optimizer": {"exp_avg": torch.full((50,), float(step)), "step": step}}
    return checkpoints.save(step, write or writer(step), {"epoch": 3, "best_score": 0.25}, tensors, **options)


def assert_of_step(folder: Path, step: int) -> None:
    """All parts are there and of one step, by other means than the code under test."""
    assert (folder / "weights.bin").read_bytes() == bytes([step % 256]) * 3000
    assert json.loads((folder / "config.json").read_text()) == {"of_step": step}
    assert json.loads((folder / "trainer_state" / "state.json").read_text())["step"] == step
    assert torch.load(folder / "trainer_state" / "optimizer.pt")["exp_avg"].tolist() == [float(step)] * 50


def steps_of(root: Path) -> list[str]:
    return sorted((path.name for path in root.iterdir() if path.name.startswith("step-")), key=lambda n: int(n[5:]))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "run" / "model_checkpoints"


def test_parts_of_a_checkpoint(root):
    """A part, or a file in the manifest, is missing; the added entries of the state are not there."""
    old = os.umask(0o027)
    try:
        folder = save(Checkpoints(root, "run-a", 2), 10, best=True)
    finally:
        os.umask(old)
    assert folder == root / "step-10" and stat.S_IMODE(folder.stat().st_mode) == 0o750
    manifest = json.loads((folder / "trainer_state" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(PARTS)
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    state, tensors = load_state(root / "last")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", state.pop("saved_at"))
    assert state == {"epoch": 3, "best_score": 0.25, "step": 10, "run_id": "run-a", "format_version": 1}
    assert tensors["optimizer"]["exp_avg"].tolist() == [10.0] * 50
    assert [str((root / link).readlink()) for link in ("last", "best")] == ["step-10", "step-10"]
    assert_of_step(root / "last", 10)


def test_retention_is_numeric(root):
    """Text order keeps 9 and deletes 10 (huggingface/transformers#27138; A21)."""
    checkpoints = Checkpoints(root, "run-a", 2)
    for step in (9, 10, 11):
        save(checkpoints, step)
    assert steps_of(root) == ["step-10", "step-11"]
    assert checkpoints.newest() == (root / "step-11", []) and str((root / "last").readlink()) == "step-11"


def test_stale_step_of_another_run(root):
    """A stale step-1000 pushes out the new step-10, or is deleted or resumed as if it were this run's (A21)."""
    save(Checkpoints(root, "run-a", 2), 1000)
    unreadable = root / "step-2000"
    (unreadable / "trainer_state").mkdir(parents=True)
    checkpoints = Checkpoints(root, "run-b", 2)
    for step in (10, 11, 12):
        save(checkpoints, step)
    assert steps_of(root) == ["step-11", "step-12", "step-1000", "step-2000"]
    newest, notices = checkpoints.newest()
    assert newest == root / "step-12" and len(notices) == 2
    assert "step-2000" in notices[0] and "state.json: missing" in notices[0]
    assert "step-1000" in notices[1] and "run-a" in notices[1]
    assert Checkpoints(root, None, 2).newest()[0] == root / "step-1000"


def test_set_back_to_an_earlier_step(root):
    """A run that goes on from step 10 loses its new steps to its own old 30 and 40."""
    checkpoints = Checkpoints(root, "run-a", 2)
    for step in (30, 40, 11, 12, 13):
        save(checkpoints, step)
    assert steps_of(root) == ["step-12", "step-13", "step-30", "step-40"]


def test_best_is_kept(root):
    """The best checkpoint is deleted as old, or `best` points into the void."""
    checkpoints = Checkpoints(root, "run-a", 1)
    assert checkpoints.best_step() is None
    for step in (1, 2, 3, 4):
        save(checkpoints, step, best=step == 2)
    assert steps_of(root) == ["step-2", "step-4"] and checkpoints.best_step() == 2
    assert_of_step(root / "best", 2)
    checkpoints.settle(4, 4)
    save(checkpoints, 5)
    assert steps_of(root) == ["step-4", "step-5"] and checkpoints.best_step() == 4
    assert Checkpoints(root, "run-b", 1).best_step() is None
    checkpoints.settle(5, 7)  # a step that is not there
    assert checkpoints.best_step() == 4


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm, words", [(flip, "changed"), (cut, "cut short"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", PARTS)
def test_damage_is_found_and_passed_over(root, name, harm, words):
    """A bit flip, a cut or a missing file is loaded as if nothing were wrong, or stops the resume altogether."""
    checkpoints = Checkpoints(root, "run-a", 3)
    for step in (8, 9, 10):
        save(checkpoints, step)
    harm(root / "step-10" / name)
    with pytest.raises(CheckpointError, match=rf"step-10/{name}: {words}.*resume_from") as caught:
        verify(root / "last")
    assert "\n" not in str(caught.value)
    newest, notices = checkpoints.newest()
    assert newest == root / "step-9" and len(notices) == 1 and "step-10" in notices[0] and name in notices[0]


def test_only_the_candidate_is_hashed(root, monkeypatch):
    """Looking for the newest checkpoint reads gigabytes of all the others."""
    checkpoints = Checkpoints(root, "run-a", 3)
    for step in (8, 9, 10):
        save(checkpoints, step)
    cut(root / "step-10" / "weights.bin")
    hashed, original = [], checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: (hashed.append(path.parts), original(path))[1])
    assert checkpoints.newest()[0] == root / "step-9"
    assert len(hashed) == len(PARTS) and all("step-9" in parts for parts in hashed)


def test_saving_a_step_again(root):
    """The second save of a step fails, mixes its files with the first or leaves the first aside."""
    checkpoints = Checkpoints(root, "run-a", 2)
    save(checkpoints, 4, lambda folder: (folder / "only_in_the_first").write_bytes(b"1"))
    save(checkpoints, 4)
    assert_of_step(root / "last", 4)
    assert sorted(p.name for p in root.iterdir()) == ["last", "step-4"]
    assert not (root / "last" / "only_in_the_first").exists()


def test_parts_of_two_steps_are_refused(root):
    """Weights of one step are resumed with the optimizer of another (petuum/adaptdl#81)."""
    checkpoints = Checkpoints(root, "run-a", 2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    shutil.copy(root / "step-1/trainer_state/optimizer.pt", root / "step-2/trainer_state/optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: changed"):
        verify(root / "step-2")
    shutil.copytree(root / "step-1", root / "step-9")
    newest, notices = checkpoints.newest()
    assert newest == root / "step-1" and "says step 1" in notices[0] and len(notices) == 2


def test_random_state_goes_on_after_a_resume(root):
    """A resumed run draws other numbers than the uninterrupted one (A20)."""

    def draw():
        return [random.gauss(0, 1), *np.random.randn(3).tolist(), *torch.randn(3).tolist()]

    outside = random_state()
    seed_everything(1234)
    draw()
    Checkpoints(root, "run-a", 2).save(7, writer(7), {}, {"random": random_state()})
    expected = [draw(), draw()]
    seed_everything(5)
    newest, _ = Checkpoints(root, "run-a", 2).newest()
    assert set_random_state(load_state(newest)[1]["random"]) == []
    resumed = [draw(), draw()]
    set_random_state(outside)
    assert resumed == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_no_file_system_without_links(root, monkeypatch, number):
    """One failing call turns `last` into a copy for ever, which takes the room of a checkpoint."""
    checkpoints = Checkpoints(root, "run-a", 1)
    save(checkpoints, 1)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            save(checkpoints, 2)
    assert str((root / "last").readlink()) == "step-1" and not leftovers(root)
    save(checkpoints, 3)
    assert str((root / "last").readlink()) == "step-3"


def test_file_system_without_links(root, monkeypatch):
    """`last` and `best` are absent, or half a copy, where symbolic links cannot be made."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    checkpoints = Checkpoints(root, "run-a", 1)
    for step in (1, 2, 3):
        save(checkpoints, step, best=step == 2)
    assert not (root / "last").is_symlink() and checkpoints.best_step() == 2 and not leftovers(root)
    assert_of_step(root / "last", 3)
    assert_of_step(root / "best", 2)
    verify(root / "best")
    monkeypatch.undo()
    save(checkpoints, 4, best=True)
    assert [str((root / link).readlink()) for link in ("last", "best")] == ["step-4", "step-4"] and not leftovers(root)


def test_opening_clears_only_dead_temporaries(root):
    """A dead writer's gigabytes stay for ever; a living writer's or the user's own folder is deleted."""
    save(Checkpoints(root, "run-a", 2), 1)
    for name in (".tmp-new-step-2-0123abcd", ".tmp-gone-step-1-0123abcd", ".tmp-mine", "step-1.backup"):
        (root / name).mkdir()
    with folder_lock(root) as held:
        assert held
        Checkpoints(root, "run-a", 2)
        assert ".tmp-new-step-2-0123abcd" in leftovers(root)
    checkpoints = Checkpoints(root, "run-a", 2)
    assert sorted(p.name for p in root.iterdir()) == [".tmp-mine", "last", "step-1", "step-1.backup"]
    assert checkpoints.newest() == (root / "step-1", [])
    assert Checkpoints(root / "absent", None, 2).newest() == (None, []) and not (root / "absent").exists()


def test_what_cannot_be_saved_or_loaded(root):
    """A NaN, a clash or an object that weights_only refuses is found at the resume, after the training is lost."""
    checkpoints = Checkpoints(root, "run-a", 2)
    folder, ok = save(checkpoints, 1), {"x": torch.zeros(1)}
    before = snapshot(root)
    cases = [(2, {"best": float("nan")}, ok, "JSON"), (2, {"step": 1}, ok, "step 1 of its own"),
             (2, {}, {"../x": 1}, "file name"), (2, {}, {"x": Path("a")}, "weights_only"),
             (-1, {}, ok, "whole number"), (np.int64(2), {}, ok, "JSON"), (2.5, {}, ok, "whole number")]
    for step, state, tensors, words in cases:
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoints.save(step, writer(2), state, tensors)
        assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(2, lambda _: 1 / 0, {}, ok)
    with pytest.raises(CheckpointError, match="run_id"):
        Checkpoints(root, None, 2).save(2, writer(2), {}, ok)
    with pytest.raises(CheckpointError, match="keep_checkpoints"):
        Checkpoints(root, "run-a", 0)
    assert snapshot(root) == before and not leftovers(root)
    for path, words in [(root / "step-5", "no such"), (root.parent, r"manifest\.json: missing")]:
        with pytest.raises(CheckpointError, match=words):
            load_state(path)
    state = folder / "trainer_state" / "state.json"
    state.write_text(state.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format_version is 2"):
        load_state(folder)


def test_earlier_run_is_set_aside(tmp_path):
    """A fresh run in a used folder overwrites the earlier one, or goes on in its files."""
    names = ["model_checkpoints", "metrics.jsonl", "scores.json"]
    assert archive_previous_run(tmp_path, names) is None and list(tmp_path.iterdir()) == []
    (tmp_path / "earlier-run-9").mkdir()
    (tmp_path / "mine.txt").write_text("stays")
    save(Checkpoints(tmp_path / "model_checkpoints", "run-a", 2), 3)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert archive_previous_run(tmp_path, names) == tmp_path / "earlier-run-10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier-run-10", "earlier-run-9", "mine.txt"]
    assert_of_step(tmp_path / "earlier-run-10" / "model_checkpoints" / "last", 3)
    assert (tmp_path / "earlier-run-10" / "metrics.jsonl").read_text() == "{}\n"
