"""One run in a folder: the lock of an output folder, and which folders a script may write into."""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError, describe

CHECKPOINTS = "model_checkpoints"
# How long worker processes, which inherit the lock, may outlive a killed run: they look for their parent every 5 s.
WORKER_SECONDS = 20.0
IN_CHECKPOINTS = re.compile(r"step-[0-9]+|last|best")


@contextmanager
def lock_folder(folder: Path, key: str) -> Iterator[None]:
    """Make the folder, and hold it against other runs. The system releases the lock of a process that dies.

    key: the setting that names the folder. Raises UserError: another run is in it, it cannot be written, or it is a
    place for checkpoints, which a training deletes and replaces.
    """
    check_outside_checkpoints(folder, key)
    holder, lock, deadline = folder / "run.lock.json", FileLock(folder / "run.lock"), time.monotonic() + WORKER_SECONDS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.1)
            except Timeout as error:
                if is_running(read_holder(holder)) or time.monotonic() > deadline:
                    raise UserError(f"{key}: another run is writing to {folder}: {describe_holder(read_holder(holder))}"
                                    "; wait for it or stop it, or choose another folder") from error
    except OSError as error:
        raise UserError(f"{key}: {describe(error, folder)}") from error
    try:
        with suppress(OSError):  # it is only for the message: a full disk is no reason to refuse
            holder.write_text(json.dumps({
                "host": socket.gethostname(), "pid": os.getpid(), "program": Path(sys.argv[0]).name,
                "since": datetime.now(UTC).isoformat(timespec="seconds")}))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def check_not_a_run(folder: Path, key: str) -> None:
    """Raises UserError for the folder of a training: an evaluation must not replace its scores."""
    if (folder / CHECKPOINTS).exists() or is_run_config(folder / "config.json"):
        raise UserError(f"{key}: {folder} is a training run's folder, which has scores of its own: name another "
                        f"folder, such as {folder / 'evaluation'}")


def check_outside_checkpoints(folder: Path, key: str) -> None:
    """Raises UserError for a folder of checkpoints, a checkpoint, and a folder inside one."""
    real = folder.resolve()
    if real.name == CHECKPOINTS or any(path.parent.name == CHECKPOINTS and IN_CHECKPOINTS.fullmatch(path.name)
                                       for path in (real, *real.parents)):
        raise UserError(f"{key}: {folder} is reserved for checkpoints of a training run: name another folder")


def is_run_config(path: Path) -> bool:
    """Whether a file is the resolved config that a training has written."""
    with suppress(OSError, ValueError, TypeError):
        return "_description_environment" in json.loads(path.read_text(encoding="utf-8"))
    return False


def read_holder(path: Path) -> dict:
    with suppress(OSError, ValueError):
        if isinstance(holder := json.loads(path.read_text(encoding="utf-8")), dict):
            return holder
    return {}


def describe_holder(holder: dict) -> str:
    process = "process {pid} on {host} ({program}, since {since})"
    return process.format(**holder) if holder.keys() >= {"pid", "host", "program", "since"} else "an unknown process"


def is_running(holder: dict) -> bool:
    """Whether the holder is a living process of this machine (as Linux lists them), so that waiting is in vain."""
    return holder.get("host") == socket.gethostname() and Path("/proc", str(holder.get("pid"))).exists()
