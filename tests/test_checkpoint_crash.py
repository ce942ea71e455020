"""A full disk, a crash or a kill at any moment of saving costs no earlier checkpoint: utils/runs/checkpoint.py."""

import errno
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_checkpoint import assert_of_step, leftovers, save, snapshot, steps_of
from utils.runs.checkpoint import CheckpointError, Checkpoints, load_state, verify

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "run" / "model_checkpoints"


FILES = ["weights.bin", "optimizer.pt", "state.json", "manifest.json"]


@pytest.mark.parametrize("length", [0, 1, 100])
@pytest.mark.parametrize("number", range(len(FILES)), ids=FILES)
def test_writer_fails_after_some_bytes(root, monkeypatch, number, length):
    """A half-written checkpoint replaces the good one, moves `last` or is left lying about (A21)."""
    checkpoints = Checkpoints(root, "run-a", 2)
    save(checkpoints, 1, best=True)
    before, calls = snapshot(root), []
    full = OSError(errno.ENOSPC, "No space left on device")

    def broken_model(folder):
        (folder / "weights.bin").write_bytes(b"x" * length)
        raise full

    def broken_torch(_, file):
        file.write(b"x" * length)
        raise full

    def broken_text(descriptor, mode):
        if mode == "wb":
            calls.append(descriptor)
        if mode == "wb" and len(calls) == number - 1:
            os.write(descriptor, b"x" * length)
            os.close(descriptor)
            raise full
        return original(descriptor, mode)

    original = os.fdopen
    if number == 1:
        monkeypatch.setattr(torch, "save", broken_torch)
    elif number > 1:
        monkeypatch.setattr(os, "fdopen", broken_text)
    with pytest.raises(CheckpointError, match=r"step-2: not written .*No space left.*output_dir") as caught:
        save(checkpoints, 2, broken_model if number == 0 else None)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert snapshot(root) == before and sorted(p.name for p in root.iterdir()) == ["best", "last", "step-1"]
    assert checkpoints.newest() == (root / "step-1", [])


LIMITED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from utils.runs.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), "run-a", 2)
big, small = {"a": torch.zeros(300_000)}, {"a": torch.zeros(3)}
for model, optimizer, note in [(big, small, ""), (small, big, ""), (small, small, "x" * 1_200_000)]:
    try:
        write = lambda folder: save_file(model, folder / "model.safetensors")
        checkpoints.save(2, write, {"note": note}, {"optimizer": optimizer})
        print("no error")
    except CheckpointError as error:
        print(error)
"""


def test_file_size_limit(root):
    """`ulimit -f 500` cuts a 1.2 MB file to 512,000 bytes that cannot be loaded (A21), in each library's own way."""
    save(Checkpoints(root, "run-a", 2), 1)
    before = snapshot(root)
    command = ["bash", "-c", 'ulimit -f 500; exec "$@"', "bash", sys.executable, "-c", LIMITED, str(root)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert "step-2: not written" in line and "File too large" in line and "file size limit" in line
    assert snapshot(root) == before and not leftovers(root)


class Crash(BaseException):
    """The process is gone: nothing that it would still do happens."""


def crash_at(monkeypatch, number: int, after: bool) -> None:
    """Before or after the `number`-th rename, link or deletion, and at all later ones, the process is dead."""
    calls = []
    for owner, name in [(os, "rename"), (os, "replace"), (os, "symlink"), (os, "unlink"), (shutil, "rmtree")]:

        def call(*args, original, **kwargs):
            calls.append(original.__name__)
            if len(calls) == number and after:
                original(*args, **kwargs)
            if len(calls) >= number:
                raise Crash
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.partial(call, original=getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [2, 3])
def test_crash_at_each_rename(tmp_path, monkeypatch, step, after):
    """Between two renames there is a moment without any whole checkpoint, for a new step (3) or a repeated one (2)."""
    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        checkpoints = Checkpoints(root, "run-a", 1)
        for earlier in (1, 2):
            save(checkpoints, earlier)
        crash_at(monkeypatch, number, after)
        try:
            save(checkpoints, step, best=True)
            break
        except Crash:
            monkeypatch.undo()
        newest, notices = Checkpoints(root, "run-a", 1).newest()
        assert newest in (root / "step-2", root / f"step-{step}") and notices == [] and not leftovers(root)
        assert_of_step(newest, int(newest.name[5:]))
        verify(root / "last")
        assert load_state(root / "last")[0]["step"] in (2, step)
        save(Checkpoints(root, "run-a", 1), 3)
        assert_of_step(root / "last", 3)
    monkeypatch.undo()
    assert number > 8 and steps_of(root) == [f"step-{step}"]


@pytest.mark.parametrize("undone", ["last", "best", "retired"])
def test_what_a_kill_left_undone_is_settled(root, monkeypatch, undone):
    """Killed in its last save, a run that is started again is finished: `last` stays a step behind for ever."""
    checkpoints = Checkpoints(root, "run-a", 1)
    for step in (1, 2):
        save(checkpoints, step, best=True)
    original = Checkpoints._point

    def crash(self, link, step):
        if link == undone:
            raise Crash
        original(self, link, step)

    monkeypatch.setattr(Checkpoints, "_retire", crash_always if undone == "retired" else Checkpoints._retire)
    monkeypatch.setattr(Checkpoints, "_point", crash)
    with pytest.raises(Crash):
        save(checkpoints, 3, best=True)
    monkeypatch.undo()
    assert steps_of(root) == ["step-2", "step-3"]
    Checkpoints(root, "run-b", 1).settle(3, 3)  # another run's: nothing of it is touched
    assert steps_of(root) == ["step-2", "step-3"]
    Checkpoints(root, "run-a", 1).settle(3, 3)
    assert steps_of(root) == ["step-3"] and not leftovers(root)
    assert [(root / link).readlink().name for link in ("last", "best")] == ["step-3", "step-3"]


def crash_always(self, step):
    raise Crash


def test_no_room_for_another(root, monkeypatch):
    """Hours of training end in a full disk that could be foreseen; another run's bigger model is no measure."""
    save(Checkpoints(root, "run-b", 2), 1, lambda folder: (folder / "weights.bin").write_bytes(bytes(99_000)))
    checkpoints = Checkpoints(root, "run-a", 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    save(checkpoints, 2, lambda folder: (folder / "weights.bin").write_bytes(bytes(60_000)))
    before = snapshot(root)
    with pytest.raises(CheckpointError, match=r"step-3: not written, 0\.1 MB free.*keep_checkpoints") as caught:
        save(checkpoints, 3)
    assert snapshot(root) == before and "\n" not in str(caught.value)
