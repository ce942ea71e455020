"""metrics.jsonl and curves on a disk that refuses, loses or has changed them: run_log.py, curves.py."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest

from utils.runs import run_log
from utils.runs.run_log import RunLog, read_metrics


class Refusing:
    """A file that takes `room` bytes and then refuses, until it has refused so often."""

    def __init__(self, file, room: int, refusals: int, number: int = errno.ENOSPC):
        self.file, self.room, self.refusals, self.number = file, room, refusals, number

    def write(self, content: bytes) -> int:
        if self.refusals and not self.room:
            self.refusals -= 1
            raise OSError(self.number, "No space left on device")
        part = content if not self.refusals else content[: self.room]
        self.room -= min(self.room, len(part))
        return self.file.write(part)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run")
    log.open()
    yield log
    log.close()


def refuse(log: RunLog, room: int, refusals: int) -> None:
    log._file = Refusing(log._file, room, refusals)


def losses(log: RunLog) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, log.path.read_text().splitlines())]


@pytest.mark.parametrize("room", [0, 1, 60, 200])
def test_lines_wait_for_room(log, room, capsys):
    """A full disk costs lines of the log, leaves half of one in it, is told at each step, or ends hours of training."""
    refuse(log, room, refusals=3)
    for step in range(1, 9):
        log.record("train", step, loss=step / 8)
        for line in log.path.read_text().splitlines(keepends=True):
            assert line.endswith("\n") and json.loads(line)["split"] == "train"
    assert losses(log) == [(step, step / 8) for step in range(1, 9)]
    assert log.settle() is None
    told = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(told) == 1 and str(log.path) in told[0] and "free space" in told[0]


def test_what_stays_refused_is_told_when_a_checkpoint_is_due(log):
    """A run goes on for ever without a log, or is told that all is well."""
    refuse(log, 0, refusals=10**9)
    log.record("train", 1, loss=1.0)
    refusal = log.settle()
    assert refusal.startswith(f"{log.path}: No space left on device: free space") and "\n" not in refusal


def test_lines_are_flushed_to_the_disk(log, monkeypatch):
    """After a power cut a checkpoint is there and the log lines before it are not; a disk that fails is not noticed."""
    flushed = []
    monkeypatch.setattr(run_log, "sync_file", lambda descriptor, path: flushed.append(path))
    log.record("train", 1, loss=1.0)
    assert log.settle() is None and flushed == [log.path]

    def fail(descriptor, path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(run_log, "sync_file", fail)
    assert f"{log.path}: Input/output error" in log.settle()


def test_a_log_that_was_removed_is_begun_again(log, capsys):
    """Lines go to a deleted file, where nobody ever finds them."""
    log.record("train", 1, loss=1.0)
    log.path.unlink()
    assert log.settle() is None
    log.record("train", 2, loss=2.0)
    assert losses(log) == [(2, 2.0)]
    assert "its earlier lines are gone" in capsys.readouterr().err


def test_a_run_folder_that_is_gone(log):
    """A removed or moved run folder is not noticed; one that somebody else made in its place is written into."""
    folder = log.path.parent
    folder.rename(f"{folder}-moved")
    assert log.settle() == f"{folder} was removed or moved while the run wrote to it"
    folder.mkdir()
    with pytest.raises(OSError, match="replaced by another folder"):
        log.settle()
    assert list(folder.iterdir()) == []
    folder.rmdir()
    Path(f"{folder}-moved").rename(folder)
    assert log.settle() is None


# -- damaged lines -------------------------------------------------------------------------------------------------


def written(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


GOOD = ['{"split": "train", "step": 1, "loss": 0.5}', '{"split": "train", "step": 2, "loss": 0.25}']
DAMAGED = [
    b"\xff\xfe", '{"split": "train", "step": 1', "[1, 2]", "null", "7", '{"step": 1}', '{"split": "train"}',
    '{"split": "train", "step": "1"}', '{"split": null, "step": 1}', "[" * 100_000, "",
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_kept_elsewhere_and_told(tmp_path, damaged, capsys):
    """A run cannot be gone on with, in a traceback, for one damaged line of its log; or the line is lost in silence."""
    path = written(tmp_path, GOOD[0], damaged, GOOD[1], "")
    before = path.read_bytes()
    log = RunLog(tmp_path)
    log.open(2)
    log.close()
    assert path.read_text().splitlines() == GOOD
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == before
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{path}: line 2 cannot be read") and "metrics.damaged-1.jsonl" in told


def test_the_unfinished_line_of_a_killed_process(tmp_path, capsys):
    """The line that a kill cut off is taken for damage of the disk, or stays and breaks the next one."""
    path = written(tmp_path, *GOOD, '{"split": "train", "st')
    log = RunLog(tmp_path)
    log.open(2)
    log.record("train", 3, loss=0.0)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert capsys.readouterr().err == "" and not list(tmp_path.glob("*damaged*"))


def test_no_earlier_copy_is_overwritten(tmp_path):
    """The second damage takes the place of what was kept of the first."""
    for number in (1, 2):
        written(tmp_path, GOOD[0], f"broken {number}", "")
        log = RunLog(tmp_path)
        log.open(1)
        log.close()
    kept = [(tmp_path / f"metrics.damaged-{number}.jsonl").read_text() for number in (1, 2)]
    assert ["broken 1" in kept[0], "broken 2" in kept[1]] == [True, True]


def test_a_folder_in_the_place_of_the_log(tmp_path):
    """A traceback that does not name what is in the way."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        RunLog(tmp_path).open()


# -- curves --------------------------------------------------------------------------------------------------------


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(each.step, each.value) for each in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_curves_are_what_tensorboard_reads(tmp_path):
    """Event files that TensorBoard cannot read, or in which a run that was gone on with shows steps twice."""
    for step, loss in ((0, 1.0), (2, 2.0)):
        log = RunLog(tmp_path)
        log.open(step)
        for each in range(step + 1, 5):
            log.record("train", each, loss=loss * each, epoch=0, note=None)
        log.close()
    found = curves(tmp_path / "tensorboard")
    assert found == {"train/loss": [(1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0)],
                     "train/epoch": [(step, 0.0) for step in (1, 2, 3, 4)]}


def test_curves_need_no_thread(log):
    """A thread that writes dies of a full disk with a traceback, and the run waits for it for ever."""
    before = threading.active_count()
    log.record("train", 1, loss=1.0)
    assert threading.active_count() == before


def test_a_run_does_without_curves(log, monkeypatch, capsys):
    """Curves that cannot be written end hours of training, are told at each step, or cost lines of the log."""
    real, calls = log._curves._records.write, []

    def fail(content):
        calls.append(content)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(content)

    monkeypatch.setattr(log._curves._records, "write", fail)
    for step in range(1, 5):
        log.record("train", step, loss=1.0)
    assert len(calls) == 2 and len(losses(log)) == 4 and log.settle() is None
    [told] = capsys.readouterr().err.splitlines()
    assert "tensorboard: No space left on device" in told and "goes on without curves" in told
    assert curves(log.path.parent / "tensorboard") == {"train/loss": [(1, 1.0)]}


def test_a_run_without_a_place_for_curves(tmp_path, capsys):
    """A file where the folder of the curves should be ends the run."""
    (tmp_path / "tensorboard").write_text("mine")
    log = RunLog(tmp_path)
    log.open()
    log.record("train", 1, loss=1.0)
    log.close()
    assert "goes on without curves" in capsys.readouterr().err
    assert losses(log) == [(1, 1.0)] and (tmp_path / "tensorboard").read_text() == "mine"


def test_curves_of_a_removed_folder(log, capsys):
    """The removed folder's curves end the run in the middle of a step."""
    shutil.rmtree(log.path.parent)
    log.record("train", 1, loss=1.0)
    assert capsys.readouterr().err == ""
