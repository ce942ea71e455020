"""Mutated configs, arguments, CSVs and model folders: every run ends well, or in one line for each problem.

    python -m tests.faults.mutations --examples 10000 --seed 1

Each example is a valid run of one of the three scripts with 1 to 3 mutations (`mutations_strategy.py`), done in a
process of its own. It may end with code 0, or with 2 or 1 and a line `script: error: ...` for each problem; never with
a traceback, a hang, a file changed outside of its output and cache folders, or an earlier run's results lost
(`mutations_judge.py`). Hypothesis makes each failure as small as it can. Prints a table; exit code 1 where one failed.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky
from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401 (what every run imports: here, once for all)
from tensorboard.summary.writer import record_writer  # noqa: F401

from tests.faults.mutations_apply import prepare
from tests.faults.mutations_cases import CASES, write_project
from tests.faults.mutations_child import Outcome, run_in_child
from tests.faults.mutations_judge import Verdict, judge, kind_of, snapshot
from tests.faults.mutations_strategy import MODELS, Example, examples

MOST_FAILURES = 25


class Failed(AssertionError):
    """The fault of an example."""


class Workshop:
    """The projects of all cases, each with its earlier run, and a place to try examples in."""

    def __init__(self, root: Path):
        self.root, self.common = root, root / "common"
        self.common.mkdir()
        write_project(self.common)
        self.projects: dict[str, Path] = {}

    def project(self, case: str) -> Path:
        """The folder of a case after one run of it."""
        if case not in self.projects:
            folder, temporary = self.root / f"project-{len(self.projects)}", self.root / "temporary"
            shutil.copytree(self.common, folder)
            temporary.mkdir(exist_ok=True)
            outcome = run_in_child(CASES[case].script, prepare(Example(case, True, ()), folder), folder, temporary)
            assert outcome.code == 0, f"{case}: the run without mutations failed: {outcome.stderr}"
            self.projects[case] = folder
        return self.projects[case]

    def attempt(self, example: Example, seconds: float = 20.0) -> tuple[Verdict, Outcome]:
        """How the example ends."""
        script = CASES[example.case].script
        around = self.root / "around"
        folder, temporary = around / "place", around / "temporary"
        shutil.copytree(self.project(example.case), folder, symlinks=True)
        temporary.mkdir()
        try:
            if not example.earlier:
                for name in ("run", "cache"):
                    shutil.rmtree(folder / name, ignore_errors=True)
            arguments = prepare(example, folder)
            before = snapshot(folder)
            outcome = run_in_child(script, arguments, folder, temporary, seconds)
            return judge(script, arguments, MODELS, folder, outcome, before), outcome
        finally:
            shutil.rmtree(around)


class Tally:
    """What was tried, how it ended, and the failures."""

    def __init__(self):
        self.tried, self.total = Counter(), 0
        self.labels: Counter = Counter()
        self.by_kind: dict[str, Counter] = {}
        self.messages: dict[str, str] = {}  # kind -> an example of it
        self.failures: dict[str, tuple[Example, Verdict, Outcome]] = {}
        self.failed = 0

    def add(self, example: Example, verdict: Verdict, outcome: Outcome) -> None:
        self.total += 1
        self.labels[verdict.label] += 1
        for kind in {mutation[0] for mutation in example.mutations}:
            self.by_kind.setdefault(kind, Counter())[verdict.label] += 1
        if outcome.code in (1, 2):
            for line in outcome.stderr.splitlines():
                if ": error: " in line:
                    self.messages.setdefault(kind_of(line), line)

    def table(self) -> str:
        labels = sorted(self.labels)
        rows = [("mutation", *labels), *((kind, *(str(counts[label]) for label in labels))
                                         for kind, counts in sorted(self.by_kind.items()))]
        rows.append(("examples", *(str(self.labels[label]) for label in labels)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(labels) + 1)]
        return "\n".join("  ".join(map(str.ljust, row, widths)) for row in rows)


def search(workshop: Workshop, count: int, seed_number: int, say=print) -> Tally:
    """Tries `count` examples. Each new kind of failure is made small, and the search goes on behind it."""
    tally, known, round_number = Tally(), set(), 0
    started = time.monotonic()

    def attempt(example: Example) -> None:
        shrinking = bool(fresh)
        verdict, outcome = workshop.attempt(example)
        kind = kind_of(verdict.fault) if verdict.fault else None
        if not shrinking:
            tally.add(example, verdict, outcome)
            tally.failed += kind is not None
            if tally.total % 500 == 0:
                seconds = time.monotonic() - started
                say(f"{tally.total} examples, {seconds:.0f} s, {len(tally.failures)} kinds of failure")
        if kind is None or kind in known or (shrinking and kind != fresh[0]):
            return
        fresh[:] = [kind]
        tally.failures[kind] = example, verdict, outcome
        raise Failed(verdict.fault)

    while tally.total < count and len(tally.failures) < MOST_FAILURES:
        fresh: list[str] = []
        options = settings(
            max_examples=count - tally.total, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
        )
        trial = seed(seed_number + round_number)(options(given(examples())(attempt)))
        try:
            trial()
        except (Failed, Flaky):  # Flaky: it did not fail again
            known.update(fresh)
            say(f"failure: {fresh[0]}")
        round_number += 1
    return tally


def describe(tally: Tally) -> str:
    count = f"{tally.failed} failed, {len(tally.failures)} kinds of failure"
    lines = [tally.table(), "", f"{tally.total} examples, {len(tally.messages)} kinds of message, {count}"]
    for kind, (example, verdict, outcome) in tally.failures.items():
        lines += ["", f"FAILED: {verdict.fault}", f"  {kind!r}", f"  smallest example: {example!r}"[:3000],
                  *(f"  | {line[:300]}" for line in outcome.stderr.splitlines()[-12:])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.mutations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--messages", action="store_true", help="print one message of each kind")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of folders are made and deleted
    with tempfile.TemporaryDirectory(dir=in_memory) as root:
        tally = search(Workshop(Path(root)), options.examples, options.seed, lambda text: print(text, flush=True))
    print(describe(tally))
    if options.messages:
        print("\n".join(["", *sorted(ascii(line)[1:-1] for line in tally.messages.values())]))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
