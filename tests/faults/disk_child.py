"""What a child of the fork server does: a program on a disk that refuses one operation or all from one on."""

import os
import resource
import shutil
from pathlib import Path

import train
import train_kd
import validate_model
from data import cnn_dailymail, demo_news
from tests.faults import operations
from utils import compare
from utils.runs.run_log import RunLog

MAINS = {
    "train": train.main, "train_kd": train_kd.main, "validate_model": validate_model.main, "demo_news": demo_news.main,
    "cnn_dailymail": cnn_dailymail.main, "compare": compare.main,
}


def program(name: str, arguments: list[str]) -> int:
    return MAINS[name](arguments)


def on_failing_disk(name: str, arguments: list[str], library: str, folder: str, log: str | None = None, **fault) -> int:
    """The program, with `operations.start(**fault)` on what it does below `folder`."""
    operations.start(Path(library), Path(folder), log=log and Path(log), **fault)
    return program(name, arguments)


def with_size_limit(name: str, arguments: list[str], size: int) -> int:
    """The program under `ulimit -f`, which here is in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return program(name, arguments)


def losing(name: str, arguments: list[str], places: list[str], line: int, how: str) -> int:
    """A training that loses files or folders just before the `line`-th line of its log."""
    record, count = RunLog.record, 0

    def counted(log: RunLog, *values, **named) -> None:
        nonlocal count
        count += 1
        if count == line:
            for place in places:
                lose(Path(place), how)
        record(log, *values, **named)

    RunLog.record = counted
    return program(name, arguments)


def lose(folder: Path, how: str) -> None:
    """how: "removed", "moved" (to a name beside it), "replaced" (moved, and a new folder in its place), "unwritable"
    (moved, and a file in its place), "emptied" (all that is in it removed), "cut" (a file: to nothing)."""
    if how == "emptied":
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    if how == "cut":
        os.truncate(folder, 0)
        return
    if how == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(f"{folder}-moved")
    if how == "replaced":
        folder.mkdir()
    elif how == "unwritable":
        folder.write_text("somebody's notes")


def with_full_console(name: str, arguments: list[str], streams: list[int]) -> int:
    """The program, its standard output (1) or error (2) led to a disk that is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    for number in streams:
        os.dup2(full, number)
    return program(name, arguments)
