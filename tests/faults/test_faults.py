"""Kills, refusing disks, damaged files, mutated inputs, long runs: samples of what tests/faults does in full.

docs/reliability.md has the commands of the full counts.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import crash, damage, disk, mutations, soak
from tests.faults.cases import Case, make_cases, tools
from tests.faults.results import differences, ending_problems, read_results
from tests.faults.runs import Fault, NoFaultsHere, Outcome, Run, fork_server, scratch

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="children are watched as Linux does it")


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    with fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def cases() -> Iterator[dict[str, Case]]:
    with scratch() as folder:
        yield make_cases(folder) | tools(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as path:
        yield path


def operations(run: Run, case: Case) -> list[tuple[int, str]]:
    try:
        case.prepare(run)
        return crash.file_operations(run, case)
    except NoFaultsHere as reason:
        pytest.skip(str(reason))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "count"), [("train", 2), slow("train", 5), slow("train again", 3), slow("policy", 2),
                                             slow("hidden cache", 2), slow("top-k cache", 2), slow("validate", 3)])
def test_killed_at_file_operations(run, cases, name, count):
    """Fault: a kill between two file operations loses or mixes results, or changes the end."""
    every = operations(run, cases[name])
    assert len(every) > 15
    assert crash.at_operations(run, cases[name], crash.spread(every, count, len(every) // 2)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "hidden cache", "policy", "validate"])
def test_killed_at_random_moments(run, cases, name):
    """Fault: a kill in a step, an evaluation, a start or a save changes the weights, the log or the predictions."""
    cases[name].prepare(run)
    rng = random.Random(name)
    assert crash.at_moments(run, cases[name], [rng.random() for _ in range(4)], rng) == []


@pytest.mark.parametrize(("name", "count", "errors"), [
    ("train", 1, ["ENOSPC"]), slow("train", 2, disk.ERRORS), slow("hidden cache", 1, ["ENOSPC", "EACCES"]),
    slow("validate", 1, ["ENOSPC", "EIO"]), slow("demo", 1, ["ENOSPC"]), slow("tables", 1, ["EROFS"]),
    slow("comparison", 1, ["ENOSPC"]),
])
def test_a_disk_that_refuses(run, cases, name, count, errors):
    """Fault: a full, read-only or failing disk ends in a traceback, a lost checkpoint or a wrong result."""
    every = operations(run, cases[name])
    for index, error in enumerate(errors):
        for operation in crash.spread(every, count, len(every) // 2 + 37 * index):
            assert disk.at_operation(run, cases[name], operation, error) == []


@pytest.mark.slow
def test_damaged_files(run, folder):
    """Fault: a damaged file is used as if it were whole, or the run ends in a traceback."""
    tried = damage.one_of_each(damage.attempts(run, folder, tries=1))
    assert len(tried) > 20
    assert [f"{title}: {line}" for title, attempt in tried for line in attempt()] == []


def test_a_damaged_checkpoint_is_not_used(run, cases):
    """Fault: a run resumes from a checkpoint with a flipped bit; the newest whole one is taken instead."""
    case = cases["train"]
    case.prepare(run)
    case.restart()
    case.run(run)
    weights = (case.place / "run/model_checkpoints/last").resolve() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 4
    weights.write_bytes(content)
    outcome = case.run(run)
    assert "model.safetensors" in outcome.errors
    assert case.problems(outcome) == []


@pytest.mark.parametrize("count", [8, slow(60)])
def test_mutated_inputs(run, folder, count):
    """Fault: a wrong config, argument, table or model folder ends in a traceback, or costs an earlier run."""
    workshop, failure = mutations.search(run, folder, count, seed_number=count)
    assert failure == ""
    assert sum(workshop.counts["examples"].values()) >= count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine-tuning", "policy gradient"])
def test_a_run_stays_flat(run, folder, name):
    """Fault: each step, evaluation or checkpoint keeps memory, a file or a thread."""
    assert soak.soak(run, name, folder / "soak", steps=120, every=15) == []


@pytest.mark.parametrize("name", ["train", "hidden cache"])
def test_two_runs_at_once_share_caches(run, cases, name):
    """Fault: two runs that fill one token or teacher cache at the same time spoil it, or one of them ends for it."""
    case = cases[name]
    case.prepare(run)
    case.restart()
    shared = [*case.arguments, "--set", "dataset_kwargs.cache_dir=tokens"]
    if name == "hidden cache":
        shared += ["--set", "distillation_kwargs.teacher_cache.dir=hidden"]
    outcome = case.run(run, shared, beside=[*shared, "--set", "trainer_kwargs.output_dir=other"])
    assert outcome.code == 0, outcome.errors
    weights = [key for key in case.expected if key[0].endswith("model.safetensors")]
    for folder in ("run", "other"):
        found = read_results(case.place / folder)
        assert weights and all(found[key] == case.expected[key] for key in weights)


@pytest.mark.parametrize("name", ["train", slow("validate")])
def test_two_runs_at_once_in_one_folder(run, cases, name):
    """Fault: two runs write into one folder at the same time; the second must be refused in one line."""
    case = cases[name]
    case.prepare(run)
    case.restart()
    outcome = case.run(run, beside=case.arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.errors
    assert outcome.errors.count(f"{case.script}: error: ") == 1
    assert differences(case.expected, read_results(case.place / "run")) == []


# -- what the harnesses would find ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "errors", "words"), [
    (0, "Traceback (most recent call last):\n", "nobody foresaw"), (-11, "", "exit code -11"),
    (2, "", "the last line is no error"), (2, "train.py: error: config.json: wrong\nmore of it\n", "the last line"),
    (1, "train.py: error: unexpected KeyError: 'a'\n", "nobody foresaw"), (2, "train.py: error: \n", "no readable"),
    (2, "train.py: error: config.json: \x1b[31m is wrong\n", "no readable line"),
    (0, "train.py: error: config.json: is wrong\n", "exit code 0 with an error"),
])
def test_bad_endings_are_found(code, errors, words):
    """Fault: the judge lets a bad ending pass."""
    assert words in ending_problems("train.py", Outcome(code, 0.0, False, [], "", errors))[0]


def test_good_endings_pass():
    """Fault: the judge complains of what is allowed."""
    for code, errors in ((0, "finished\n"),
                         (2, "train.py: error: c.json: a is wrong\ntrain.py: error: c.json: b is wrong\n"),
                         (1, "epoch 1:  50%|#####  | 1/2\rtrain.py: error: step 2: the loss is nan\n")):
        assert ending_problems("train.py", Outcome(code, 0.0, False, [], "", errors)) == []


def test_differences_and_growth_are_found():
    """Fault: other weights, a missing file or a leak pass for equal."""
    expected = {("a", ""): 1, ("b", ".x"): 2}
    assert differences(expected, dict(expected)) == []
    assert [line[0] for line in differences(expected, {("a", ""): 2, ("c", ""): 3})] == ["a", "b", "c"]
    flat = [(10**8, 12, 3)] * 90
    assert soak.growth(flat, 1000) == []
    leaks = ([(10**8 + 10**7 * index, 12, 3) for index in range(90)], [*flat[:-1], (10**8, 13, 3)],
             [*flat[:-1], (10**8, 12, 4)])
    assert [len(soak.growth(leak, 1000)) for leak in leaks] == [1, 1, 1]


@pytest.mark.parametrize(("error", "code"), [(0, -9), (28, 0)])
def test_operations_are_stopped_and_refused(run, folder, error, code):
    """Fault: the operation is not the one that was meant, or is not seen."""
    (folder / "place").mkdir()
    script = "import os\nfor name in 'abc':\n try: os.mkdir(name)\n except OSError as error: print(error.errno)\n"
    (folder / "work.py").write_text(script)
    fault = Fault(str(folder / "place"), 2, error, log=str(folder / "log"))
    try:
        outcome = run(str(folder / "work.py"), [], folder / "place", fault=fault)
    except NoFaultsHere as reason:
        pytest.skip(str(reason))
    assert (outcome.code, outcome.output) == (code, "28\n" if error else "")
    assert sorted(os.listdir(folder / "place")) == (["a", "c"] if error else ["a"])  # noqa: PTH208
    assert (folder / "log").read_text().splitlines()[:2] == ["mkdir a", "mkdir b"]
