"""Long runs in which memory, files, threads and disk stay flat: tests/faults/soak.py, here with fewer steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.soak import RUNS, Sample, growth, rise

FLAT = [Sample(100 * number, 500_000_000, 90_000, 12, 3, 20, 1_000_000, 5_000 * number) for number in range(1, 21)]


def changed(field: str, of_checkpoint: int) -> list[Sample]:
    """FLAT with `of_checkpoint` more of a field at each checkpoint."""
    return [sample._replace(**{field: getattr(sample, field) + of_checkpoint * number})
            for number, sample in enumerate(FLAT)]


@pytest.mark.parametrize(("field", "leak"), [
    ("memory", 200 * 1024), ("objects", 10), ("open_files", 1), ("threads", 1), ("files", 1), ("disk", 100),
])
def test_leaks_are_found(field, leak):
    """Fault: the long run does not notice what grows with each checkpoint."""
    assert growth(FLAT) == []
    assert [line.split()[0] for line in growth(changed(field, leak))] == [field]
    assert growth(changed("logs", 10_000)) == []


def test_one_file_left_open_is_found():
    """Fault: a single file or thread that is left behind late counts as rounding."""
    last = FLAT[-1]
    assert growth([*FLAT[:-1], last._replace(open_files=13)]) and growth([*FLAT[:-1], last._replace(threads=4)])


def test_growth_of_the_first_half_counts_as_warming_up():
    """Fault: caches that fill once are taken for a leak."""
    assert growth([sample._replace(memory=sample.memory - 10**8, objects=1) for sample in FLAT[:10]] + FLAT[10:]) == []


def test_rise():
    """Fault: the slope is not that of least squares."""
    assert rise([3.0, 3.0, 3.0]) == 0 and rise([1.0, 3.0, 5.0, 7.0]) == 2
    assert rise([0.0, 1.0, 0.0, 1.0]) == pytest.approx(0.2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stays_flat(name):
    """Fault: each evaluation or checkpoint keeps memory, a file or a thread, and a run of days ends in none left."""
    command = [sys.executable, "-m", "tests.faults.soak", "--steps=300", "--every=15", f"--run={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("\n") == 1 + 1 + 20 + 1
