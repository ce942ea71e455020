"""Stop and resume: the final weights and the log are those of the uninterrupted run, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, write_rows
from tests.small_runs import assert_equal_weights, changed, make_project, metrics, run, weights, write_config

pytestmark = pytest.mark.usefixtures("one_thread")
SPLITS = ("train", "validation", "train_epoch", "loss_scaling")


def eventful(folder: Path) -> dict:
    """A run with everything that has a state: dropout, two epochs, accumulation, early stopping, loss scaling."""
    return changed(
        make_project(folder, rows=21, dropout=0.1),
        trainer_kwargs={
            "epochs": 2, "gradient_accumulation_steps": 2, "n_batch_ckpt_save": 1, "keep_checkpoints": 100,
            "metrics": ["rouge"], "monitor_train": True, "adaptive_loss_scaling": True, "loss_scaling_batch": 5,
        },
        callbacks_kwargs={"kwargs": {"patience": 5}},
    )


def only_up_to(run_folder: Path, step: int) -> None:
    """Make the folder what a run killed right after writing step-`step` leaves; later log lines stay, as they do."""
    checkpoints = run_folder / "model_checkpoints"
    for path in checkpoints.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for link in ("last", "best"):
        (checkpoints / link).unlink(missing_ok=True)
    (checkpoints / "last").symlink_to(f"step-{step}")


def test_resuming_after_every_step_repeats_the_run(tmp_path, capsys):
    """Fault: a resumed run replays epoch 0's order, other dropout, or another schedule, or reports one (case A20)."""
    config = eventful(tmp_path)
    assert run(tmp_path, config) == 0
    whole = tmp_path / "run"
    steps = sorted(int(path.name[5:]) for path in (whole / "model_checkpoints").glob("step-*"))
    assert steps == list(range(1, 13))
    expected = weights(whole / "model_checkpoints/last")
    logs = {split: metrics(whole, split) for split in SPLITS}
    assert all(logs.values())
    for step in steps[:-1]:
        again = tmp_path / f"again-{step}"
        shutil.copytree(whole, again, symlinks=True)
        only_up_to(again, step)
        assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(again)})) == 0
        assert_equal_weights(expected, weights(again / "model_checkpoints/last"))
        assert {split: metrics(again, split) for split in SPLITS} == logs, step
        assert (again / "model_checkpoints/best").resolve().name == (whole / "model_checkpoints/best").resolve().name
        shutil.rmtree(again)
    assert "learning rate: " not in capsys.readouterr().err


def test_resume_from_an_earlier_step_sets_later_ones_aside(tmp_path):
    """Fault: after going back to step 2, the old step 3 is taken for the newest."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"n_batch_ckpt_save": 1, "keep_checkpoints": 9})
    assert run(tmp_path, config) == 0
    checkpoints = tmp_path / "run/model_checkpoints"
    expected = weights(checkpoints / "last")
    back = changed(config, trainer_kwargs={"resume_from": str(checkpoints / "step-2")})
    assert run(tmp_path, back) == 0
    assert_equal_weights(expected, weights(checkpoints / "last"))
    assert (checkpoints / "earlier-run-1/step-3").is_dir()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_what_decides_the_rows_must_not_change(tmp_path, capsys):
    """Fault: a resumed run silently continues in another order of rows."""
    config = make_project(tmp_path, rows=6)
    assert run(tmp_path, config) == 0
    more = changed(config, trainer_kwargs={"epochs": 2})
    for section, values, message in (
        ("dataset_kwargs", {"train_batch_size": 3}, "train_batch_size was 2 and is 3"),
        ("trainer_kwargs", {"seed": 7}, "seed was 1234 and is 7"),
        ("dataset_kwargs", {"max_length": 200}, "max_length"),
        ("model_arch", {"lang_model": "gpt2"}, "lang_model was"),
        ("optimizer_kwargs", {"type": "SGD"}, "type was 'AdamW' and is 'SGD'"),
        ("optimizer_kwargs", {"decay_all": True}, "decay_all was False and is True"),
    ):
        assert run(tmp_path, changed(more, **{section: values})) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("train.py: error: cannot resume: ")
        assert message in error


def test_settings_of_the_optimizer_are_the_configs(tmp_path):
    """Fault: a resumed run keeps the old weight decay, while its config.json says the new one."""
    config = make_project(tmp_path, rows=6)
    assert run(tmp_path, config) == 0
    again = changed(config, trainer_kwargs={"epochs": 2}, optimizer_kwargs={"kwargs": {"weight_decay": 0.9}})
    assert run(tmp_path, again) == 0
    saved = torch.load(tmp_path / "run/model_checkpoints/last/trainer_state/optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.9, 0.0]


def judged(folder: Path) -> tuple[float, str]:
    """The best score in `last`, and the step that `best` points to."""
    root = folder / "run/model_checkpoints"
    state = json.loads((root / "last/trainer_state/state.json").read_text())
    return state["best_score"], (root / "best").resolve().name


@pytest.mark.parametrize("metric", ["loss", "rouge1"])
def test_another_validation_set_is_judged_again(tmp_path, capsys, metric):
    """Fault: a score on one CSV is compared with a score on another of the same name: `best` is that of the easier."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={
        "epochs": 2, "metrics": ["rouge"] if metric == "rouge1" else []}, callbacks_kwargs={"kwargs": {
            "metric": metric, "mode": "min" if metric == "loss" else "max"}})
    assert run(tmp_path, config) == 0
    again = changed(config, trainer_kwargs={"epochs": 3})
    write_rows(tmp_path / "validation.csv", [{"id": "q", "article": "zzzz", "highlights": "XYZW@@ 9999 KKKK"}])
    assert run(tmp_path, again) == 0
    assert capsys.readouterr().err.count("best score is reset") == 1
    score, best = judged(tmp_path)
    assert best == "step-9" and score == metrics(tmp_path / "run", "validation")[-1][metric]
    assert run(tmp_path, changed(config, trainer_kwargs={"epochs": 4})) == 0
    assert "best score is reset" not in capsys.readouterr().err
    scores = [line[metric] for line in metrics(tmp_path / "run", "validation")][2:]
    assert judged(tmp_path)[0] == (min if metric == "loss" else max)(scores)


def test_best_is_mended_after_a_kill_between_the_links(tmp_path):
    """Fault: killed after `last` and before `best` was pointed to the new step, `best` stays wrong for ever."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"epochs": 2})
    assert run(tmp_path, config) == 0
    best = tmp_path / "run/model_checkpoints/best"
    right = best.resolve().name
    best.unlink()
    assert run(tmp_path, config) == 0
    assert best.resolve().name == right


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    """Fault: output_dir = the model's own folder moves the model's config.json away."""
    config = make_project(tmp_path, rows=6)
    before = (tmp_path / "model/config.json").read_bytes()
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "model")})) == 2
    assert "was not written by a run" in capsys.readouterr().err
    assert (tmp_path / "model/config.json").read_bytes() == before


def test_a_run_that_fails_at_its_start_leaves_the_earlier_one(tmp_path, capsys):
    """Fault: a typo in a file name moves or overwrites an existing result."""
    config = make_project(tmp_path, rows=6)
    assert run(tmp_path, config) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    wrong = changed(config, trainer_kwargs={"load_from_checkpoint": False}, dataset_kwargs={"train_dataset": "no.csv"})
    capsys.readouterr()
    assert run(tmp_path, wrong) == 2
    assert "no.csv does not exist" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert not list((tmp_path / "run").glob("earlier-run-*"))


def start(config_path: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", "--config", str(config_path)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and len((output / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.005)


@pytest.mark.slow  # without a process of its own: training/test_signals.py
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_a_checkpoint_and_say_how_to_resume(tmp_path, number, code):
    """Fault: Ctrl-C loses the work since the last checkpoint, or ends in a traceback."""
    config = changed(make_project(tmp_path, rows=2000, width=32), trainer_kwargs={"monitor_val": False})
    process = start(write_config(tmp_path, config))
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code, errors
    assert "checkpoint written; run the same command to resume" in errors
    assert "Traceback" not in errors
    state = json.loads((tmp_path / "run/model_checkpoints/last/trainer_state/state.json").read_text())
    assert state["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_a_plateaus_accumulation_is_kept(tmp_path):
    """Fault: a run that had doubled its accumulation continues in smaller batches with smaller steps."""
    config = changed(
        make_project(tmp_path), dataset_kwargs={"train_batch_size": 4}, optimizer_kwargs={"lm_lr": 1e-9},
        trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 2},
        callbacks_kwargs={"kwargs": {"patience": 1, "threshold": 9}},
        lr_scheduler_kwargs={"increase_batch_size_on_plateau": True},
    )
    assert run(tmp_path, config) == 0
    smaller = changed(config, dataset_kwargs={"train_batch_size": 2},
                      trainer_kwargs={"epochs": 3, "gradient_accumulation_steps": 4})
    assert run(tmp_path, smaller) == 0
    steps = [line["epoch"] for line in metrics(tmp_path / "run")]
    assert [steps.count(epoch) for epoch in range(3)] == [5, 5, 3]  # of 8, 8 and 16 rows


def test_a_bound_in_micro_batches_forbids_other_ones(tmp_path, capsys):
    """Fault: a run whose epochs are bounded by micro-batches continues with other rows."""
    config = changed(make_project(tmp_path), dataset_kwargs={"train_batch_size": 8},
                     trainer_kwargs={"ckpt_training_batch": 4, "gradient_accumulation_steps": 2})
    assert run(tmp_path, config) == 0
    other = changed(config, trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 4},
                    dataset_kwargs={"train_batch_size": 4})
    assert run(tmp_path, other) == 2
    assert "train_batch_size was 8 and is 4" in capsys.readouterr().err
