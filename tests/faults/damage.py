"""Each file of a run folder truncated, emptied, deleted, replaced by a folder or with a flipped bit, one at a time.

    python -m tests.faults.damage [--tries 5] [--seed 1]

A killed run with a damaged file resumes to the results of an undisturbed one, or ends with one line that names the
file; never with another result. A damaged checkpoint is not evaluated, and damaged predictions are not compared. Not
flipped: caches and scores.json, which have no checksum. Exit code 1 if anything was wrong.
"""

import argparse
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.cases import Case, finished, make_cases
from tests.faults.crash import file_operations, report
from tests.faults.results import differences, ending_problems, newest_step, read_results
from tests.faults.runs import Fault, Outcome, Run, fork_server, scratch

Attempt = tuple[str, Callable[[], list[str]]]


def harms(size: int, tries: int, rng: random.Random, flips: bool = True) -> Iterator[tuple[str, Callable]]:
    """(name, function that damages a path)."""
    def flip(path: Path, bit: int) -> None:
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    def replace(path: Path) -> None:
        path.unlink()
        path.mkdir()

    for _ in range(tries if flips and size else 0):
        bit = rng.randrange(8 * size)
        yield f"bit {bit} flipped", lambda path, bit=bit: flip(path, bit)
    for _ in range(tries if size else 0):
        length = rng.randrange(size)
        yield f"cut to {length} of {size} bytes", lambda path, length=length: os.truncate(path, length)
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "deleted", lambda path: path.unlink()
    yield "a folder", replace


def interrupt(run: Run, case: Case) -> Path:
    """A copy of the case's folder in the middle of a run, with two checkpoints."""
    case.prepare(run)
    operations = file_operations(run, case)
    for number, _ in operations[len(operations) // 2 :: 10]:
        case.restart()
        case.run(run, fault=Fault(str(case.place / "run"), number))
        if len(list((case.place / "run/model_checkpoints").glob("step-*"))) > 1 and newest_step(case.place / "run"):
            return copied(case.place, case.place.with_name(f"{case.name}-interrupted"))
    raise RuntimeError(f"{case.name} never has two checkpoints")


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))


def files(folder: Path) -> list[Path]:
    """Below `folder`, relative, without curves, locks and what lies in links."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path for path in found if not re.search("tensorboard|lock|tmp", str(path)))


def resumptions(run: Run, case: Case, tries: int, rng: random.Random, part: str = "") -> Iterator[Attempt]:
    """The damaged files of an interrupted run (`part`: those in folders of that name), which is then started again."""
    start = interrupt(run, case)

    def attempt(name: Path, harm: Callable) -> list[str]:
        copied(start, case.place)
        harm(case.place / "run" / name)
        outcome = case.run(run)
        found = ending_problems(case.script, outcome, (name.name, name.parent.name or name.name))
        if outcome.code == 0:  # a damaged checkpoint may stay, beside those of the undisturbed run
            results = read_results(case.place / "run")
            checkpoint = "/".join(name.parts[:2])
            found += [line for line in differences(case.expected, results) if not line.startswith(name.as_posix())
                      and not (line.startswith(checkpoint) and line.endswith("undisturbed run"))
                      and not re.match(r"[\w.-]*(damaged|broken)", line)]
        return found

    for name in (name for name in files(start / "run") if part in name.parts[0]):
        for what, harm in harms((start / "run" / name).stat().st_size, tries, rng, "cache" not in name.parts[0]):
            yield f"{case.name}: {name}: {what}", lambda name=name, harm=harm: attempt(name, harm)


def evaluations(run: Run, case: Case, tries: int, rng: random.Random) -> Iterator[Attempt]:
    """The damaged files of a checkpoint's model, which is then evaluated: always refused."""
    case.restart()
    finished(case.run(run))
    start = copied(case.place, case.place.with_name(f"{case.name}-finished"))
    model = (start / "run/model_checkpoints/last").resolve()

    def attempt(name: str, harm: Callable) -> list[str]:
        copied(start, case.place)
        harm(case.place / model.relative_to(start) / name)
        arguments = ["--model_path", "run/model_checkpoints/last", "--csv_path", "validation.csv", "--output_dir",
                     "out", "--device_id", "-1"]
        outcome = run("validate_model.py", arguments, case.place)
        refused = [] if outcome.code == 2 else [f"exit code {outcome.code}, not 2"]
        return [*refused, *ending_problems("validate_model.py", outcome, (name, model.name))]

    for path in sorted(path for path in model.iterdir() if path.is_file()):
        for what, harm in harms(path.stat().st_size, tries, rng):
            yield f"evaluated: {path.name}: {what}", lambda name=path.name, harm=harm: attempt(name, harm)


def comparisons(run: Run, case: Case, tries: int, rng: random.Random) -> Iterator[Attempt]:
    """Damaged scores and predictions, which are then compared with whole ones."""
    case.restart()
    finished(case.run(run))
    start = copied(case.place, case.place.with_name(f"{case.name}-compared"))
    copied(start / "run", start / "whole")

    def compare() -> Outcome:
        return run("utils.compare", ["whole", "run", "--format", "csv"], case.place)

    copied(start, case.place)
    expected = finished(compare()).output

    def attempt(name: Path, harm: Callable) -> list[str]:
        copied(start, case.place)
        harm(case.place / "run" / name)
        outcome = compare()
        found = ending_problems("utils.compare", outcome, (str(name), "run"))
        means = [line.split(",")[:3] for line in outcome.output.splitlines()]
        if outcome.code == 0 and means != [line.split(",")[:3] for line in expected.splitlines()]:
            found.append(f"another table: {outcome.output}")
        return found

    for name in files(start / "run"):
        if name.name == "scores.json" or "predictions" in str(name):
            for what, harm in harms((start / "run" / name).stat().st_size, tries, rng, name.name != "scores.json"):
                yield f"compared: {name}: {what}", lambda name=name, harm=harm: attempt(name, harm)


def attempts(run: Run, folder: Path, tries: int, seed: int = 1) -> list[Attempt]:
    rng, cases = random.Random(seed), make_cases(folder)
    return [*resumptions(run, cases["train"], tries, rng),
            *(resumption for name in ("hidden cache", "top-k cache")
              for resumption in resumptions(run, cases[name], tries, rng, "teacher_cache")),
            *evaluations(run, cases["train"], tries, rng), *comparisons(run, cases["validate"], tries, rng)]


def one_of_each(tried: list[Attempt]) -> list[Attempt]:
    """One attempt for each name of a file, with the ways of damage in turn."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in tried:
        groups.setdefault(re.sub(r"\d+|[0-9a-f]{8,}", "#", attempt[0].rsplit(": ", 1)[0]), []).append(attempt)
    return [group[index % len(group)] for index, group in enumerate(groups.values())]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.damage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5, help="cuts and flips of each file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of their places (default: %(default)s)")
    options = parser.parse_args(arguments)
    with scratch() as folder, fork_server() as run:
        found = report("damaged files", attempts(run, folder, options.tries, options.seed),
                       lambda attempt: [f"{attempt[0]}: {line}" for line in attempt[1]()])
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
