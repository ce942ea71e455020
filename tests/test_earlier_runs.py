"""Earlier runs are moved whole, whatever interrupts the moving: utils/runs/earlier_runs.py."""

import errno
from pathlib import Path

import pytest

from utils.runs.checkpoint import CheckpointError
from utils.runs.earlier_runs import archive_previous_run

NAMES = ["model_checkpoints", "config.json", "metrics.jsonl"]


class Killed(BaseException):
    """The process is gone."""


def make_run(folder: Path, text: str) -> None:
    (folder / "model_checkpoints" / "step-1").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "model_checkpoints/step-1/weights"):
        (folder / name).write_text(text)


def listing(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def stop_at(monkeypatch, number: int, error: BaseException) -> None:
    """Raise at the `number`-th rename; after a kill also at all later calls."""
    calls, real = [], Path.rename

    def rename(path, target):
        calls.append(path)
        if len(calls) == number or (isinstance(error, Killed) and len(calls) > number):
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_kill_between_two_moves_splits_no_run(tmp_path, monkeypatch, number):
    """Fault: half of an earlier run in earlier-run-1 and the other half in earlier-run-2, each useless alone."""
    make_run(tmp_path, "old")
    stop_at(monkeypatch, number, Killed())
    with pytest.raises(Killed):
        archive_previous_run(tmp_path, NAMES)
    monkeypatch.undo()
    assert archive_previous_run(tmp_path, NAMES) == tmp_path / "earlier-run-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-run-1"]
    assert set(listing(tmp_path / "earlier-run-1").values()) == {"old"} and len(listing(tmp_path)) == 3


def test_what_was_cut_off_and_a_new_run_stay_apart(tmp_path, monkeypatch):
    """Fault: files of two runs are put into one folder, or one's replace the other's."""
    make_run(tmp_path, "old")
    stop_at(monkeypatch, 3, Killed())
    with pytest.raises(Killed):
        archive_previous_run(tmp_path, NAMES)
    monkeypatch.undo()
    (tmp_path / "metrics.jsonl").unlink()
    make_run(tmp_path, "new")
    assert archive_previous_run(tmp_path, NAMES) == tmp_path / "earlier-run-2"
    assert listing(tmp_path / "earlier-run-1") == {"config.json": "old", "model_checkpoints/step-1/weights": "old"}
    assert set(listing(tmp_path / "earlier-run-2").values()) == {"new"} and len(listing(tmp_path)) == 5


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_disk_that_refuses_leaves_everything_as_it_was(tmp_path, monkeypatch, number):
    """Fault: an error in the middle leaves half of the run moved away."""
    make_run(tmp_path, "old")
    before = listing(tmp_path)
    stop_at(monkeypatch, number, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"cannot be set aside.*Input/output error.*output_dir"):
        archive_previous_run(tmp_path, NAMES)
    monkeypatch.undo()
    assert listing(tmp_path) == before or number == 4  # all are moved: the next call gives them their last name
    assert archive_previous_run(tmp_path, NAMES) == tmp_path / "earlier-run-1"
    assert listing(tmp_path / "earlier-run-1") == before


def test_temporaries_are_not_kept_with_the_run(tmp_path):
    """Fault: what a killed run was writing when it was set aside stays in the earlier run for ever."""
    make_run(tmp_path, "old")
    (tmp_path / "predictions").mkdir()
    for name in ("validation-step-2.json", ".tmp-12-0123abcd"):
        (tmp_path / "predictions" / name).write_text("old")
    archive_previous_run(tmp_path, [*NAMES, "predictions"])
    kept = tmp_path / "earlier-run-1" / "predictions"
    assert [path.name for path in kept.iterdir()] == ["validation-step-2.json"]


def test_nothing_to_set_aside(tmp_path):
    """Fault: empty folders earlier-run-N, or an empty leftover of a kill that stays for ever."""
    (tmp_path / ".tmp-earlier-run").mkdir()
    assert archive_previous_run(tmp_path, NAMES) is None and archive_previous_run(tmp_path, ()) is None
    assert list(tmp_path.iterdir()) == []
