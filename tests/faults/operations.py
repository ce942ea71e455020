"""Kill or fail the own process at its N-th operation that changes files: a thin layer over operations.c.

Only for processes that are thrown away (see runs.py): the filter that catches the calls cannot be taken off again.
Operations are counted from `start` on, at the system calls, whoever makes them. Memory maps,
which it could not see, are written to by none.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parent / "operations.c"
ACTIONS = ("count", "kill_before", "kill_half", "kill_after", "fail_once", "fail_from", "short_then_fail")
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "splice")


class NoFaultsHere(RuntimeError):
    """This system cannot put faults into processes; the message says why."""


def build(folder: Path) -> Path:
    """Compiles the library into `folder`; returns its path. Raises NoFaultsHere."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NoFaultsHere("file operations are caught on Linux on x86-64 only")
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoFaultsHere("there is no C compiler (cc)")
    library = folder / "operations.so"
    command = [compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoFaultsHere(f"cc cannot compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1]}")
    return library


def start(
    library: Path, folder: Path, action: str = "count", number: int = 0, error: int = 0, excluded: Path | None = None,
    log: Path | None = None,
) -> None:
    """From here on count operations on what is below `folder` and not below `excluded`; `action` at the `number`-th.

    kill_before, kill_half (of the bytes of a write; before any other operation), kill_after: SIGKILL.
    fail_once, fail_from (it and all later ones), short_then_fail (half of the bytes are written, later ones fail): with
    the errno `error`; where that is ENOSPC or EDQUOT, only operations that need room fail.
    log: gets a line `operation path` for each. Raises NoFaultsHere.
    """
    descriptor = -1 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    below, but_not = (b"" if path is None else os.fsencode(os.path.realpath(path)) for path in (folder, excluded))
    problem = ctypes.CDLL(str(library)).operations_start(
        below, but_not, ctypes.c_long(number), ACTIONS.index(action), error, descriptor
    )
    if problem:
        raise NoFaultsHere(f"the system has no filters for calls: {os.strerror(problem)}")


def stop(library: Path) -> int:
    """No more counting; how many there were since `start`."""
    function = ctypes.CDLL(str(library)).operations_stop
    function.restype = ctypes.c_long
    return function()


@contextmanager
def faults(library: Path, folder: Path, **options) -> Iterator[None]:
    """`start` with these options, `stop` at the end."""
    start(library, folder, **options)
    try:
        yield
    finally:
        stop(library)


def read_log(log: Path, folder: Path) -> list[tuple[str, str]]:
    """(operation, path below `folder`) of each line of a log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    pairs = (line.split(" ", 1) for line in lines)
    return [(name, os.path.relpath(path, os.path.realpath(folder))) for name, path in pairs]


def moments(operations: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """(number, action) of every moment at which a kill leaves something else behind: before each operation, in the
    middle of each write, and after the last."""
    found = []
    for number, (name, _) in enumerate(operations, 1):
        found.append((number, "kill_before"))
        if name in WRITES:
            found.append((number, "kill_half"))
    return [*found, (len(operations), "kill_after")]
