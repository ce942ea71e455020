"""Long runs, watched from outside: memory, open files, threads and files on the disk stay flat.

    python -m tests.faults.soak [--steps 2000] [--every 100]

A tiny model is trained, evaluated and saved every so many steps. Compared are the first and the second half of the
later two thirds of the time. Exit code 1 if anything grew.
"""

import argparse
import json
import sys
from pathlib import Path

from tests.conftest import write_rows
from tests.faults.cases import finished
from tests.faults.results import PASSING
from tests.faults.runs import Run, fork_server, scratch
from tests.small_kd_runs import make_kd_project
from tests.small_runs import changed, make_project, make_rows, write_config

MAX_GROWTH_PER_STEP = 4096  # bytes
ROUNDING = 48 << 20  # bytes, whatever the length of the run: a forked child makes pages its own for a while
RUNS = {
    "fine-tuning": None,
    "hidden states on disk": {"teacher_cache": {"kind": "hidden"}},
    "on-policy": {"on_policy_fraction": 0.5, "rollout_batch_size": 4},
    "policy gradient": {"method": "policy_gradient", "penalty": True, "rollout_batch_size": 4},
}


def growth(samples: list, steps: int) -> list[str]:
    """What grew, a line each. samples: (memory, open files, threads), evenly over the run."""
    samples = [sample for sample in samples if sample[0] > 0]  # not of the process that has just ended
    later = samples[len(samples) // 3 :]
    memory, *others = ([max(sample[index] for sample in part) for part in halves(later)] for index in range(3))
    allowed = ROUNDING + MAX_GROWTH_PER_STEP * steps / 3
    lines = [f"memory grew from {memory[0]:,} to {memory[1]:,} bytes"] if memory[1] - memory[0] > allowed else []
    return lines + [f"{name} grew from {first} to {second}" for name, (first, second)
                    in zip(("open files", "threads"), others, strict=True) if second > first]


def halves(values: list) -> tuple[list, list]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def soak(run: Run, name: str, folder: Path, steps: int, every: int) -> list[str]:
    """Trains for so many steps; what grew."""
    folder.mkdir(parents=True)
    distillation = RUNS[name]
    config = make_project(folder) if distillation is None else make_kd_project(folder, **distillation)
    write_rows(folder / "train.csv", make_rows(2 * every))
    config = changed(config, trainer_kwargs={"epochs": steps // every, "metrics": ["rouge"], "keep_checkpoints": 2})
    write_config(folder, config)
    script = "train.py" if distillation is None else "train_kd.py"
    outcome = finished(run(script, ["--config", "config.json"], folder, limit=3600.0, watch=True))
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    done = [line["step"] for line in map(json.loads, lines) if line["split"] == "train"]
    found = growth(outcome.samples, steps) if done[-1] == steps else [f"{done[-1]} steps, not {steps}"]
    checkpoints = len(list((folder / "run/model_checkpoints").glob("step-*")))
    others = [path for path in (folder / "run").rglob("*") if not PASSING.search(str(path.relative_to(folder / "run")))]
    if checkpoints > 3 or len(others) > 50:  # two, and the best one
        found.append(f"{checkpoints} checkpoints and {len(others)} files are left")
    alive = [sample for sample in outcome.samples if sample[0] > 0]
    first, last = (", ".join(f"{value:,}" for value in sample) for sample in (alive[len(alive) // 3], alive[-1]))
    print(f"{name}: {steps} steps, memory in bytes, open files, threads: {first} after a third, {last} at the end")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="steps between two checkpoints")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    options = parser.parse_args(arguments)
    found = []
    with scratch() as folder, fork_server() as run:
        for name in options.runs:
            found += [f"{name}: {line}" for line in soak(run, name, folder / name, options.steps, options.every)]
    print("\n".join(["wrong: " + line for line in found] or ["nothing grew"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
