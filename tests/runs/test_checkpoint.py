"""Checkpoints are complete or absent, verified, and deleted in order: utils/runs/checkpoint.py, utils/manifest.py."""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from utils.manifest import CheckpointError, check_model_folder, verify
from utils.runs.checkpoint import Checkpoints, load_state

PARTS = ["weights.bin", "config.json", "trainer_state/optimizer.pt", "trainer_state/state.json"]


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by path."""
    paths = {str(path.relative_to(root)): path for path in root.rglob("*")}
    links = {name: str(path.readlink()) for name, path in paths.items() if path.is_symlink()}
    return links | {name: path.read_bytes() for name, path in paths.items() if path.is_file() and not path.is_symlink()}


def writer(step: int):
    """Stands for `save_pretrained`: two files that name the step."""

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


def links_of(root: Path) -> list[str]:
    return [str((root / link).readlink()) for link in ("last", "best")]


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "run" / "model_checkpoints"


def test_parts_of_a_checkpoint(root):
    """Fault: a part, or a file in the manifest, is missing; the added entries of the state are not there."""
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
    assert links_of(root) == ["step-10", "step-10"]
    assert_of_step(root / "last", 10)


def test_checkpoints_of_earlier_versions_are_read(root):
    """Fault: the SHA-256 that earlier versions wrote into state.json and manifest.json makes them unreadable."""
    folder = save(Checkpoints(root, "run-a", 2), 10)
    for name in ("state", "manifest"):  # the manifest last: it describes the state
        path = folder / f"trainer_state/{name}.json"
        content = json.loads(path.read_text())
        if name == "manifest":
            state = (folder / "trainer_state/state.json").read_bytes()
            content["files"]["trainer_state/state.json"] = {
                "bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        path.write_text(json.dumps({**content, "sha256": "0" * 64}))
    assert Checkpoints(root, None, 2).newest() == (folder, [])
    assert load_state(folder)[0]["step"] == 10


def test_stale_step_of_another_run(root):
    """Fault: a stale step-1000 pushes out the new step-10, or is deleted or resumed as if it were this run's; text
    order keeps 9 and deletes 10 (huggingface/transformers#27138; A21)."""
    save(Checkpoints(root, "run-a", 2), 1000)
    (root / "step-2000" / "trainer_state").mkdir(parents=True)
    for step in (8, 9, 10):
        save(Checkpoints(root, "run-b", 2), step)
    assert steps_of(root) == ["step-9", "step-10", "step-1000", "step-2000"]
    for run_id in ("run-b", None):  # None: the run of `last`
        newest, notices = Checkpoints(root, run_id, 2).newest()
        assert newest == root / "step-10" and len(notices) == 2
        assert "step-2000" in notices[0] and "state.json: missing" in notices[0]
        assert "step-1000" in notices[1] and "run-a" in notices[1]
    assert Checkpoints(root / "absent", None, 2).newest() == (None, []) and not (root / "absent").exists()


def test_best_is_kept(root):
    """Fault: the best checkpoint is deleted as old, or `best` points into the void."""
    checkpoints = Checkpoints(root, "run-a", 1)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, best=step == 2)
    assert steps_of(root) == ["step-2", "step-4"] and links_of(root) == ["step-4", "step-2"]
    assert_of_step(root / "best", 2)
    checkpoints.repair_links(4, 7)  # a step that is not there
    assert links_of(root) == ["step-4", "step-2"]
    checkpoints.repair_links(4, 4)
    assert steps_of(root) == ["step-4"] and links_of(root) == ["step-4", "step-4"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm, words", [(flip, "changed"), (cut, "cut short"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", PARTS)
def test_damage_is_found_and_passed_over(root, name, harm, words):
    """Fault: a bit flip, a cut or a missing file is loaded as if nothing were wrong, or stops the resume altogether."""
    checkpoints = Checkpoints(root, "run-a", 3)
    for step in (8, 9, 10):
        save(checkpoints, step)
    harm(root / "step-10" / name)
    with pytest.raises(CheckpointError, match=rf"step-10/{name}: {words}") as caught:
        verify(root / "last")
    assert "\n" not in str(caught.value)
    newest, notices = checkpoints.newest()
    assert newest == root / "step-9" and len(notices) == 1 and "step-10" in notices[0] and name in notices[0]
    if name in ("weights.bin", "config.json"):  # the files of the model
        with pytest.raises(CheckpointError, match=rf"^--model_path: .*{name}: {words}.*name another checkpoint$"):
            check_model_folder(str(root / "last"), "--model_path")
    else:
        check_model_folder(str(root / "last"), "--model_path")


def test_parts_of_two_steps_are_refused(root):
    """Fault: weights of one step are resumed with the optimizer of another (petuum/adaptdl#81)."""
    checkpoints = Checkpoints(root, "run-a", 2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    shutil.copy(root / "step-1/trainer_state/optimizer.pt", root / "step-2/trainer_state/optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: changed"):
        verify(root / "step-2")
    shutil.copytree(root / "step-1", root / "step-9")
    newest, notices = checkpoints.newest()
    assert newest == root / "step-1" and "is of step 1" in notices[0] and len(notices) == 2
