"""Two runs in one folder: the second is refused and told why; a dead one's lock is taken over: run_lock.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small_runs import changed, make_project, run
from utils.config.load import ConfigError
from utils.runs import run_lock
from utils.runs.run_lock import LOCK, has_ended, hold, started

KEY = "trainer_kwargs.output_dir"
DEAD = 2**22 + 1  # over the greatest number that Linux gives to a process


def holder(**changes) -> dict:
    return {"host": socket.gethostname(), "pid": DEAD, "started": 1, "since": "2026-01-02T03:04:05+00:00",
            "program": "train.py", **changes}


def write_lock(folder: Path, **changes) -> Path:
    path = folder / LOCK
    path.write_text(json.dumps(holder(**changes)))
    return path


def refusal(folder: Path) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(ConfigError) as caught, hold(folder, KEY):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, such as some network file systems are."""
    def flock(descriptor, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.0)


# -- the system's lock ---------------------------------------------------------------------------------------------


def test_the_holder_is_told_and_nothing_stays(tmp_path):
    """A second run is let in, or is refused without a word on who is there; a lock file outlives its run."""
    with hold(tmp_path, KEY) as notices:
        assert notices == []
        said = json.loads((tmp_path / LOCK).read_text())
        message = refusal(tmp_path)
        assert message.startswith(f"{KEY}: another run is writing to {tmp_path}: process {os.getpid()} on "
                                  f"{socket.gethostname()} (")
        assert said["since"] in message and "choose another folder" in message
        assert said["pid"] == os.getpid() and said["started"] == started(os.getpid())
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path, KEY) as notices:
        assert notices == []


def test_the_lock_file_alone_keeps_a_second_run_out(tmp_path, monkeypatch):
    """Network file systems lock files and no folders: there the second run was let in."""
    monkeypatch.setattr(run_lock, "folder_lock", lambda folder: ExitStack())  # whose value is true
    with hold(tmp_path, KEY):
        assert f"process {os.getpid()} on" in refusal(tmp_path)
    with hold(tmp_path, KEY) as notices:
        assert notices == []


def test_a_stale_lock_is_taken_over(tmp_path):
    """After a kill the user must find and delete a lock file before the run goes on."""
    write_lock(tmp_path, host="elsewhere")  # the system's lock is free: that is enough, whoever it was
    with hold(tmp_path, KEY) as notices:
        assert notices == [f"{tmp_path / LOCK}: process {DEAD} on elsewhere (train.py, since "
                           "2026-01-02T03:04:05+00:00) has ended without removing it: taken over"]
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 3, "pid": 4}', b"\xff" * 9000, b"[" * 5000])
def test_a_damaged_lock_file_is_no_obstacle(tmp_path, content):
    """A lock file that a full disk left empty, or a disk changed, ends every later run in a traceback."""
    (tmp_path / LOCK).write_bytes(content)
    with hold(tmp_path, KEY) as notices:
        assert notices == [] and json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        (tmp_path / LOCK).write_bytes(content)
        assert "a process that has not said its name" in refusal(tmp_path)


def test_what_is_no_lock_file_is_left_alone(tmp_path):
    """A link called run.lock has its target overwritten; a pipe makes the run hang."""
    (tmp_path / "mine").write_text("precious")
    for make in (lambda path: path.symlink_to("mine"), os.mkfifo, Path.mkdir):
        make(tmp_path / LOCK)
        assert str(tmp_path / LOCK) in refusal(tmp_path)
        (tmp_path / LOCK).rmdir() if (tmp_path / LOCK).is_dir() else (tmp_path / LOCK).unlink()
    assert (tmp_path / "mine").read_text() == "precious"


def test_names_in_a_lock_file_cannot_write_to_the_terminal(tmp_path):
    """A lock file made by somebody else colours or clears the terminal of who reads the message."""
    write_lock(tmp_path, host="\x1b[2Jevil\nhost", program="\x1b]0;x\x07")
    with hold(tmp_path, KEY) as notices:
        assert notices[0].isprintable() and "evil" in notices[0]


def test_a_folder_that_cannot_be_written_is_no_error_here(tmp_path, monkeypatch):
    """A finished run in a read-only folder could not even be looked at."""
    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_lock, "open_lock", refuse)
    with hold(tmp_path, KEY) as notices:
        assert notices == []
        assert "another run is writing" in refusal(tmp_path)


# -- without locks -------------------------------------------------------------------------------------------------


def test_without_locks_another_host_is_left_to_the_user(tmp_path, no_locks):
    """On a network file system without locks the lock of another machine is taken over, or blocks without advice."""
    path = write_lock(tmp_path, host="node-7", pid=os.getpid())
    message = refusal(tmp_path)
    assert f"process {os.getpid()} on node-7" in message
    assert f"{path} says" in message and "once you are sure that it is not, remove that file" in message
    path.unlink()
    with hold(tmp_path, KEY):
        assert "remove that file" in refusal(tmp_path)  # this process, which is alive


def test_without_locks_a_dead_process_of_this_host_is_recognised(tmp_path, no_locks):
    """The lock of a killed run on this machine asks for the user's help although anybody can see that it is dead."""
    for stale in ({"pid": DEAD}, {"pid": os.getpid(), "started": -5}):  # the number is another process's now
        write_lock(tmp_path, **stale)
        with hold(tmp_path, KEY):
            assert json.loads((tmp_path / LOCK).read_text())["started"] == started(os.getpid())
        assert list(tmp_path.iterdir()) == []


def test_who_has_ended():
    """A living process is taken for dead, and two runs write into one folder; or a zombie for alive, for ever."""
    assert has_ended(holder()) and not has_ended(None)
    assert not has_ended(holder(pid=os.getpid(), started=None))
    assert not has_ended(holder(host="elsewhere"))
    assert not has_ended(holder(pid=0)) and not has_ended(holder(pid=-1))
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended and is still in the table
    assert has_ended(holder(pid=child, started=5))
    os.waitpid(child, 0)


# -- processes -----------------------------------------------------------------------------------------------------


CHILD = """
import os, sys, time
sys.path.insert(0, ".")
from pathlib import Path
from utils.runs.run_lock import hold
with hold(Path(sys.argv[1]), "key"):
    worker = os.fork() if sys.argv[2] == "worker" else 1
    if worker == 0:
        time.sleep(float(sys.argv[3]))
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another(folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", CHILD, str(folder), *arguments]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too


def test_killed_while_holding(tmp_path):
    """SIGKILL leaves a lock that nobody can take; before it, the other process is let in."""
    with held_by_another(tmp_path, "alone") as process:
        assert f"process {process.pid} on" in refusal(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(tmp_path, KEY) as notices:
            assert f"process {process.pid} on" in notices[0] and "taken over" in notices[0]


def test_workers_of_a_killed_run_are_waited_for(tmp_path, monkeypatch):
    """Worker processes hold the lock of a killed run for some seconds: started again at once, it was refused."""
    pauses = []
    sleep = time.sleep
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds)))
    with held_by_another(tmp_path, "worker", "1.0") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(tmp_path, KEY) as notices:
            assert pauses and "taken over" in notices[0]


def test_waiting_for_workers_has_an_end(tmp_path, impatient):
    """A worker that never ends makes the next run wait for ever."""
    with held_by_another(tmp_path, "worker", "30") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert f"process {process.pid} on" in refusal(tmp_path)


# -- the scripts ---------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict:
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")}


def test_a_finished_run_started_again_changes_no_byte(tmp_path, capsys):
    """Starting a finished run again writes results, checkpoints or logs anew, or leaves something lying about."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    assert run(tmp_path, config) == 0
    before = snapshot(tmp_path / "run"), snapshot(tmp_path / "cache")
    capsys.readouterr()
    assert run(tmp_path, config) == 0
    assert "already finished at step 3" in capsys.readouterr().err
    assert (snapshot(tmp_path / "run"), snapshot(tmp_path / "cache")) == before


def test_a_training_refuses_a_held_folder_and_takes_over_a_stale_lock(tmp_path, capsys):
    """Two trainings in one folder destroy each other's checkpoints; or one waits for a lock that nobody holds."""
    config = make_project(tmp_path, rows=6)
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    with hold(output_dir, KEY):
        assert run(tmp_path, config) == 2
    error = capsys.readouterr().err
    assert f"train.py: error: {KEY}: another run is writing to {output_dir}: process {os.getpid()} on" in error
    assert list(output_dir.iterdir()) == []
    write_lock(output_dir)
    assert run(tmp_path, config) == 0
    assert f"process {DEAD} on" in capsys.readouterr().err
    assert sorted(path.name for path in output_dir.iterdir()) == [
        "config.json", "metrics.jsonl", "model_checkpoints", "tensorboard"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(tmp_path, capsys):
    """A finished run in a read-only folder ends in a traceback; an unfinished one trains, and then cannot save."""
    config = make_project(tmp_path, rows=6)
    assert run(tmp_path, config) == 0
    folders = [tmp_path / "run", tmp_path / "run/model_checkpoints"]
    try:
        for folder in folders:
            folder.chmod(0o555)
        capsys.readouterr()
        assert run(tmp_path, config) == 0
        assert "already finished at step 3" in capsys.readouterr().err
        assert run(tmp_path, changed(config, trainer_kwargs={"epochs": 2})) in (1, 2)
        [line] = [line for line in capsys.readouterr().err.splitlines() if "train.py: error: " in line]
        assert str(tmp_path / "run") in line and "Permission denied" in line and "change its rights" in line
    finally:
        for folder in folders:
            folder.chmod(0o755)
