"""Kills runs of the three scripts, runs them again and compares with uninterrupted ones, bit for bit.

    python -m tests.faults.crash                    200 random moments
    python -m tests.faults.crash --operations       every file operation of each kind of write too
    python -m tests.faults.crash --moments 0 --operations

Compared are all tensors, the state, metrics.jsonl (without speeds), predictions, scores and the list of files. Prints
what was done; exit code 1 where a difference was found.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tests.faults import operations
from tests.faults.crash_cases import Case, make_cases
from tests.faults.crash_moments import at_random_moments, measure
from tests.faults.crash_operations import WRITES, Tally, at_every_operation
from tests.faults.runs import Run, fork_server, scratch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.crash", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="random moments (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    parser.add_argument("--operations", nargs="*", choices=list(WRITES), metavar="WRITE",
                        help=f"kill at every file operation too, of all writes or of some: {', '.join(WRITES)}")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with scratch() as folder, fork_server() as run:
        cases = make_cases(folder / "cases")
        names = list(WRITES) if options.operations == [] else options.operations or []
        faults = kill_at_operations(run, cases, folder, names) if names else []
        faults += kill_at_moments(run, cases, folder, options.moments, options.seed) if options.moments else []
    for line in faults:
        print(f"difference: {line}")
    print(f"{len(faults)} differences found, in {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


def kill_at_operations(run: Run, cases: dict[str, Case], folder: Path, names: list[str]) -> list[str]:
    try:
        library = operations.build(folder)
    except operations.NoFaultsHere as reason:
        raise SystemExit(f"--operations: {reason}") from reason
    total = Tally()
    for number, name in enumerate(names):
        write = WRITES[name]
        place = folder / f"write-{number}"
        place.mkdir()
        tally = at_every_operation(run, library, cases[write.case], write, place, bar(name))
        tell(name, tally)
        total += tally
    tell("all writes", total)
    return total.faults


def tell(name: str, tally: Tally) -> None:
    print(f"{name}: {tally.operations} operations, killed at {tally.kills} moments, {tally.resumed} runs resumed, "
          f"{len(tally.faults)} differences", flush=True)


def kill_at_moments(run: Run, cases: dict[str, Case], folder: Path, count: int, seed: int) -> list[str]:
    place = folder / "moments"
    place.mkdir()
    known = [measure(run, case, place) for case in cases.values()]
    lengths = ", ".join(f"{each.case.name} {each.seconds:.2f} s" for each in known)
    print(f"uninterrupted: {lengths}", flush=True)
    done = at_random_moments(run, known, count, seed, place, bar("random moments"))
    print(f"{done.moments} random moments ({done.late} of them after the end of the run): {done.kills} kills, "
          f"{done.resumed} runs started again, {done.anew} runs that had no checkpoint when they were killed, "
          f"{len(done.faults)} differences")
    return done.faults


def bar(name: str):
    return lambda moments: tqdm(moments, desc=name, unit="kill", dynamic_ncols=True, mininterval=2)


if __name__ == "__main__":
    sys.exit(main())
