"""SIGKILL at random moments of whole runs, and sometimes again while they go on."""

import random
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.crash_cases import Case, finished
from tests.faults.crash_results import EARLIER, differences, read_results
from tests.faults.runs import Run

SCRIPT = "tests.faults.crash_child:script"
AGAIN = 1 / 3  # share of the kills after which the resumed run is killed too


@dataclass
class Moments:
    """moments: those drawn, `late` of them after the run's end. kills: first ones and those of resumed runs. resumed:
    runs that were started again after a kill; anew: of those, how many had no checkpoint yet. faults: lines."""

    moments: int = 0
    late: int = 0
    kills: int = 0
    resumed: int = 0
    anew: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """What an uninterrupted run of a case leaves, and how long it takes (seconds)."""

    case: Case
    results: dict[str, object]
    seconds: float


def measure(run: Run, case: Case, folder: Path, times: int = 3) -> Known:
    """Uninterrupted runs. Raises RuntimeError where they differ, since then nothing can be told of killed ones."""
    seconds, results = [], []
    for _ in range(times):
        command = begin(run, case, folder)
        seconds.append(finished(run(SCRIPT, **command)).seconds)
        results.append(read_results(folder / "run"))
    if lines := [line for other in results[1:] for line in differences(results[0], other)]:
        raise RuntimeError(f"{case.name}: uninterrupted runs differ: {lines}")
    return Known(case, results[0], statistics.median(seconds))


def begin(run: Run, case: Case, folder: Path) -> dict:
    """The output folder as it is before the run; the arguments of `SCRIPT`."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    case.prepare(run, folder / "run")
    return {"name": case.script, "arguments": case.command(folder / "run")}


def at_random_moments(
    run: Run, known: list[Known], count: int, seed: int, folder: Path, progress: Callable = lambda moments: moments,
) -> Moments:
    """Kills `count` runs, of each case in turn, at moments drawn uniformly over the length of an uninterrupted one."""
    rng, done = random.Random(seed), Moments()
    for number in progress(range(count)):
        each = known[number % len(known)]
        moments = [rng.uniform(0, each.seconds)]
        while rng.random() < AGAIN:
            moments.append(rng.uniform(0, each.seconds))
        command = begin(run, each.case, folder)
        where = f"moment {number + 1}, {each.case.name} killed after {', '.join(f'{time:.3f}' for time in moments)} s"
        done.moments += 1
        for time in moments:
            outcome = run(SCRIPT, kill_after=time, **command)
            done.kills += outcome.killed
            done.resumed += outcome.killed
            if not outcome.killed:
                done.late += time == moments[0]
                if outcome.code != 0:
                    done.faults.append(f"{where}: exit code {outcome.code}: {outcome.output[-1000:]}")
        outcome = run(SCRIPT, **command)
        if outcome.code != 0:
            done.faults.append(f"{where}: exit code {outcome.code} in the end: {outcome.output[-1000:]}")
            continue
        results = read_results(folder / "run")
        known_folders = {name.split("/")[0] for name in each.results}
        done.anew += any(EARLIER.fullmatch(name) and name not in known_folders for name in results)
        done.faults += [f"{where}: {line}" for line in differences(each.results, results)]
    return done
