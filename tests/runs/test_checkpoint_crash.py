"""A full disk, a crash or a kill at any moment of saving costs no earlier checkpoint: utils/runs/checkpoint.py.

Whole runs that are killed: tests/faults/crash.py.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs.test_checkpoint import assert_of_step, leftovers, links_of, save, snapshot, steps_of
from utils.manifest import verify
from utils.runs.checkpoint import Checkpoints, load_state


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "run" / "model_checkpoints"


LIMITED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from utils.manifest import CheckpointError
from utils.runs.checkpoint import Checkpoints
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


def test_a_write_that_is_cut_off(root):
    """Fault: `ulimit -f 500` cuts a 1.2 MB file to 512,000 bytes that cannot be loaded (A21), in each library's own
    way: the good checkpoint is replaced, `last` moved, or a temporary left."""
    save(Checkpoints(root, "run-a", 2), 1)
    before = snapshot(root)
    command = ["bash", "-c", 'ulimit -f 500; exec "$@"', "bash", sys.executable, "-c", LIMITED, str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert "step-2: not written" in line and "File too large" in line and "trainer_kwargs.output_dir" in line
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
    """Fault: between two renames there is a moment without any complete checkpoint, for a new step (3) or a repeated
    one (2); or a run that is finished then keeps `last`, `best` or an old step as they were for ever."""
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
        checkpoints = Checkpoints(root, "run-a", 1)
        newest, notices = checkpoints.newest()
        assert newest in (root / "step-2", root / f"step-{step}") and notices == [] and not leftovers(root)
        assert_of_step(newest, int(newest.name[5:]))
        verify(root / "last")
        assert load_state(root / "last")[0]["step"] in (2, step)
        checkpoints.repair_links(int(newest.name[5:]), int(newest.name[5:]))
        assert steps_of(root) == [newest.name] and links_of(root) == [newest.name] * 2 and not leftovers(root)
    monkeypatch.undo()
    assert number > 6 and steps_of(root) == [f"step-{step}"]
