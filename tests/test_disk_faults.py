"""Full, failing and vanishing disks: one line, nothing lost, and training goes on elsewhere (tests/faults/disk.py)."""

import re
import shutil
from pathlib import Path

import pytest

from tests.faults import operations
from tests.faults.crash_results import read_results
from tests.faults.disk import CHILD, FAULTS, problems, sweep
from tests.faults.disk_cases import Case, make_cases
from tests.faults.runs import Outcome, fork_server
from utils.runs.checkpoint import Checkpoints, verify

# How many faults of each program are tried here; all of them by `python -m tests.faults.disk`.
SAMPLES = {"train": 3, "hidden": 1, "top-k": 1, "validate": 1, "demo": 1, "cnn": 1, "compare-csv": 1, "compare-json": 1}
SLOW = ("top-k", "cnn", "compare-json")


@pytest.fixture(scope="module")
def run():
    with fork_server() as run:
        yield run


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    try:
        return operations.build(tmp_path_factory.mktemp("library"))
    except operations.NoFaultsHere as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def whole(run, cases, tmp_path_factory) -> dict:
    """What an undisturbed training leaves."""
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    assert program(run, cases["train"], output_dir).code == 0
    return last_weights(output_dir)


def program(run, case: Case, output_dir: Path, function: str = "program", extra: tuple = (), **options) -> Outcome:
    arguments = [*case.command(output_dir), *extra]
    return run(f"{CHILD}{function}", name=case.program, arguments=arguments, **options)


def last_weights(output_dir: Path) -> dict:
    found = read_results(output_dir)
    step = found["model_checkpoints/last"].removeprefix("link to ")
    return {"step": step, "weights": found[f"model_checkpoints/{step}/model.safetensors"]}


def goes_on_elsewhere(run, case: Case, checkpoint: Path, other: Path) -> dict:
    """The last weights of a training that goes on from a checkpoint in another folder."""
    outcome = program(run, case, other, extra=("--set", f"trainer_kwargs.resume_from={checkpoint}"))
    assert outcome.code == 0, outcome.output
    return last_weights(other)


# -- the disk refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SAMPLES
])
def test_a_disk_that_refuses(run, library, cases, tmp_path, name):
    """A full, read-only or failing disk: a traceback, a lost checkpoint, or a result that is not right afterwards."""
    _, tally = sweep(run, library, cases[name], tmp_path / "disk", list(FAULTS), sample=SAMPLES[name])
    assert tally.faults == [] and tally.again == SAMPLES[name]


@pytest.mark.slow
def test_a_full_disk_at_many_places(run, library, cases, tmp_path):
    """The same at places all over a training; at all of them: `python -m tests.faults.disk`."""
    _, tally = sweep(run, library, cases["train"], tmp_path / "disk", ["ENOSPC"], sample=30)
    assert tally.faults == [] and tally.resumed > 4


def test_faults_of_the_harness_are_seen(tmp_path):
    """The judge of these tests lets a traceback, a bare error, or one without path or remedy pass."""
    place = str(tmp_path)
    cause, remedy = "No space left on device", "free space on that disk, or choose a folder on another one"
    good = f"train.py: error: {place}/x: {cause}: {remedy}"
    ended = lambda code, text: problems(Outcome(code, False, 0.0, text), tmp_path, "ENOSPC")  # noqa: E731
    assert ended(1, f"step 1\r{good}\nend") == []
    for code, text in [
        (1, f"Traceback (most recent call last):\n{good}"), (1, ""), (1, f"{good}\n{good}"), (0, good), (-9, good),
        (1, good.replace(place, "")), (1, good.replace("No space", "Space")), (1, good.partition(": free")[0]),
    ]:
        assert ended(code, text) != []


@pytest.mark.parametrize("size", [pytest.param(20_000, marks=pytest.mark.slow), 60_000,
                                  pytest.param(110_000, marks=pytest.mark.slow)])
def test_file_size_limit(run, cases, tmp_path, whole, size):
    """`ulimit -f`: the signal SIGXFSZ kills the run, or a library hides the reason (a checkpoint has files of many
    sizes)."""
    case = cases["train"]
    outcome = program(run, case, tmp_path / "out", "with_size_limit", size=size)
    assert outcome.code in (1, 2)
    assert problems(outcome, tmp_path, "EFBIG") == []
    assert "ulimit -f" in outcome.output and "step-1: not written" in outcome.output
    assert program(run, case, tmp_path / "out").code == 0
    assert last_weights(tmp_path / "out") == whole


# -- the folder goes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", pytest.param("moved", marks=pytest.mark.slow)])
def test_the_run_folder_goes_while_it_is_written(run, cases, tmp_path, whole, how):
    """Hours of training end with the folder that somebody has cleared away: the weights were in memory."""
    case, output_dir = cases["train"], tmp_path / "out"
    outcome = program(run, case, output_dir, "losing", places=[str(output_dir)], line=3, how=how)
    assert outcome.code == 1
    [line] = [line for line in outcome.output.splitlines() if ": error: " in line]
    assert f"train.py: error: {output_dir} was removed or moved while the run wrote to it" in line
    assert "checkpoint written; the same command goes on from there" in line
    root = output_dir / "model_checkpoints"
    newest, notices = Checkpoints(root, None, 2).newest()
    assert newest is not None and notices == []
    assert goes_on_elsewhere(run, case, newest, tmp_path / "elsewhere") == whole
    if how == "moved":
        verify(tmp_path / "out-moved/model_checkpoints/last")
    outcome = program(run, case, output_dir)
    assert outcome.code == 0 and f"resuming from {newest}" in outcome.output
    assert last_weights(output_dir) == whole


@pytest.mark.parametrize("how", ["replaced", pytest.param("unwritable", marks=pytest.mark.slow)])
def test_something_else_is_in_the_place_of_the_run_folder(run, cases, tmp_path, whole, how):
    """A run writes its checkpoints among the files of somebody else, who has taken the name."""
    case, output_dir = cases["train"], tmp_path / "out"
    outcome = program(run, case, output_dir, "losing", places=[str(output_dir)], line=3, how=how)
    assert outcome.code in (1, 2)
    [line] = [line for line in outcome.output.splitlines() if ": error: " in line]
    assert str(output_dir) in line and "Traceback" not in outcome.output
    if how == "replaced":
        assert f"{output_dir} was replaced by another folder while the run wrote to it" in line
        assert list(output_dir.iterdir()) == []
    else:
        assert output_dir.read_text() == "somebody's notes"
    newest, _ = Checkpoints(tmp_path / "out-moved/model_checkpoints", None, 2).newest()
    assert goes_on_elsewhere(run, case, newest, tmp_path / "elsewhere") == whole


def test_a_run_folder_that_is_emptied(run, cases, tmp_path, whole):
    """Results that somebody deletes during the run end it, although all that they need is still in memory."""
    output_dir = tmp_path / "out"
    outcome = program(run, cases["train"], output_dir, "losing", places=[str(output_dir)], line=3, how="emptied")
    assert outcome.code == 0, outcome.output
    assert "was removed or replaced while the run wrote to it" in outcome.output
    assert last_weights(output_dir) == whole
    verify(output_dir / "model_checkpoints/last")


# -- files are cut short while they are read -----------------------------------------------------------------------


def test_a_token_table_is_cut_short_in_use(run, cases, tmp_path, whole):
    """A memory map of a file that shrinks ends the process by SIGBUS, without a word."""
    case, output_dir = cases["train"], tmp_path / "out"
    assert program(run, case, output_dir, extra=("--set", "trainer_kwargs.max_steps=1")).code == 0
    tables = [str(path) for path in output_dir.glob("token_cache/train-*/tokens.bin")]
    for workers in (0, 1):
        extra = ("--set", f"dataset_kwargs.num_workers={workers}", "--set", "trainer_kwargs.load_from_checkpoint=false")
        outcome = program(run, case, output_dir, "losing", extra, places=tables, line=1, how="cut")
        assert outcome.code == 2
        assert problems(outcome, tmp_path, None) == [] or "made anew" in outcome.output
        assert re.search(rf"train\.py: error: {tables[0]}: cut short while it was in use: .*made anew", outcome.output)
    shutil.rmtree(output_dir / "model_checkpoints")
    assert program(run, case, output_dir).code == 0
    assert last_weights(output_dir) == whole


@pytest.mark.parametrize("name", ["hidden", pytest.param("top-k", marks=pytest.mark.slow)])
def test_a_teacher_cache_is_cut_short_in_use(run, cases, tmp_path, name):
    """The same for a teacher's outputs, which can be computed again: the run goes on to the right weights."""
    case = cases[name]
    assert program(run, case, tmp_path / "out").code == 0
    arrays = [str(path) for path in (tmp_path / "out").glob("teacher_cache/train-*/*.bin")]
    assert arrays
    extra = ("--set", "trainer_kwargs.load_from_checkpoint=false")
    outcome = program(run, case, tmp_path / "out", "losing", extra, places=arrays, line=1, how="cut")
    assert outcome.code == 0 and "Traceback" not in outcome.output, outcome.output
    again = program(run, case, tmp_path / "other")
    assert again.code == 0
    assert last_weights(tmp_path / "out")["step"] == last_weights(tmp_path / "other")["step"]
