"""SIGKILL at every file operation and at random moments; the same command then ends as if nothing had been.

These are the quick part of `python -m tests.faults.crash --operations`, which kills at more writes and moments.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import operations
from tests.faults.crash_cases import make_cases
from tests.faults.crash_moments import at_random_moments, measure
from tests.faults.crash_operations import WRITES, at_every_operation
from tests.faults.runs import Run, fork_server, scratch

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="children are waited for as Linux does it")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with fork_server() as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.fixture
def library(tmp_path) -> Path:
    try:
        return operations.build(tmp_path)
    except operations.NoFaultsHere as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last checkpoint", "predictions", "token cache"])
def test_killed_at_every_operation(run, library, folder, name):
    """Fault: a kill between two file operations loses or mixes results, changes the end or leaves temporary files."""
    write = WRITES[name]
    tally = at_every_operation(run, library, make_cases(folder / "cases")[write.case], write, folder)
    assert tally.faults == []
    assert tally.operations > 10 and tally.kills > tally.operations and tally.resumed == tally.kills


@pytest.mark.slow
def test_killed_at_random_moments(run, folder):
    """Fault: a kill in a step, an evaluation, a start or a save changes the weights, the log or the predictions."""
    known = [measure(run, case, folder, times=2) for case in make_cases(folder / "cases").values()]
    done = at_random_moments(run, known, 20, 1, folder)
    assert done.faults == []
    assert done.moments == 20 and done.kills == done.resumed > 0
