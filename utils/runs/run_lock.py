"""One run in a folder: a lock of the system, and in it `run.lock`, which says who holds it.

The system's lock ends with its process. It is on the folder and on `run.lock` too, since network file systems lock
files alone. What `run.lock` says decides only where the file system knows no locks at all.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from data.os_errors import describe
from data.scratch import is_at
from utils.config.load import ConfigError
from utils.files import folder_lock
from utils.text import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
# Worker processes hold the lock of a killed process until they notice that it is gone.
WAIT_SECONDS = 20.0
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


class Attempt(NamedTuple):
    """free: whether the lock is ours. descriptor: of `run.lock`, None where it could not be made. before: what it
    said."""

    free: bool
    descriptor: int | None
    before: dict | None


@contextlib.contextmanager
def hold(folder: Path, key: str) -> Iterator[list[str]]:
    """Hold the folder, which must be there, against other runs; yields notices. key: where the user named it.

    Raises:
        ConfigError: another run is in it.
        OSError: it cannot be opened.
    """
    place, deadline = folder / LOCK, time.monotonic() + WAIT_SECONDS
    while True:
        with folder_lock(folder) as free:
            attempt = take(place, key) if free else Attempt(False, None, read_holder(place))
            if attempt.free:
                try:
                    yield [f"{place}: {describe_holder(attempt.before)} has ended without removing it: taken over"
                           ] if attempt.before else []
                finally:
                    let_go(attempt.descriptor, place)
                return
        if not has_ended(attempt.before) or time.monotonic() > deadline:
            raise ConfigError(f"{key}: another run is writing to {folder}: {describe_holder(attempt.before)}; wait for "
                              "it or stop it, or choose another folder")
        time.sleep(0.05)


def take(place: Path, key: str) -> Attempt:
    """Lock `run.lock` and write into it who we are. ConfigError where only the user can know whether it is in use."""
    while True:
        try:
            descriptor, created = open_lock(place)
        except OSError as error:
            if error.errno in NOT_WRITABLE:  # a finished run in a folder that may only be read is looked at
                return Attempt(True, None, None)
            raise ConfigError(f"{key}: {describe(error, place)}") from error
        locked, before = lock(descriptor), holder_in(descriptor)
        if locked is False:
            os.close(descriptor)
            return Attempt(False, None, before)
        if locked is None and not created:
            os.close(descriptor)
            if not has_ended(before):
                raise ConfigError(
                    f"{key}: {place} says that {describe_holder(before)} is writing there, and this file system cannot "
                    "tell whether it still is: once you are sure that it is not, remove that file; or choose another "
                    "folder"
                )
            place.unlink(missing_ok=True)
        elif is_at(descriptor, place):
            write_holder(descriptor)
            return Attempt(True, descriptor, before)
        else:  # the run before removed it just now
            os.close(descriptor)


def open_lock(place: Path) -> tuple[int, bool]:
    """(descriptor, whether the file was made for it). Raises OSError, also for what is no plain file."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(place, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            descriptor = os.open(place, flags)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor, False
        os.close(descriptor)
        raise OSError(errno.EEXIST, "no plain file", str(place))


def lock(descriptor: int) -> bool | None:
    """Whether the system's lock is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None


def let_go(descriptor: int | None, place: Path) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            if is_at(descriptor, place):
                place.unlink()
        with contextlib.suppress(OSError, AttributeError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # worker processes may hold the descriptor too
        os.close(descriptor)


# -- who ---------------------------------------------------------------------------------------------------------


def write_holder(descriptor: int) -> None:
    """A full disk is no reason to refuse: the lock holds without it."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()),
              "since": datetime.now(UTC).isoformat(timespec="seconds"), "program": Path(sys.argv[0]).name}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)


def read_holder(place: Path) -> dict | None:
    try:
        descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        return holder_in(descriptor)
    finally:
        os.close(descriptor)


def holder_in(descriptor: int) -> dict | None:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return holder if isinstance(holder["host"], str) and type(holder["pid"]) is int else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def describe_holder(holder: dict | None) -> str:
    if holder is None:
        return "a process that has not said its name"
    program, since = (printable(str(holder.get(key)))[:80] for key in ("program", "since"))
    return f"process {holder['pid']} on {printable(holder['host'])[:80]} ({program}, since {since})"


def has_ended(holder: dict | None) -> bool:
    """Whether it is known that the process runs no more: it is of this host, and its number is free or another's."""
    if holder is None or holder["host"] != socket.gethostname() or holder["pid"] < 1:
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it runs, under another user
        return False
    now = started(holder["pid"])
    return now is not None and holder.get("started") not in (None, now)


def started(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; -1 where it has ended and is not buried yet; None where the system
    does not say."""
    try:
        # The second field is its name in brackets, which may hold brackets and spaces.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
