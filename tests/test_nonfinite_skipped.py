"""Steps that are not finite and are left out (`skip_nonfinite_steps`): counted, told, and the same after a resume."""

import re
import shutil

import pytest
import torch

from tests.faults import numerics
from tests.faults.numerics_runs import assert_stopped, checkpoints, distilling, fine_tuning, skipped
from tests.small_kd_runs import run_kd
from tests.small_runs import (
    assert_equal_weights,
    changed,
    largest_difference,
    launch,
    make_project,
    metrics,
    run,
    weights,
)
from utils.runs.checkpoint import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


def test_left_out_steps_change_nothing_and_are_counted(tmp_path, capsys):
    """Fault: a step that is left out moves the weights by momentum or decay, takes rows or a place in the schedule from
    another, or leaves no trace."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, monitor_train=True)
    assert run(tmp_path, config) == 0
    told = capsys.readouterr().err
    lines = skipped(tmp_path)
    steps = [line["step"] for line in lines]
    assert len(steps) == 2 and [line["skipped_steps"] for line in lines] == [1, 2]
    logged = {line["step"]: line for line in metrics(tmp_path / "run")}
    assert sorted([*logged, *steps]) == list(range(1, 9))
    notices = [line for line in told.splitlines() if " is left out, " in line]
    assert len(notices) == 2 and f"optimizer step {steps[0]} is left out, 1 of at most 2 (trainer_kwargs." in notices[0]
    assert sorted(re.search(r"rows: (row-\d+)", line)[1] for line in notices) == ["row-11", "row-5"]
    assert "finished at step 8 (2 of its steps left out, they were not finite)" in told
    root = tmp_path / "run/model_checkpoints"
    for step in range(2, 9):
        (_, before), (state, after) = (load_state(root / f"step-{each}") for each in (step - 1, step))
        same = [torch.equal(weights(root / f"step-{step - 1}")[name], value)
                for name, value in weights(root / f"step-{step}").items()]
        moments = [[value["exp_avg"] for value in each["optimizer"]["state"].values()] for each in (before, after)]
        same += [torch.equal(*pair) for pair in zip(*moments, strict=True)]
        assert all(same) == (step in steps), step
        assert state["skipped_steps"] == sum(each <= step for each in steps)
    # The schedule goes on as if the steps had been taken.
    assert [logged[step]["learning_rate"] for step in sorted(logged)] == pytest.approx(
        [0.01 * (8 - step + 1) / 8 for step in sorted(logged)])
    (epoch,) = metrics(tmp_path / "run", "train_epoch")
    finite = list(logged.values())
    total = sum(line["loss"] * line["label_tokens"] for line in finite)
    assert epoch["loss"] == pytest.approx(total / sum(line["label_tokens"] for line in finite))


@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2}, {"adaptive_loss_scaling": True, "loss_scaling_batch": 3, "metrics": ["rouge"]},
], ids=["accumulation", "loss scaling"])
def test_resuming_repeats_a_run_with_left_out_steps(tmp_path, options):
    """Fault: a resumed run forgets how many steps were left out, or goes on with other rows, dropout or schedule."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, epochs=2, **options)
    config = changed(config, model_arch={"dropout": 0.1})
    config = changed(config, trainer_kwargs={"skip_nonfinite_steps": 4})
    assert run(tmp_path, config) == 0
    whole = tmp_path / "run"
    steps = sorted(int(path.name[5:]) for path in (whole / "model_checkpoints").glob("step-*"))
    assert load_state(whole / "model_checkpoints/last")[0]["skipped_steps"] == len(metrics(whole, "skipped_step")) >= 2
    splits = ("train", "validation", "skipped_step", "loss_scaling")
    for step in steps[:-1:2]:
        again = tmp_path / f"again-{step}"
        back = {"output_dir": str(again), "resume_from": str(whole / f"model_checkpoints/step-{step}")}
        assert run(tmp_path, changed(config, trainer_kwargs=back)) == 0
        assert_equal_weights(*(weights(each / "model_checkpoints/last") for each in (whole, again)))
        found = {split: metrics(again, split) for split in splits}
        for split, lines in found.items():
            assert lines == metrics(whole, split)[len(metrics(whole, split)) - len(lines) :]
        done = [line["step"] for split in ("train", "skipped_step") for line in found[split]]
        assert sorted(done) == list(range(step + 1, steps[-1] + 1))
        shutil.rmtree(again)


def test_one_step_more_than_allowed_stops(tmp_path, capsys):
    """Fault: a run that is only left out steps goes on; or the count starts anew with a resume, and never ends."""
    config = fine_tuning(tmp_path, [5, 9, 11], skip_nonfinite_steps=2)
    with numerics.watched() as trainers:
        error = assert_stopped(tmp_path, run, config, trainers, capsys)
    assert "2 steps were left out before (trainer_kwargs.skip_nonfinite_steps is 2)" in error
    assert "or raise trainer_kwargs.skip_nonfinite_steps" in error
    with numerics.watched() as trainers:
        assert assert_stopped(tmp_path, run, config, trainers, capsys, checkpoints(tmp_path)) == error
    assert run(tmp_path, changed(config, trainer_kwargs={"skip_nonfinite_steps": 3})) == 0
    assert [line["skipped_steps"] for line in skipped(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("options", [
    {}, {"teacher_cache": {"kind": "hidden"}}, {"on_policy_fraction": 0.5},
    {"method": "policy_gradient", "rollout": "student", "rollout_epochs": 2},
], ids=str)
def test_distillation_leaves_steps_out(tmp_path, options):
    """Fault: a step that is left out lets objective and run count differently, so that a resume draws other numbers."""
    config = changed(distilling(tmp_path, **options), trainer_kwargs={"skip_nonfinite_steps": 2})
    with numerics.gradient_at({3, 6}):
        assert run_kd(tmp_path, config) == 0
    assert [line["step"] for line in skipped(tmp_path)] == [3, 6]
    expected = weights(tmp_path / "run/model_checkpoints/last")
    assert all(value.isfinite().all() for value in expected.values())
    for step in (2, 3, 5):
        again = tmp_path / f"again-{step}"
        back = {"output_dir": str(again), "resume_from": str(tmp_path / f"run/model_checkpoints/step-{step}")}
        with numerics.gradient_at({3 - step, 6 - step}):
            assert run_kd(tmp_path, changed(config, trainer_kwargs=back)) == 0
        assert_equal_weights(expected, weights(again / "model_checkpoints/last"))


def test_a_run_without_faults_is_the_same_with_the_key(tmp_path):
    """Fault: the key changes a run that needs it not."""
    found = []
    for most in (0, 3):
        output = tmp_path / str(most)
        config = changed(make_project(tmp_path, rows=8), trainer_kwargs={"output_dir": str(output),
                                                                         "skip_nonfinite_steps": most})
        assert run(tmp_path, config) == 0
        found.append(weights(output / "model_checkpoints/last"))
    assert_equal_weights(*found)


@pytest.mark.slow
def test_two_processes_leave_the_same_steps_out(tmp_path):
    """Fault: the process without the bad row takes the step, and the weights of the two part for ever."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, gradient_accumulation_steps=4)
    told = {}
    for processes in (1, 2):
        own = changed(config, trainer_kwargs={"output_dir": str(tmp_path / str(processes))})
        told[processes] = launch("train.py", tmp_path, own, processes)
    one, two = (tmp_path / name for name in "12")
    assert metrics(one, "skipped_step") == metrics(two, "skipped_step") != []
    assert largest_difference(*(weights(each / "model_checkpoints/last") for each in (one, two))) < 1e-5
    notices = [[line for line in text.splitlines() if " is left out, " in line] for text in told.values()]
    assert len(notices[0]) == len(notices[1]) == len(metrics(one, "skipped_step"))
    rows = [sorted(re.findall(r"row-\d+", " ".join(lines))) for lines in notices]
    assert rows[0] == rows[1] == ["row-11", "row-5"]
