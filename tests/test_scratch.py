"""Scratch folders of the living stay, those of the dead go: data/scratch.py."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import scratch
from data.scratch import clear_dead, dead, finish_moves, scratch_folder
from tests.conftest import ROOT

BUILD = """
import sys
from pathlib import Path
from data.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_for_a_while(tmp_path):
    """Fault: scratch folders stay after their use or after an error, or are two uses' one."""
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert first != second and first.parent == second.parent == tmp_path
        (first / "a").mkdir()
        (first / "a" / "b").write_text("x")
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path):
        1 / 0  # noqa: B018
    with scratch_folder(tmp_path) as moved:
        moved.rename(tmp_path / "result")
    assert names(tmp_path) == ["result"]


def test_only_the_living_keep_theirs(tmp_path):
    """Fault: what a killed process was making stays for ever, or what another is making is deleted under it."""
    with subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        clear_dead(tmp_path)
        with scratch_folder(tmp_path):
            assert (folder / "half").read_text() == "x"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert names(tmp_path) == [folder.name]
    with scratch_folder(tmp_path) as mine:
        assert names(tmp_path) == [mine.name]
    assert names(tmp_path) == []


def test_files_named_like_finished_folders_are_deleted(tmp_path):
    """Fault: a plain file of that name stops every later command with "Not a directory"."""
    (tmp_path / ".tmp-whole-abcd1234").write_text("x")
    (tmp_path / ".tmp-whole-efgh5678").mkdir()
    (tmp_path / ".tmp-whole-efgh5678" / "table.csv").write_text("rows")
    finish_moves(tmp_path)
    assert names(tmp_path) == ["table.csv"] and (tmp_path / "table.csv").read_text() == "rows"


def test_other_names_are_not_touched(tmp_path):
    """Fault: a user's own folder, a link, or what a link points to is cleared away."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("x")
    for name in (".building-notes", ".building-", ".building-12345678x", "building-12345678", ".building-ABCDEFGH"):
        (tmp_path / name).mkdir()
    (tmp_path / ".building-12345678").symlink_to("target")
    before = names(tmp_path)
    clear_dead(tmp_path)
    clear_dead(tmp_path / "absent")
    assert names(tmp_path) == before and names(tmp_path / "target") == ["mine"]
    os.mkfifo(tmp_path / ".building-abcdefgh")  # opening it must not wait for a writer
    clear_dead(tmp_path)


def test_without_locks_nothing_is_taken_for_dead(tmp_path, monkeypatch):
    """Fault: on a file system without locks, what a living process is making is deleted."""
    (tmp_path / ".building-12345678").mkdir()
    for broken in (None, type("fcntl", (), {"flock": staticmethod(refuse), "LOCK_EX": 2, "LOCK_NB": 4})):
        monkeypatch.setattr(scratch, "fcntl", broken)
        with scratch_folder(tmp_path) as mine:
            assert sorted(names(tmp_path)) == sorted([".building-12345678", mine.name])
        assert names(tmp_path) == [".building-12345678"]


def refuse(*_):
    raise OSError(95, "Operation not supported")


def test_a_folder_taken_for_dead_before_it_is_locked(tmp_path, monkeypatch):
    """Fault: another process clears a new folder between its making and its locking, and the work in it is lost."""
    real, calls = scratch.lock, []

    def cleared_meanwhile(descriptor, wait=True):
        calls.append(descriptor)
        if len(calls) == 1:
            next(tmp_path.iterdir()).rmdir()
        return real(descriptor, wait)

    monkeypatch.setattr(scratch, "lock", cleared_meanwhile)
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir() and len(calls) == 2


def test_dead_files_are_found_too(tmp_path):
    """Fault: a file that another process holds is taken for a dead one's, or the other way round."""
    for name in ("t-1", "t-2", "u-1"):
        (tmp_path / name).write_text("x")
    descriptor = os.open(tmp_path / "t-1", os.O_RDONLY)
    assert scratch.lock(descriptor)
    assert [path.name for path in dead(tmp_path, re.compile("t-."))] == ["t-2"]
    os.close(descriptor)
    assert [path.name for path in dead(tmp_path, re.compile("t-."))] == ["t-1", "t-2"]
