"""Long runs of both training scripts: memory, open files, threads and disk stay flat.

    python -m tests.faults.soak [--steps 2000] [--every 100] [--run NAME]

A tiny model is trained; after every so many steps it is evaluated (loss, ROUGE) and a checkpoint is written, and then
this process is measured. Over the second half open files, threads and files on the disk must be exactly equal, and
memory, live objects and bytes on the disk must not rise. Logs grow by one line a step: they are counted apart.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch

import train
import train_kd
from tests.conftest import write_rows
from tests.small_kd_runs import make_kd_project
from tests.small_runs import changed, make_project, make_rows, write_config
from utils.runs.checkpoint import Checkpoints

BATCH, KEPT = 2, 2
LOGS = ("metrics.jsonl", "tensorboard")
EQUAL = ("open_files", "threads", "files")
# What a rise from one checkpoint to the next may be, by least squares over the second half: rounding, never a leak.
MOST_RISE = {"memory": 128 * 1024, "objects": 2.0, "disk": 64.0}
RUNS = {
    "fine-tuning": None,
    "hidden states on disk": {"teacher_cache": {"kind": "hidden"}},
    "on-policy": {"on_policy_fraction": 0.5, "rollout_batch_size": 4},
    "policy gradient": {"method": "policy_gradient", "penalty": True, "rollout_batch_size": 4},
}


class Sample(NamedTuple):
    """At a checkpoint. memory: resident, bytes. disk, files: of the run folder, without its logs and without the best
    checkpoint where it is kept besides the newest ones; logs: their bytes."""

    step: int
    memory: int
    objects: int
    open_files: int
    threads: int
    files: int
    disk: int
    logs: int


def measure(step: int, output_dir: Path) -> Sample:
    gc.collect()
    objects = len(gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    older_best = best_besides(output_dir / "model_checkpoints")
    sizes = {path: path.lstat().st_size for path in output_dir.rglob("*")
             if older_best is None or not path.is_relative_to(older_best)}
    logs = {path for path in sizes if path.relative_to(output_dir).parts[0] in LOGS}
    return Sample(
        step, pages * os.sysconf("SC_PAGE_SIZE"), objects, count("/proc/self/fd"),
        count("/proc/self/task"), len(sizes.keys() - logs),
        sum(size for path, size in sizes.items() if path not in logs), sum(sizes[path] for path in logs),
    )


def best_besides(root: Path) -> Path | None:
    """The folder of the best checkpoint, where it is none of the newest."""
    steps = sorted(root.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    best = root / (root / "best").readlink() if (root / "best").is_symlink() else None
    return None if best in steps[-KEPT:] else best


def count(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def config_of(name: str, folder: Path, steps: int, every: int) -> dict:
    """The config of a run whose epochs are `every` steps long."""
    options, rows = RUNS[name], every * BATCH
    config = make_project(folder, rows=rows) if options is None else make_kd_project(folder, rows=rows, **options)
    write_rows(folder / "validation.csv", make_rows(4, seed=1))
    # Predictions of each evaluation are kept, so they are left out here: they grow as they are meant to.
    return changed(config, trainer_kwargs={
        "epochs": -(-steps // every), "max_steps": steps, "metrics": ["rouge"], "monitor_train": True,
        "keep_checkpoints": KEPT,
    }, optimizer_kwargs={"lm_lr": 1e-3}, dataset_kwargs={"cache_dir": str(folder / "run" / "token_cache")})


def soak(name: str, folder: Path, steps: int, every: int) -> list[Sample]:
    """The samples of one run, one for each checkpoint."""
    config = config_of(name, folder, steps, every)
    output_dir, samples, save = Path(config["trainer_kwargs"]["output_dir"]), [], Checkpoints.save

    def save_and_measure(checkpoints: Checkpoints, step: int, *arguments) -> Path:
        place = save(checkpoints, step, *arguments)
        samples.append(measure(step, output_dir))
        return place

    Checkpoints.save = save_and_measure
    try:
        main = train.main if RUNS[name] is None else train_kd.main
        code = main(["--config", str(write_config(folder, config))])
    finally:
        Checkpoints.save = save
    assert code == 0, f"{name}: exit code {code}"
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, steps + 1))
    assert [sample.step for sample in samples] == [*range(every, steps, every), steps]
    return samples


def rise(values: list[float]) -> float:
    """Slope of the line through the values (least squares), for one step along the list."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * (value - mean) for index, value in enumerate(values)) / spread


def growth(samples: list[Sample]) -> list[str]:
    """What grew in the second half, one line each."""
    half = samples[len(samples) // 2 :]
    found = []
    for field in EQUAL:
        values = [getattr(sample, field) for sample in half]
        if len(set(values)) > 1:
            found.append(f"{field} are not equal: {values}")
    for field, most in MOST_RISE.items():
        slope = rise([getattr(sample, field) for sample in half])
        if slope > most:
            found.append(f"{field} rises by {slope:,.1f} from checkpoint to checkpoint, more than {most:,.1f}")
    return found


def table(samples: list[Sample]) -> str:
    rows = [Sample._fields, *([f"{value:,}" for value in sample] for sample in samples)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(Sample._fields))]
    half = samples[len(samples) // 2 :]
    slopes = ", ".join(f"{field} {rise([getattr(sample, field) for sample in half]):,.1f}" for field in MOST_RISE)
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join([*lines, f"rise from checkpoint to checkpoint, second half: {slopes}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--every", type=int, default=100, metavar="N", help="steps between two checkpoints")
    parser.add_argument("--run", choices=RUNS, action="append", help="one of the runs; default: all")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/statm").is_file():
        print("soak: error: needs /proc (Linux)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    grown = 0
    for name in options.run or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            samples = soak(name, Path(folder), options.steps, options.every)
        print(f"{name}\n{table(samples)}")
        for line in (lines := growth(samples)):
            print(f"GREW: {name}: {line}")
        grown += len(lines)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
