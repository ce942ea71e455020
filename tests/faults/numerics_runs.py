"""Runs for the tests of NaN and infinities, and what must be true when one has stopped."""

import json
import re
from pathlib import Path

import pytest

from tests.faults import numerics
from tests.small_kd_runs import make_kd_project
from tests.small_runs import assert_equal_weights, changed, make_project, weights
from utils.runs.checkpoint import load_state

ROWS = 16  # 8 steps of 2 rows


def checkpoints(folder: Path) -> dict[str, bytes]:
    """All files of all checkpoints, and where `last` and `best` point."""
    root = folder / "run/model_checkpoints"
    links = {path.name: str(path.readlink()).encode() for path in root.iterdir() if path.is_symlink()}
    files = [path for path in root.glob("step-*/**/*") if path.is_file()]
    return links | {str(path.relative_to(root)): path.read_bytes() for path in files}


def fine_tuning(folder: Path, marked: list[int] = (), **trainer_kwargs) -> dict:
    """A run with a checkpoint after each step, of a model that cannot compute rows with a mark."""
    config = make_project(folder, rows=ROWS)
    numerics.overflow_at_mark(folder / "model")
    numerics.write_marked(folder / "train.csv", ROWS, list(marked))
    return changed(config, trainer_kwargs={"n_batch_ckpt_save": 1, "keep_checkpoints": 99, **trainer_kwargs})


def distilling(folder: Path, **distillation) -> dict:
    config = make_kd_project(folder, rows=ROWS, **distillation)
    return changed(config, trainer_kwargs={"n_batch_ckpt_save": 1, "keep_checkpoints": 99})


def last_error(capsys) -> str:
    """The one line of the error."""
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in told
    return errors[0].partition(": error: ")[2]


def assert_stopped(folder: Path, script, config: dict, trainers: list, capsys, before: dict | None = None) -> str:
    """The run stops with weights, optimizer and checkpoints of the step before, bit for bit; returns the error."""
    assert script(folder, config) == 1
    error = last_error(capsys)
    step = int(re.match(r"optimizer step (\d+): ", error)[1])
    assert "stopped before the weights were changed; rows: row-" in error
    newest = folder / "run/model_checkpoints/last"
    if step > 1:
        assert newest.resolve().name == f"step-{step - 1}"
        (trainer,) = trainers
        own = {name: value for name, value in trainer.language_model.model.state_dict().items()
               if name in weights(newest)}
        assert_equal_weights(own, weights(newest))
        saved = load_state(newest)[1]["optimizer"]["state"]
        now = trainer.optimizer.state_dict()["state"]
        assert saved.keys() == now.keys()
        for index, values in saved.items():
            assert_equal_weights(values, now[index])
        if before is not None:
            assert {name: content for name, content in checkpoints(folder).items() if name in before} == before
    else:
        assert not newest.exists()
    strict(folder)
    return error


def strict(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; NaN and infinities are no JSON."""
    text = (folder / "run/metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def skipped(folder: Path) -> list[dict]:
    return [line for line in strict(folder) if line["split"] == "skipped_step"]
