"""SIGKILL at file operations and at random moments; the same command again then ends as if nothing had happened.

    python -m tests.faults.crash                                      every file operation of every case
    python -m tests.faults.crash --operations 100 --cases train       100 of those of one case
    python -m tests.faults.crash --operations 0 --moments 200         200 random moments

Compared bit for bit with an undisturbed run: weights, optimizer and random states, metrics.jsonl without speeds,
predictions, scores, the list of files. Right after the kill no result may be half written, and the newest checkpoint
must be the one that the next run resumes from. Exit code 1 if anything was wrong.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from tests.faults.cases import Case, make_cases
from tests.faults.results import newest_step, resumed_step, torn_files
from tests.faults.runs import Fault, NoFaultsHere, Run, fork_server, scratch

AGAIN = 0.2  # share of the runs killed at a random moment that are killed once more while they resume


def file_operations(run: Run, case: Case) -> list[tuple[int, str]]:
    """(number, operation) of those of an undisturbed run in its run folder, of several writes to one file in a row
    only the first and the last."""
    case.restart()
    log = case.place.with_suffix(".log")
    case.run(run, fault=Fault(str(case.place / "run"), log=str(log)))
    lines = log.read_text(encoding="utf-8").splitlines()
    around = zip(["", *lines], lines, [*lines[1:], ""], strict=False)
    return [(number, line) for number, (before, line, after) in enumerate(around, 1)
            if not before == line == after]


def at_operations(run: Run, case: Case, chosen: Sequence[tuple[int, str]]) -> list[str]:
    """Kills a run just before each of these operations, and runs the same command again."""
    found = []
    for number, operation in chosen:
        case.restart()
        outcome = case.run(run, fault=Fault(str(case.place / "run"), number))
        where = f"{case.name}, killed at {number} ({operation})"
        found += [f"{where}: {line}" for line in [
            *([] if outcome.code == -9 else [f"exit code {outcome.code}, not killed"]), *after_kill(run, case)]]
    return found


def at_moments(run: Run, case: Case, moments: Sequence[float], rng: random.Random) -> list[str]:
    """Kills a run after each of these shares of an undisturbed run's time."""
    found = []
    for moment in moments:
        case.restart()
        while True:
            case.run(run, kill_after=moment * case.seconds)
            where = f"{case.name}, killed after {moment:.3f} of its time"
            found += [f"{where}: {line}" for line in torn_files(case.place / "run")]
            if rng.random() > AGAIN:
                break
            moment = rng.random()
        found += [f"{where}: {line}" for line in after_kill(run, case)]
    return found


def after_kill(run: Run, case: Case) -> list[str]:
    """What is wrong with the files that a killed run left, and with what the same command then makes of them."""
    folder = case.place / "run"
    found, step = torn_files(folder), newest_step(folder)
    outcome = case.run(run)
    if case.earlier is None and resumed_step(outcome) < step:
        found.append(f"step {step} was in place, resumed from {resumed_step(outcome)}")
    found += case.problems(outcome)
    if case.earlier is not None and case.script != "validate_model.py":
        weights = (case.start / "run/model_checkpoints/best/model.safetensors").read_bytes()
        if not any(path.read_bytes() == weights for path in folder.rglob("earlier-run-*/**/model.safetensors")):
            found.append("the earlier run's weights are gone")
    return found


def spread(items: list, count: int | None, offset: int = 0) -> list:
    """`count` of the items, evenly spread; all for None."""
    if count is None or count >= len(items):
        return items
    return [items[(index * len(items) + offset) // count % len(items)] for index in range(count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.crash", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, metavar="N", help="file operations per case (default: all)")
    parser.add_argument("--moments", type=int, default=0, metavar="N", help="random moments, over all cases")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", help="some of the cases (default: all)")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    with scratch() as folder, fork_server() as run:
        cases = make_cases(folder)
        names = options.cases or list(cases)
        found: list[str] = []
        for index, case in enumerate(cases[name] for name in names):
            case.prepare(run)
            if options.operations != 0:
                operations = file_operations(run, case)
                chosen = spread(operations, options.operations)
                found += report(f"{case.name}: {len(chosen)} of {len(operations)} file operations", chosen,
                                lambda operation, case=case: at_operations(run, case, [operation]))
            moments = [rng.random() for _ in range(options.moments // len(names)
                                                   + (index < options.moments % len(names)))]
            if moments:
                found += report(f"{case.name}: {len(moments)} random moments", moments,
                                lambda moment, case=case: at_moments(run, case, [moment], rng))
    print(f"{len(found)} wrong")
    return 1 if found else 0


def report(title: str, items: list, attempt: Callable[[object], list[str]]) -> list[str]:
    """Tries the items one after the other and prints what is wrong, as soon as it is found."""
    found = []
    for item in tqdm(items, desc=title, disable=None, dynamic_ncols=True):
        for line in attempt(item):
            found.append(line)
            print(f"wrong: {line}", flush=True)
    print(f"{title}: {len(found)} wrong", flush=True)
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoFaultsHere as reason:
        sys.exit(f"tests.faults.crash: {reason}")
