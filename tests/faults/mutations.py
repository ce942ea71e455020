"""Mutated configs, arguments, tables and model folders: every run ends well, or in one line for each problem.

    python -m tests.faults.mutations --examples 1000 --seed 1

Each example is a valid run of one of the three scripts with 1 to 3 mutations (mutation_strategy.py). It ends with exit
code 0, or with 2 or 1 and lines `script: error: ...`; never with a traceback, a hang, a changed input, a file outside
of its folder, or an earlier run's results lost. Prints a table and the smallest failing example; exit code 1 if one
failed.
"""

import argparse
import csv
import io
import json
import os
import shutil
import sys
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.mutation_strategy import STARTS, Example, examples, write_project
from tests.faults.results import ending_problems
from tests.faults.runs import Outcome, Run, fork_server, scratch

CONFIG = "experiment.json"
INPUTS = ("data/", "model/", "student/", "teacher/", "legacy.pt", CONFIG)
SECONDS = 20.0

# -- mutations -----------------------------------------------------------------------------------------------------


def parent(config: dict, path: tuple[str, ...]) -> dict:
    """The section of a key, made if it is not there; of a value in the way, one that nobody sees."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
        if not isinstance(config, dict):
            return {}
    return config


def change_config(config: dict, kind: str, path: tuple[str, ...], *what) -> None:
    if kind == "value":
        parent(config, path)[path[-1]] = deepcopy(what[0])
    elif kind == "swap":
        one, two = parent(config, path), parent(config, what[0])
        one[path[-1]], two[what[0][-1]] = two.get(what[0][-1]), one.get(path[-1])
    else:
        section = parent(config, path)
        value = section.pop(path[-1], None)
        if kind == "rename":
            section[what[0]] = value


def change_bytes(content: bytes, operation: str, first: int, second: int, inserted: bytes) -> bytes:
    start, end = sorted(place * len(content) // 10**6 for place in (first, second))
    flipped = bytes([content[start] ^ 1 << second % 8]) if start < len(content) else b""
    return content[:start] + {"drop": content[min(end, start + 20) :], "flip": flipped + content[start + 1 :],
                              "insert": inserted + content[start:], "cut": b""}[operation]


def change_table(content: bytes, kind: str, *what) -> bytes:
    if kind == "content":
        return what[0]
    text = content.decode("utf-8", "replace")
    if kind == "encoding":
        return text.encode(what[0], "replace")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if kind == "cell":
        number, column, cell = what
        if number < len(rows) and column < len(rows[number]):
            rows[number][column] = cell
    elif kind == "rows":
        number = min(what[1], len(rows) - 1)
        row = rows[number] if rows else []
        new = {"drop": [], "double": [row, row], "short": [row[:1]], "long": [[*row, "more"]], "header only": []}
        rows[number : number + 1] = new[what[0]]
        rows = rows[:1] if what[0] == "header only" else rows
    else:
        for row in rows:
            at = min(what[1], len(row) - 1)
            if row:
                row[at : at + 1] = {"drop": [], "double": [row[at]] * 2, "rename": [f"{row[at]}_"]}[what[0]]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def change_file(path: Path, kind: str, *what) -> None:
    if kind == "file":
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)  # an earlier mutation may have made it a folder
        if what[0] != "delete":
            path.mkdir() if what[0] == "folder" else path.write_bytes(b"")
    elif path.is_file() and kind == "model key":
        key, value = what[0]
        with suppress(ValueError):  # an earlier mutation may have damaged it
            path.write_text(json.dumps(json.loads(path.read_bytes() or b"{}") | {key: value}))
    elif path.is_file():
        change = change_bytes if kind == "bytes" else lambda content, *rest: change_table(content, kind, *rest)
        path.write_bytes(change(path.read_bytes(), *what))


def prepare(example: Example, folder: Path) -> list[str]:
    """Applies the mutations to a copy of the project; the arguments of the run."""
    start = STARTS[example.start]
    config, arguments = deepcopy(start.config), list(start.arguments)
    of_config = [mutation for mutation in example.mutations if mutation[0] in ("value", "delete", "rename", "swap")]
    if config is not None:
        for mutation in of_config:
            change_config(config, *mutation)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        arguments = ["--config", CONFIG, *arguments]
    for kind, *what in example.mutations:
        if kind == "arguments":
            arguments += what[0]
        elif kind == "override" and start.script == "validate_model.py":
            arguments.append(f"--{what[0][0]}={what[1]}")
        elif kind == "override":
            arguments += ["--set", f"{'.'.join(what[0])}={json.dumps(what[1])}"]
        elif (kind, *what) not in of_config:
            change_file(folder / what[0], kind, *what[1:])
    return [argument.replace("\0", "?") for argument in arguments]


# -- judgement -----------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    """{path: content} of all files below `folder`, without locks."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink() and "lock" not in path.name}


def lost(before: dict[str, bytes], after: dict[str, bytes], outcome: Outcome, script: str) -> list[str]:
    """What became of inputs and of the earlier run in `run`."""
    changed = [name for name in before if after.get(name) != before[name]]
    found = [f"an input changed: {name}" for name in changed if name.startswith(INPUTS)]
    earlier = [name for name in changed if name.startswith("run/") and "tensorboard" not in name]
    if script == "validate_model.py":
        return found + [f"{name} changed, exit code {outcome.code}" for name in earlier if outcome.code != 0]
    if outcome.code == 2:
        return found + [f"{name} changed, exit code 2" for name in earlier]
    old = before.get("run/metrics.jsonl", b"")
    logs = [content for name, content in after.items() if name.endswith("metrics.jsonl")]
    if old and not any(log.startswith(old) for log in logs):
        found.append("lines of the earlier run's log are gone")
    if old and not after["run/metrics.jsonl"].startswith(old):  # it was set aside, whole
        contents = set(after.values())
        found += [f"{name} of the earlier run is gone" for name in earlier if before[name] not in contents]
    return found


class Workshop:
    """The projects, each with its earlier run, and a place to try examples in."""

    def __init__(self, run: Run, folder: Path):
        self.run, self.folder = run, folder
        self.projects: dict[str, Path] = {}
        self.counts: dict[str, Counter] = {}

    def project(self, name: str) -> Path:
        if name not in self.projects:
            project = self.folder / f"project-{len(self.projects)}"
            project.mkdir()
            write_project(project)
            outcome = self.run(STARTS[name].script, prepare(Example(name, True, ()), project), project)
            if outcome.code != 0:
                raise RuntimeError(f"{name}: the run without mutations failed: {outcome.errors}")
            self.projects[name] = project
        return self.projects[name]

    def attempt(self, example: Example) -> list[str]:
        """What is wrong with how an example ends."""
        script, around = STARTS[example.start].script, self.folder / "around"
        place = around / "place"
        shutil.rmtree(around, ignore_errors=True)
        shutil.copytree(self.project(example.start), place, symlinks=True)
        if not example.earlier:
            for name in ("run", "cache"):
                shutil.rmtree(place / name, ignore_errors=True)
        arguments = prepare(example, place)
        before = snapshot(place)
        outcome = self.run(script, arguments, place, limit=SECONDS)
        for kind in {mutation[0] for mutation in example.mutations} | {"examples"}:
            self.counts.setdefault(kind, Counter())[outcome.code] += 1
        if outcome.hung and outcome.code in (0, 143):  # long, but stopped in order by SIGTERM
            return []
        found = ending_problems(script, outcome) + lost(before, snapshot(place), outcome, script)
        return found + [f"written outside: {name}" for name in os.listdir(around)  # noqa: PTH208
                        if name not in ("place", "other")]

    def table(self) -> str:
        codes = sorted({code for counts in self.counts.values() for code in counts})
        rows = [["mutation", *(f"code {code}" for code in codes)]]
        rows += [[kind, *(str(counts[code]) for code in codes)] for kind, counts in sorted(self.counts.items())]
        return "\n".join("  ".join(cell.ljust(10) for cell in row) for row in rows)


def search(run: Run, folder: Path, count: int, seed_number: int) -> tuple[Workshop, str]:
    """(workshop, "" or the smallest example that fails and what is wrong with it)."""
    workshop = Workshop(run, folder)
    failure = ""

    @seed(seed_number)
    @settings(max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
              suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False)
    @given(examples())
    def trial(example: Example) -> None:
        nonlocal failure
        if found := workshop.attempt(example):
            failure = f"{example!r}\n  " + "\n  ".join(found)
            raise AssertionError(failure)

    try:
        trial()
    except AssertionError:
        return workshop, failure
    return workshop, ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.mutations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    options = parser.parse_args(arguments)
    with scratch() as folder, fork_server() as run:
        workshop, failure = search(run, folder, options.examples, options.seed)
    print(workshop.table())
    print(f"FAILED: {failure}" if failure else "none failed")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
