"""Two runs in one folder: the second is refused and told why; a dead one's lock is free: utils/runs/folder_lock.py."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small_runs import changed, make_project, run
from utils.errors import UserError
from utils.runs.folder_lock import lock_folder

KEY = "trainer_kwargs.output_dir"


def refusal(folder: Path) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(UserError) as caught, lock_folder(folder, KEY):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(folder: Path) -> dict:
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")}


def test_the_holder_is_named(tmp_path):
    """Fault: a second run is let in, is refused without a word on who is there, or is refused after the first ended."""
    with lock_folder(tmp_path, KEY):
        message = refusal(tmp_path)
        assert message.startswith(f"{KEY}: another run is writing to {tmp_path}: process {os.getpid()} on "
                                  f"{socket.gethostname()} (")
        assert "since 20" in message and "choose another folder" in message
    with lock_folder(tmp_path, KEY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


CHILD = """
import os, sys, time
from pathlib import Path
from utils.runs.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "key"):
    worker = os.fork() if sys.argv[2] == "worker" else 1
    if worker == 0:
        time.sleep(2.0)
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


@pytest.mark.parametrize("workers", ["alone", "worker"])
def test_killed_while_holding(tmp_path, workers):
    """Fault: SIGKILL leaves a lock that nobody can take, or that workers hold which outlive their run for seconds;
    before it, the other process is let in."""
    with held_by_another(tmp_path, workers) as process:
        assert f"process {process.pid} on" in refusal(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_folder(tmp_path, KEY):
            assert json.loads((tmp_path / "run.lock.json").read_text())["pid"] == os.getpid()


# -- the scripts ---------------------------------------------------------------------------------------------------


def test_a_finished_run_started_again_changes_no_byte(tmp_path, capsys):
    """Fault: starting a finished run again writes results, checkpoints or logs again, or leaves something there."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    assert run(tmp_path, config) == 0
    before = snapshot(tmp_path / "run"), snapshot(tmp_path / "cache")
    capsys.readouterr()
    assert run(tmp_path, config) == 0
    assert "already finished at step 3" in capsys.readouterr().err
    assert (snapshot(tmp_path / "run"), snapshot(tmp_path / "cache")) == before
