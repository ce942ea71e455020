"""A disk that is full, read-only, forbidden or failing from some file operation on.

    python -m tests.faults.disk                              every file operation of every program, each error
    python -m tests.faults.disk --operations 20 --cases train --errors ENOSPC

The program ends with one line that names the cause or the file and exit code 1 or 2, or continues to the right results.
No result is half written, and the same command, on a good disk, resumes from the newest checkpoint and brings what an
undisturbed run brings, bit for bit. Exit code 1 if anything was wrong.
"""

import argparse
import errno
import os
import sys

from tests.faults.cases import Case, make_cases, tools
from tests.faults.crash import after_kill, file_operations, report, spread
from tests.faults.results import ending_problems, torn_files
from tests.faults.runs import Fault, NoFaultsHere, Run, fork_server, scratch

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES")


def at_operation(run: Run, case: Case, operation: tuple[int, str], error: str) -> list[str]:
    """What is wrong with a run to which the disk refuses this operation (except for EIO: all later ones too), and with
    the next one."""
    case.restart()
    code = getattr(errno, error)
    fault = Fault(str(case.place / "run"), operation[0], code, lasting=error != "EIO")
    outcome = case.run(run, fault=fault)
    found = ending_problems(case.script, outcome, (os.strerror(code), "run"))
    if outcome.code == 0:
        found += [line for line in case.problems(outcome) if ".tmp" not in line]  # could not be deleted
    found += torn_files(case.place / "run")
    found += [f"the same command again: {line}" for line in after_kill(run, case)]
    return [f"{case.name}, {error} at {operation[0]} ({operation[1]}): {line}" for line in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.disk", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, metavar="N", help="file operations per case (default: all)")
    parser.add_argument("--cases", nargs="+", help="some of the cases (default: all)")
    parser.add_argument("--errors", nargs="+", choices=ERRORS, default=ERRORS, help="default: all")
    options = parser.parse_args(arguments)
    found: list[str] = []
    with scratch() as folder, fork_server() as run:
        cases = make_cases(folder) | tools(folder)
        for case in (cases[name] for name in options.cases or cases):
            case.prepare(run)
            operations = file_operations(run, case)
            for index, error in enumerate(options.errors):
                chosen = spread(operations, options.operations, index)
                found += report(f"{case.name}, {error}: {len(chosen)} of {len(operations)} file operations", chosen,
                                lambda operation, case=case, error=error: at_operation(run, case, operation, error))
    print(f"{len(found)} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NoFaultsHere as reason:
        sys.exit(f"tests.faults.disk: {reason}")
