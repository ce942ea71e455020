"""A full disk, a crash or a kill at any moment of saving costs no earlier checkpoint: utils/runs/checkpoint.py."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs.test_checkpoint import assert_of_step, leftovers, links_of, save, snapshot, steps_of
from tests.small_runs import assert_equal_weights, changed, make_project, metrics, weights, write_config
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


# -- whole runs --------------------------------------------------------------------------------------------------


KILLED = """
import json, os, random, signal, sys
import utils.runs.build, utils.runs.find_batch_size, utils.runs.run  # once, before the forks
import nltk, torch.utils.tensorboard, train
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

config, run, log = sys.argv[1:]

def forked(number):
    \"\"\"train.py in a process that is killed before its `number`-th operation on the run folder; its status.\"\"\"
    if process := os.fork():
        return os.waitpid(process, 0)[1]
    operations = []
    def hook(event, arguments):
        path = arguments[0] if arguments else None
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")) and (
                str(path).startswith(run) or str(arguments[1]).startswith(run)):
            operations.append(event)
            if len(operations) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    code = train.main(["--config", config])
    with open(log, "w") as file:
        file.write(str(len(operations)))
    os._exit(code)

assert forked(0) == 0
os.rename(run, run + "-complete")
total = int(open(log).read())
print(total)
for number in sorted(random.Random(0).sample(range(1, total + 1), 4)):
    killed, resumed = forked(number), forked(0)
    print(number, killed, resumed)
    os.rename(run, f"{run}-{number}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_runs_end_with_the_same_weights(tmp_path):
    """Fault: SIGKILL at some operation on files loses what a checkpoint held, or the resumed run ends otherwise."""
    config = changed(make_project(tmp_path, rows=8, dropout=0.1), trainer_kwargs={
        "epochs": 2, "n_batch_ckpt_save": 2, "keep_checkpoints": 1, "metrics": ["rouge"], "save_predictions": True})
    command = [sys.executable, "-c", KILLED, str(write_config(tmp_path, config)), str(tmp_path / "run"),
               str(tmp_path / "log")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    total, *lines = done.stdout.splitlines()
    assert int(total) > 50 and len(lines) == 4
    whole = tmp_path / "run-complete"
    for line in lines:
        number, killed, resumed = line.split()
        assert (int(killed), resumed) == (signal.SIGKILL, "0"), line
        again = tmp_path / f"run-{number}"
        assert_equal_weights(weights(whole / "model_checkpoints/last"), weights(again / "model_checkpoints/last"))
        assert metrics(again) == metrics(whole) and metrics(again, "validation") == metrics(whole, "validation")
        assert (again / "predictions/validation-step-8.json").read_bytes() == (
            whole / "predictions/validation-step-8.json").read_bytes()
        assert json.loads((again / "scores.json").read_text())["step"] == 8
        assert links_of(again / "model_checkpoints") == links_of(whole / "model_checkpoints")
        assert not leftovers(again), number
