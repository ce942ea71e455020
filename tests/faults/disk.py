"""Programs on a disk that is full, read-only or broken from some operation on: each operation in turn.

    python -m tests.faults.disk                         the last operation of each kind at each place, each error
    python -m tests.faults.disk --all                   every operation
    python -m tests.faults.disk --cases train demo --errors ENOSPC

A program must end with one line that names path, cause and remedy, and exit code 1 or 2, or go on to the right
results. Whatever checkpoint was finished before must be whole, training must go on from it in another folder to the
weights of an undisturbed run, and the same command, started again, must bring what an undisturbed one brings.
"""

import argparse
import errno
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.os_errors import REMEDIES
from tests.faults import operations
from tests.faults.crash_results import differences, read_results
from tests.faults.disk_cases import Case, make_cases
from tests.faults.runs import Outcome, Run, fork_server
from utils.runs.checkpoint import CheckpointError, Checkpoints

CHILD = "tests.faults.disk_child:"
# Error -> actions (see operations.start).
FAULTS = {
    "ENOSPC": ("short_then_fail",), "EDQUOT": ("short_then_fail",), "EIO": ("fail_once",), "EROFS": ("fail_from",),
    "EACCES": ("fail_from",),
}
USUAL = ("ENOSPC", "EIO", "EROFS")
# What may stay where it could not be deleted, until the next start: temporaries, steps that are no longer kept.
REMAINS = re.compile(r"[^:]*(/\.(tmp|building)\b|/model_checkpoints/step-[0-9]+\b)[^:]*: (was not left by|a temporary)")
ERROR_LINE = re.compile(r"^[\w./]+: error: ", re.MULTILINE)


@dataclass
class Tally:
    """runs: how they ended, by exit code. resumed: those that were gone on with elsewhere. faults: lines."""

    runs: Counter = field(default_factory=Counter)
    resumed: int = 0
    again: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """An undisturbed run: what it did, and what it left."""

    case: Case
    done: list[tuple[str, str]]
    results: dict[str, object]


def watch(run: Run, library: Path, case: Case, folder: Path) -> Known:
    """The undisturbed run."""
    place, log = folder / "disk", folder / "log"
    case.prepare(run, place)
    outcome = run(f"{CHILD}on_failing_disk", name=case.program, arguments=case.command(place / "out"), library=library,
                  folder=place, log=log)
    if outcome.code != 0:
        raise RuntimeError(f"{case.name}: exit code {outcome.code} on a good disk:\n{outcome.output[-3000:]}")
    known = Known(case, operations.read_log(log, place), results_of(case, place))
    shutil.rmtree(place)
    log.unlink()
    return known


def results_of(case: Case, place: Path) -> dict[str, object]:
    return {name: value for name, value in read_results(place).items() if not case.passing.search(name)}


def chosen(known: Known, every: bool) -> list[int]:
    """Numbers of operations: of all, or of the last of each kind at each place."""
    if every:
        return list(range(1, len(known.done) + 1))
    last: dict[tuple[str, str], int] = {}
    for number, (operation, path) in enumerate(known.done, 1):
        last[operation, re.sub(r"[0-9]+", "#", re.sub(r"-[0-9a-z_]{8}\b", "-*", path))] = number
    return sorted(last.values())


def fail(run: Run, library: Path, known: Known, number: int, error: str, action: str, folder: Path) -> Tally:
    """One run with one fault, and what comes after it."""
    place, case = folder / "disk", known.case
    shutil.rmtree(place, ignore_errors=True)
    case.prepare(run, place)
    outcome = run(
        f"{CHILD}on_failing_disk", name=case.program, arguments=case.command(place / "out"), library=library,
        folder=place, action=action, number=number, error=getattr(errno, error),
    )
    tally = Tally(Counter({outcome.code: 1}))
    where = f"{case.name}, {error} {action} at {number} of {len(known.done)} ({' '.join(known.done[number - 1])})"
    add = tally.faults.append
    for problem in problems(outcome, place, error):
        add(f"{where}: {problem}")
    if outcome.code == 0:
        left = differences(known.results, results_of(case, place))
        tally.faults += [f"{where}: exit code 0, but {line}" for line in left if not REMAINS.match(line)]
    root = place / "out" / "model_checkpoints"
    finished = steps_done(known.done[: number - 1])
    if case.trains and finished:
        newest = newest_step(root)
        if newest is None or newest < max(finished):
            add(f"{where}: step {max(finished)} was finished, the newest that is whole now is {newest}")
        else:
            wrong = elsewhere(run, known, root / f"step-{newest}", folder)
            tally.faults += [f"{where}: {line}" for line in wrong]
            tally.resumed += 1
    outcome = run(f"{CHILD}program", name=case.program, arguments=case.command(place / "out"))
    tally.again += 1
    if outcome.code != 0:
        add(f"{where}: started again on a good disk: exit code {outcome.code}: {outcome.output[-500:]}")
    else:
        left = differences(known.results, results_of(case, place))
        tally.faults += [f"{where}: started again on a good disk: {line}" for line in left]
    return tally


def problems(outcome: Outcome, place: Path, error: str | None) -> list[str]:
    """What is wrong with how a program on a failing disk ended."""
    found, text = [], outcome.output
    if "Traceback" in text or "unexpected" in text or "Exception ignored" in text:
        return [f"a traceback or an error that nobody foresaw: {text[-1500:]}"]
    lines = [line for line in text.replace("\r", "\n").splitlines() if ERROR_LINE.match(line)]
    if outcome.code == 0:
        return found + [f"exit code 0 with an error: {line}" for line in lines]
    if outcome.code not in (1, 2):
        found.append(f"exit code {outcome.code}: {text[-1500:]}")
    if len(lines) != 1:
        return [*found, f"{len(lines)} error lines: {text[-1500:]}"]
    if str(place) not in lines[0]:
        found.append(f"no path in: {lines[0]}")
    if error is not None and os.strerror(getattr(errno, error)) not in lines[0]:
        found.append(f"no cause in: {lines[0]}")
    if not any(remedy in lines[0] for remedy in [*REMEDIES.values(), "choose another", "name another"]):
        found.append(f"no remedy in: {lines[0]}")
    return found


def steps_done(done: list[tuple[str, str]]) -> list[int]:
    """The checkpoints that were in their places after these operations."""
    names = [re.search(r"out/model_checkpoints/\.tmp-new-step-([0-9]+)-[0-9a-f]{8}$", path)
             for operation, path in done if operation.startswith("rename")]
    return [int(name[1]) for name in names if name]


def newest_step(root: Path) -> int | None:
    try:
        newest, _ = Checkpoints(root, None, 1).newest()
    except CheckpointError:
        return None
    return None if newest is None else int(newest.name.removeprefix("step-"))


def elsewhere(run: Run, known: Known, checkpoint: Path, folder: Path) -> list[str]:
    """Going on from the checkpoint in another folder: the last weights are those of the undisturbed run."""
    other = folder / "elsewhere"
    shutil.rmtree(other, ignore_errors=True)
    arguments = [*known.case.command(other), "--set", f"trainer_kwargs.resume_from={checkpoint}"]
    outcome = run(f"{CHILD}program", name=known.case.program, arguments=arguments)
    if outcome.code != 0:
        return [f"gone on with elsewhere: exit code {outcome.code}: {outcome.output[-500:]}"]
    last = "model_checkpoints/last"
    step = str(known.results[f"out/{last}"]).removeprefix("link to ")
    weights = f"model_checkpoints/{step}/model.safetensors"
    if "already finished" in outcome.output and checkpoint.name == step:
        other = checkpoint.parent.parent  # there is nothing to go on with: the weights are there already
    found = read_results(other).get(weights)
    same = found is not None and known.results[f"out/{weights}"] == found
    return [] if same else [f"gone on with elsewhere: the weights of {step} are not those of an undisturbed run"]


def sweep(
    run: Run, library: Path, case: Case, folder: Path, errors: Sequence[str], every: bool = False,
    sample: int | None = None, seed: int = 1, progress=lambda faults: faults, tell=lambda line: None,
) -> tuple[Known, Tally]:
    """All faults of a case, or so many of them. tell: takes what is wrong, as soon as it is found."""
    folder.mkdir(parents=True)
    known, total = watch(run, library, case, folder), Tally()
    faults = [(number, error, action) for number in chosen(known, every) for error in errors
              for action in FAULTS[error]]
    if sample is not None and sample < len(faults):
        faults = sorted(random.Random(f"{case.name}/{seed}").sample(faults, sample))
    for number, error, action in progress(faults):
        tally = fail(run, library, known, number, error, action, folder)
        total.runs += tally.runs
        total.resumed, total.again = total.resumed + tally.resumed, total.again + tally.again
        total.faults += tally.faults
        for line in tally.faults:
            tell(line)
    return known, total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.disk", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every operation, not one of each kind at each place")
    parser.add_argument("--sample", type=int, help="only so many of the faults of each program")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", help="some of the programs (default: all)")
    parser.add_argument("--errors", nargs="+", choices=list(FAULTS), default=USUAL,
                        help=f"default: {' '.join(USUAL)}")
    options = parser.parse_args(arguments)
    started, faults = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch, fork_server() as run:
        folder = Path(scratch)
        try:
            library = operations.build(folder)
        except operations.NoFaultsHere as reason:
            raise SystemExit(f"tests.faults.disk: {reason}") from reason
        cases = make_cases(folder / "cases")
        for name in options.cases or cases:
            known, tally = sweep(
                run, library, cases[name], folder / name, options.errors, options.all, options.sample, options.seed,
                bar(name), lambda line: print(f"wrong: {line}", flush=True),
            )
            codes = ", ".join(f"{count} with exit code {code}" for code, count in sorted(tally.runs.items()))
            print(f"{name}: {len(known.done)} operations; {tally.runs.total()} runs with a fault ({codes}), "
                  f"{tally.again} started again, {tally.resumed} gone on with in another folder, "
                  f"{len(tally.faults)} wrong", flush=True)
            faults += len(tally.faults)
    print(f"{faults} wrong, in {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


def bar(name: str):
    return lambda faults: tqdm(faults, desc=name, unit="run", dynamic_ncols=True, mininterval=2, disable=None)


if __name__ == "__main__":
    sys.exit(main())
