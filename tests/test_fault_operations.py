"""The library that kills and fails processes at their file operations: tests/faults/operations.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults import operations

WORK = """
import os, sys
from pathlib import Path
from tests.faults import operations
library, folder, action, number, error, excluded, log = sys.argv[1:]
folder = Path(folder)
options = {"excluded": Path(excluded) if excluded else None, "log": Path(log)}
try:
    operations.start(Path(library), folder, action, int(number), int(error), **options)
except operations.NoFaultsHere as reason:
    raise SystemExit(f"no faults: {reason}")
def attempt(what, call):
    try:
        call()
    except OSError as error:
        print(what, error.errno)
attempt("write", lambda: (folder / "a").write_bytes(b"0123456789"))
attempt("rename", lambda: (folder / "a").rename(folder / "b"))
attempt("mkdir", lambda: (folder / "sub").mkdir())
attempt("again", lambda: (folder / "sub" / "c").write_bytes(b"0123456789"))
attempt("unlink", lambda: (folder / "b").unlink())
(folder.parent / "outside").write_bytes(b"x")
(folder / "sub").exists() and os.listdir(folder / "sub")
print(operations.stop(Path(library)), "counted")
(folder / "after").write_bytes(b"x")
"""
ALL = [("openat", "a"), ("write", "a"), ("rename", "a"), ("mkdir", "sub"), ("openat", "sub/c"), ("write", "sub/c"),
       ("unlink", "b")]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    try:
        return operations.build(tmp_path_factory.mktemp("library"))
    except operations.NoFaultsHere as reason:
        pytest.skip(str(reason))


def work(library: Path, folder: Path, action: str = "count", number: int = 0, error: int = 0, excluded: str = "",
         code: str = WORK) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, library, folder, action, str(number), str(error), excluded,
               folder.parent / "log"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.stderr.startswith("no faults: "):
        pytest.skip(done.stderr)
    return done


def left(folder: Path) -> dict[str, int]:
    """Sizes of the files by name."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_operations_are_counted(library, tmp_path):
    """Fault: operations are missed, or those on other folders or after the end are counted."""
    done = work(library, tmp_path / "here")
    assert done.stdout == "7 counted\n" and done.returncode == 0, done.stderr
    assert operations.read_log(tmp_path / "log", tmp_path / "here") == ALL
    assert left(tmp_path / "here") == {"sub/c": 10, "after": 1}
    (tmp_path / "log").unlink()
    (tmp_path / "more").mkdir()
    assert work(library, tmp_path / "more", excluded=str(tmp_path / "more/sub")).stdout == "4 counted\n"
    logged = operations.read_log(tmp_path / "log", tmp_path / "more")
    assert logged == [each for each in ALL if not each[1].startswith("sub")]


def test_every_moment_of_a_kill(library, tmp_path):
    """Fault: the process dies an operation too early or too late, or writes all of a half-written file."""
    found = operations.moments(ALL)
    assert len(found) == 7 + 2 + 1 and found[-1] == (7, "kill_after") and (2, "kill_half") in found
    expected = {
        (1, "kill_before"): {}, (1, "kill_after"): {"a": 0}, (2, "kill_before"): {"a": 0}, (2, "kill_half"): {"a": 5},
        (2, "kill_after"): {"a": 10}, (3, "kill_before"): {"a": 10}, (3, "kill_half"): {"a": 10},
        (3, "kill_after"): {"b": 10}, (6, "kill_half"): {"b": 10, "sub/c": 5},
        (7, "kill_before"): {"b": 10, "sub/c": 10}, (7, "kill_after"): {"sub/c": 10},
    }
    for (number, action), files in expected.items():
        folder = tmp_path / f"{action}-{number}"
        assert work(library, folder, action, number).returncode == -signal.SIGKILL
        assert left(folder) == files, (number, action)


@pytest.mark.parametrize(("action", "number", "error", "failed", "files"), [
    ("fail_once", 1, 5, ["write 5", "rename 2", "unlink 2"], {"sub/c": 10}),
    ("fail_once", 2, 28, ["write 28"], {"sub/c": 10}),
    ("fail_from", 1, 30, ["write 30", "rename 30", "mkdir 30", "again 30", "unlink 30"], {}),
    ("fail_from", 2, 28, ["write 28", "mkdir 28", "again 28"], {}),
    ("fail_from", 3, 28, ["mkdir 28", "again 28"], {}),
    ("fail_once", 3, 28, [], {"sub/c": 10}),
    ("short_then_fail", 2, 28, ["write 28", "mkdir 28", "again 28"], {}),
])
def test_failing_operations(library, tmp_path, action, number, error, failed, files):
    """Fault: another operation fails, or a full disk refuses what needs no room (renaming, deleting)."""
    done = work(library, tmp_path / "here", action, number, error)
    *lines, counted = done.stdout.splitlines()
    assert lines == failed and counted.endswith(" counted"), done.stderr
    assert left(tmp_path / "here") == {**files, "after": 1}


OTHERS = """
import os, sys, threading
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tests.faults import operations
library, folder, log = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[7])
try:
    operations.start(library, folder, log=log)
except operations.NoFaultsHere as reason:
    raise SystemExit(f"no faults: {reason}")
np.save(folder / "array.npy", np.arange(5))
save_file({"a": np.zeros(3)}, folder / "weights.safetensors")
thread = threading.Thread(target=lambda: (folder / "of-a-thread").write_text("x"))
thread.start()
thread.join()
os.chdir(folder)
with open("relative", "wb", buffering=0) as file:
    os.writev(file.fileno(), [b"12", b"34"])
    os.pwrite(file.fileno(), b"5", 9)
    os.fsync(file.fileno())
    os.ftruncate(file.fileno(), 3)
    os.posix_fallocate(file.fileno(), 0, 50)
descriptor = os.open(".", os.O_RDONLY)
os.symlink("relative", "link", dir_fd=descriptor)
os.rename("link", "moved", src_dir_fd=descriptor, dst_dir_fd=descriptor)
os.link("relative", "second")
os.chmod("relative", 0o600)
os.mkdir("sub", dir_fd=descriptor)
os.rmdir("sub", dir_fd=descriptor)
os.unlink("second", dir_fd=descriptor)
"""


def test_calls_of_libraries_are_seen(library, tmp_path):
    """Fault: what NumPy's own stdio, Rust's own calls, threads, or paths relative to a folder do is not counted."""
    done = work(library, tmp_path / "here", code=OTHERS)
    assert done.returncode == 0, done.stderr
    logged = operations.read_log(tmp_path / "log", tmp_path / "here")
    of_numpy = [name for name, path in logged if path == "array.npy"]
    assert of_numpy[0] == "openat" and of_numpy.count("write") >= 2
    assert any(name.startswith("rename") and path != "weights.safetensors" for name, path in logged) or \
        ("openat", "weights.safetensors") in logged
    own = [each for each in logged if each[1] in ("relative", "link", "second", "sub", "of-a-thread")]
    assert own == [
        ("openat", "of-a-thread"), ("write", "of-a-thread"), ("openat", "relative"), ("writev", "relative"),
        ("pwrite64", "relative"), ("fsync", "relative"), ("ftruncate", "relative"), ("fallocate", "relative"),
        ("symlinkat", "link"), ("renameat", "link"), ("link", "relative"), ("chmod", "relative"), ("mkdirat", "sub"),
        ("unlinkat", "sub"), ("unlinkat", "second"),
    ]


def test_a_system_without_the_means_says_so(tmp_path, monkeypatch):
    """Fault: a traceback, not a skipped test, where there is no compiler or another processor."""
    monkeypatch.setattr(operations.shutil, "which", lambda name: None)
    with pytest.raises(operations.NoFaultsHere, match="compiler"):
        operations.build(tmp_path)
    monkeypatch.setattr(operations.platform, "machine", lambda: "riscv64")
    with pytest.raises(operations.NoFaultsHere, match="x86-64"):
        operations.build(tmp_path)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
