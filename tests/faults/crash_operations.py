"""SIGKILL at every operation on files of one write: a checkpoint, predictions, a cache."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import operations
from tests.faults.crash_cases import Case, finished
from tests.faults.crash_results import differences, read_results
from tests.faults.runs import Run
from utils.files import finish_writing
from utils.runs.checkpoint import CheckpointError, verify

SIGKILLED = -9
CHILD = "tests.faults.crash_child:"
WHOLE_RUN = "tests.faults.crash_child:script"


@dataclass(frozen=True)
class Write:
    """One write of a case. target: the function that does it (see `crash_child.replace`), at its `call`-th call.

    within, but_not: the folders of the operations, below the output folder. must_touch: beginnings of paths that the
    operations must be on, or the write is not the one that is meant. intact: problems that a reader finds right after
    a kill, from the output folder and the results of before and after the write.
    """

    case: str
    target: str
    call: int = 1
    within: str = ""
    but_not: str | None = None
    must_touch: tuple[str, ...] = ()
    intact: Callable[[Path, dict, dict], Iterable[str]] = lambda folder, before, after: ()


@dataclass
class Tally:
    """What was done, and what was found wrong (lines)."""

    operations: int = 0
    kills: int = 0
    resumed: int = 0
    faults: list[str] = field(default_factory=list)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.operations + other.operations, self.kills + other.kills, self.resumed + other.resumed,
                     [*self.faults, *other.faults])


def whole_checkpoints(folder: Path, before: dict, after: dict) -> Iterator[str]:
    """`last` and `best` are whole at every moment."""
    for link in ("last", "best"):
        place = folder / "model_checkpoints" / link
        if f"model_checkpoints/{link}" in before:
            try:
                verify(place)
            except CheckpointError as error:
                yield str(error)


def whole_predictions(folder: Path, before: dict, after: dict) -> Iterator[str]:
    """A reader finds the predictions and scores of before, or those of after, and no temporary file."""
    finish_writing(folder)
    found = {name: value for name, value in read_results(folder).items() if name != "run.lock"}
    if found not in (before, after):
        yield f"neither the earlier result nor the new one: {differences(before, found)}, {differences(after, found)}"


CHECKPOINTS = {"within": "model_checkpoints", "intact": whole_checkpoints}
WRITES = {
    "checkpoint on the way": Write("train", "utils.runs.checkpoint:Checkpoints.save", call=3, **CHECKPOINTS),
    "last checkpoint": Write(
        "train", "utils.runs.checkpoint:Checkpoints.save", call=-1, **CHECKPOINTS,
        must_touch=(".tmp-new-step-", ".tmp-new-last-", ".tmp-new-best-", ".tmp-gone-step-"),
    ),
    "predictions": Write("validate", "utils.runs.result_folder:write_together", intact=whole_predictions),
    "predictions in training": Write(
        "train", "utils.evaluation.validation:Validation.run", call=2, but_not="tensorboard",
        must_touch=("metrics.jsonl", ".tmp-", "predictions/.tmp-"),
    ),
    "token cache": Write("train", "data.token_cache:build_table", must_touch=("token_cache/.building-",)),
    # Made for each table, and filled row by row as the run needs them.
    "teacher's hidden states": Write(
        "divergence", WHOLE_RUN, within="teacher_cache", must_touch=(".building-", "train-", "validation-"),
    ),
    "teacher's top k": Write(
        "top-k", WHOLE_RUN, within="teacher_cache", must_touch=(".building-", "train-", "validation-"),
    ),
    "earlier run set aside": Write(
        "anew", "utils.runs.run_folder:archive_previous_run",
        must_touch=("model_checkpoints", "metrics.jsonl", ".tmp-earlier-run"),
    ),
}


def restore(saved: Path, output_dir: Path) -> None:
    shutil.rmtree(output_dir, ignore_errors=True)
    if saved.is_dir():
        shutil.copytree(saved, output_dir, symlinks=True)


def at_every_operation(
    run: Run, library: Path, case: Case, write: Write, folder: Path, progress: Callable = lambda moments: moments,
) -> Tally:
    """Kills the write at every moment of its operations, and each time runs the same again to the end."""
    output_dir, saved, log = folder / "run", folder / "saved", folder / "log"
    command = {"name": case.script, "arguments": case.command(output_dir)}
    place = {"folder": output_dir / write.within, "excluded": write.but_not and output_dir / write.but_not}

    def faulty(call: int, **fault):
        return run(f"{CHILD}script_with_fault", **command, library=library, target=write.target, call=call, **place,
                   **fault)

    case.prepare(run, output_dir)
    restore(output_dir, saved)
    finished(run(f"{CHILD}script", **command))
    after = read_results(output_dir)
    restore(saved, output_dir)
    call = write.call if write.call > 0 else count_calls(run, command, write.target, log) + 1 + write.call
    restore(saved, output_dir)
    # The state just before the write, from which each kill starts.
    outcome = faulty(call, action="kill_before", number=1)
    if outcome.code != SIGKILLED:
        raise RuntimeError(f"the write was not reached: exit code {outcome.code}:\n{outcome.output[-3000:]}")
    shutil.rmtree(saved, ignore_errors=True)
    restore(output_dir, saved)
    before = {name: value for name, value in read_results(saved).items() if name != "run.lock"}
    finished(faulty(1, action="count", log=log))
    tally = Tally(faults=differences(after, read_results(output_dir)))
    done = operations.read_log(log, place["folder"])
    missed = [path for path in write.must_touch if not any(name.startswith(path) for _, name in done)]
    if missed:
        raise RuntimeError(f"the write touches {[name for _, name in done]} and not {missed}")
    tally.operations = len(done)
    for number, action in progress(operations.moments(done)):
        restore(saved, output_dir)
        where = f"{action} operation {number} of {len(done)} ({' '.join(done[number - 1])})"
        outcome = faulty(1, action=action, number=number)
        if outcome.code != SIGKILLED:
            tally.faults.append(f"{where}: exit code {outcome.code} instead of a kill: {outcome.output[-1000:]}")
            continue
        tally.kills += 1
        tally.faults += [f"{where}: {line}" for line in write.intact(output_dir, before, after)]
        tally.faults += [f"{where}: {line}" for line in resumed(run, command, output_dir, after)]
        tally.resumed += 1
    return tally


def count_calls(run: Run, command: dict, target: str, log: Path) -> int:
    finished(run(f"{CHILD}script_counting_calls", **command, target=target, log=log))
    calls = int(log.read_text())
    log.unlink()
    return calls


def resumed(run: Run, command: dict, output_dir: Path, after: dict) -> list[str]:
    """Runs the same to its end; where what it leaves is not what an uninterrupted run left."""
    outcome = run(f"{CHILD}script", **command)
    if outcome.code != 0:
        return [f"exit code {outcome.code} of the same command again: {outcome.output[-1000:]}"]
    return differences(after, read_results(output_dir))
