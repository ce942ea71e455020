"""Mutated configs, arguments, CSVs and model folders: tests/faults/mutations.py, here with fewer examples."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults import mutations_child
from tests.faults.mutations_child import LEFT_THE_FOLDER, Outcome, run_in_child
from tests.faults.mutations_judge import judge, kind_of, snapshot
from tests.faults.mutations_strategy import MODELS

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="children are watched in /proc")


def search(examples: int, seed: int) -> str:
    """`python -m tests.faults.mutations`, which must find nothing; what it printed."""
    command = [sys.executable, "-m", "tests.faults.mutations", f"--examples={examples}", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def counts(text: str) -> dict[str, int]:
    """{outcome: number of examples} of the table's last line."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("mutation "))
    names = re.split(r"  +", lines[start].strip())[1:]
    numbers = next(line for line in lines if line.startswith("examples ")).split()[1:]
    return dict(zip(names, map(int, numbers), strict=True))


def test_some_mutations():
    """Fault: a wrong config, argument, CSV or model folder ends in a traceback or hangs, or costs an earlier run."""
    found = counts(search(examples=120, seed=1))
    assert sum(found.values()) == 120
    assert found["ran"] > 15 and found["code 2"] > 40


@pytest.mark.slow
def test_a_thousand_mutations():
    """Fault: as above, in rarer combinations."""
    found = counts(search(examples=1000, seed=2))
    assert sum(found.values()) == 1000
    assert found["ran"] > 150 and found["code 2"] > 400


# -- what the search would find ----------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Runs a function instead of train.main in a child, in tmp_path/place; gives its outcome."""
    (tmp_path / "place").mkdir()
    (tmp_path / "temporary").mkdir()

    def run(main, seconds=20.0) -> Outcome:
        monkeypatch.setitem(mutations_child.MAINS, "train.py", main)
        return run_in_child("train.py", [], tmp_path / "place", tmp_path / "temporary", seconds)

    return run


def test_a_child_gives_its_code_and_its_words(child, tmp_path):
    """Fault: the search does not see what a run says, or runs it in another folder."""

    def main(arguments):
        print(Path.cwd())
        print("train.py: error: no", file=sys.stderr)
        return 2

    assert child(main) == Outcome(2, f"{tmp_path / 'place'}\n", "train.py: error: no\n")


@pytest.mark.parametrize("change", [
    lambda path: path.write_text("x"), lambda path: path.mkdir(), lambda path: path.open("a"),
    lambda path: Path("inside").symlink_to("x") or Path("inside").rename(path),
    lambda path: Path("..", "..", path.name).mkdir(),
    lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
])
def test_a_change_outside_is_prevented_and_told(child, tmp_path, change):
    """Fault: a run that writes into other folders of the disk is not noticed, or does it."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outcome = child(lambda arguments: change(outside))
    assert outcome.code == LEFT_THE_FOLDER and "changed outside of its folders" in outcome.stderr
    assert not os.path.lexists(outside)
    assert verdict(tmp_path / "place", outcome).fault.startswith("changed outside of its folders")


def test_a_hanging_child_is_stopped(child):
    """Fault: the search waits for ever for a run that hangs, or takes it for one that ended."""
    outcome = child(lambda arguments: time.sleep(60), seconds=0.05)
    assert outcome.stopped and not outcome.killed and outcome.code == 143


def test_a_child_that_heeds_no_signal_is_killed(child):
    """Fault: a run that ignores SIGTERM outlives the search."""

    def main(arguments):
        mutations_child.signal.signal(mutations_child.signal.SIGTERM, mutations_child.signal.SIG_IGN)
        time.sleep(60)

    outcome = child(main, seconds=0.05)
    assert outcome.killed and outcome.code == 137


def verdict(folder: Path, outcome: Outcome, before=None, arguments=("--config", "config.json"), script="train.py"):
    return judge(script, list(arguments), MODELS, folder, outcome, snapshot(folder) if before is None else before)


@pytest.mark.parametrize(("outcome", "words"), [
    (Outcome(0, "", "Traceback (most recent call last):\n"), "traceback"),
    (Outcome(1, "", "Traceback (most recent call last):\ntrain.py: error: x y z a b c\n"), "traceback"),
    (Outcome(139, "", ""), "exit code 139"),
    (Outcome(2, "", ""), "the last line is no error"),
    (Outcome(2, "", "train.py: error: config.json: wrong\nmore of it\n"), "the last line is no error"),
    (Outcome(1, "", "train.py: error: unexpected KeyError: 'a'; this is a fault\n"), "unexpected error"),
    (Outcome(2, "", "train.py: error: \n"), "says nothing"),
    (Outcome(2, "", "train.py: error: config.json: \x1b[31m is wrong\n"), "control characters"),
    (Outcome(2, "", f"train.py: error: config.json: {'x' * 3000}\n"), "an error of 3030 characters"),
    (Outcome(0, "", "train.py: error: config.json: wrong\n"), "code 0 with an error"),
    (Outcome(0, "", "x.py:3: UserWarning: careful\n"), "a warning of a library"),
    (Outcome(143, "", "", stopped=True), "hangs"),
    (Outcome(137, "", "", stopped=True, killed=True), "hangs"),
    (Outcome(0, "", ""), "its config cannot be loaded"),
])
def test_bad_endings_are_found(tmp_path, outcome, words):
    """Fault: the search lets a bad ending pass."""
    assert words in verdict(tmp_path, outcome).fault


@pytest.mark.parametrize("outcome", [
    Outcome(2, "", "told\ntrain.py: error: config.json: one\ntrain.py: error: config.json: two\n"),
    Outcome(1, "", "epoch 1/1:  50%|█████     | 1/2\rtrain.py: error: optimizer step 2: the loss is nan\n"),
    Outcome(143, "", "train.py: stopped at optimizer step 3 by SIGTERM, checkpoint written; go on\n", True),
])
def test_good_endings_pass(tmp_path, outcome):
    """Fault: the search complains of what is allowed."""
    assert verdict(tmp_path, outcome).fault is None


def earlier_run(folder: Path) -> None:
    (folder / "run" / "model_checkpoints" / "step-2").mkdir(parents=True)
    (folder / "run" / "model_checkpoints" / "step-2" / "model.safetensors").write_text("weights")
    (folder / "run" / "model_checkpoints" / "last").symlink_to("step-2")
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    config = {"trainer_kwargs": {"output_dir": "run"}, "dataset_kwargs": {"cache_dir": "cache"}}
    (folder / "config.json").write_text(json.dumps(config))


def lose_weights(folder: Path) -> None:
    (folder / "run" / "model_checkpoints" / "step-2" / "model.safetensors").write_text("others")


def lose_lines(folder: Path) -> None:
    (folder / "run" / "metrics.jsonl").write_text("")


def move_a_part(folder: Path) -> None:
    (folder / "run" / "earlier-run-1").mkdir()
    (folder / "run" / "model_checkpoints").rename(folder / "run" / "earlier-run-1" / "model_checkpoints")
    lose_lines(folder)


def write_beside(folder: Path) -> None:
    (folder / "stray").write_text("x")


@pytest.mark.parametrize(("change", "code", "words"), [
    (lose_weights, 1, "the earlier run's run/model_checkpoints/step-2/model.safetensors is changed"),
    (lose_weights, 2, "code 2, and the earlier run's run/model_checkpoints/step-2/model.safetensors is changed"),
    (lose_lines, 1, "lost lines of the earlier run"),
    (move_a_part, 1, "of the earlier run was not moved as it was to earlier-run-1"),
    (write_beside, 2, "new outside of output and cache folders: 'stray'"),
])
def test_lost_results_are_found(tmp_path, change, code, words):
    """Fault: the search does not notice that an earlier run's results are lost, or files that lie about."""
    earlier_run(tmp_path)
    before = snapshot(tmp_path)
    outcome = Outcome(code, "", "train.py: error: something is wrong\n")
    assert verdict(tmp_path, outcome, before).fault is None
    change(tmp_path)
    assert words in verdict(tmp_path, outcome, before).fault


def test_messages_of_one_kind_are_counted_once():
    """Fault: the table counts each path, text and number as another kind of message."""
    lines = [f"train.py: error: data/{name}.csv: row {row} (line {row + 1}, id {text!r}): empty article"
             for name, row, text in (("a", 3, "x"), ("b", 12, "it's"), ("c", 7, 'said "no"'))]
    assert len({*map(kind_of, lines)}) == 1
    assert kind_of(lines[0]) != kind_of(lines[0].replace("article", "highlights"))
