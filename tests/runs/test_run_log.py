"""metrics.jsonl and curves, also on a disk that refuses them: utils/runs/run_log.py."""

from pathlib import Path

import pytest

from utils.metrics_file import read_metrics
from utils.runs.run_log import RunLog


def write_log(folder: Path, resume_step: int, steps: range, factor: float = 1.0) -> None:
    log = RunLog(folder)
    log.open(resume_step)
    for step in steps:
        log.record("train", step, loss=factor * step, epoch=0, note=None)
    assert log.flush() is None
    log.close()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [(point.step, point.value) for point in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_a_resumed_log_shows_each_step_once(tmp_path):
    """Fault: steps after the checkpoint appear twice, in metrics.jsonl or in TensorBoard, or curves are unreadable."""
    write_log(tmp_path, 0, range(1, 5))
    write_log(tmp_path, 2, range(3, 5), factor=2.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [
        (1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0)]
    assert curves(tmp_path / "tensorboard") == {
        "train/loss": [(1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0)], "train/epoch": [(step, 0.0) for step in (1, 2, 3, 4)]}


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b'{"split": "train", "step": 1', b"7", b'{"step": 1}',
                                     b'{"split": "train", "step": "1"}', b""])
def test_a_damaged_line_costs_only_itself(tmp_path, damaged, capsys):
    """Fault: a run cannot be resumed, in a traceback, for one damaged line of its log, or loses the lines after it."""
    write_log(tmp_path, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(good[0] + damaged + b"\n" + good[1])
    write_log(tmp_path, 2, range(0))
    assert path.read_bytes() == b"".join(good)
    assert "dropped damaged lines 2" in capsys.readouterr().err


def test_the_unfinished_line_of_a_killed_process(tmp_path, capsys):
    """Fault: the line that a kill cut off is reported as damage, or stays and breaks the next one."""
    write_log(tmp_path, 0, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"split": "train", "st')
    write_log(tmp_path, 2, range(3, 4))
    assert [line["step"] for line in read_metrics(path)[0]] == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_reported_and_stops_no_step(tmp_path, capsys):
    """Fault: a disk that takes no more bytes ends the run in the middle of a step, is reported at every step, or not
    at all; or the half line that it took breaks the log."""
    resource = pytest.importorskip("resource")
    (tmp_path / "tensorboard").write_text("no curves here")
    log = RunLog(tmp_path)
    log.open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for step in range(1, 9):
            log.record("train", step, loss=1.0)
        failure = log.flush()
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure == f"{log.path}: File too large"
    assert capsys.readouterr().err.count("training continues to the next checkpoint") == 1
    assert [line["step"] for line in read_metrics(log.path)[0]] == [1, 2]
    log.open(8)
    log.record("train", 9, loss=1.0)
    log.close()
    assert [line["step"] for line in read_metrics(log.path)[0]] == [1, 2, 9]
