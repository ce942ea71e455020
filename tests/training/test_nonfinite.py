"""NaN and infinities: a run stops, or skips the step, before they reach weights, optimizer or checkpoints."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.objective import LossTerms
from tests.nonfinite_runs import ROWS, fine_tuning, overflow_at_mark, write_marked
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import (
    assert_equal_weights,
    changed,
    largest_difference,
    launch,
    metrics,
    run,
    weights,
)
from utils.runs.checkpoint import load_state
from utils.training.distributed import DistributedContext
from utils.training.state import TrainState
from utils.training.step import optimizer_step

pytestmark = pytest.mark.usefixtures("one_thread")


# -- one step ----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Loss w x; with an infinite slope at x = 0, a NaN gradient beside a finite loss."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x: float) -> LossTerms:
        loss = (self.w * x).sum() + (0.0 if x else (self.w - self.w.detach()).abs().sqrt().sum())
        return LossTerms(loss, 1, {"part": loss.detach()})


@pytest.mark.parametrize(("inputs", "bad"), [
    ([1.0, math.nan, 2.0], [1]), ([math.inf, 1.0], [0]), ([1.0, 0.0], []),
])
def test_a_step_that_is_not_finite_changes_nothing(inputs, bad):
    """Fault: NaN in a loss or in a gradient alone reaches the weights or the moments (case A11)."""
    objective = Line()
    optimizer = torch.optim.AdamW(objective.parameters())
    step = {"label_tokens": 2, "clip_norm": 1.0, "learning_rate": 0.1}
    context = DistributedContext(torch.device("cpu"))
    assert not optimizer_step(objective, [(1.0,), (3.0,)], optimizer, context, **step).skipped
    before, moments = objective.w.detach().clone(), {
        name: value.clone() for name, value in optimizer.state[objective.w].items()}
    metrics = optimizer_step(objective, [(x,) for x in inputs], optimizer, context, **step)
    assert metrics.skipped and metrics.bad_micro_batches == bad
    assert torch.equal(objective.w, before) and not before.equal(torch.ones(2))
    assert all(torch.equal(optimizer.state[objective.w][name], value) for name, value in moments.items())


def test_a_perplexity_that_overflows():
    """Fault: a perplexity of infinity becomes the best score, which no checkpoint can hold."""
    state = TrainState(step=3)
    assert not state.update_best(math.inf, "min", 0.0)
    assert state.best_score is None and state.num_bad_evals == 1
    assert state.update_best(7.0, "min", 0.0) and not state.update_best(math.nan, "min", 0.0)
    assert (state.best_score, state.num_bad_evals) == (7.0, 1)


# -- runs that stop ----------------------------------------------------------------------------------------------


def distilling(folder: Path, **distillation) -> dict:
    config = make_kd_project(folder, rows=ROWS, **distillation)
    return changed(config, trainer_kwargs={"n_batch_ckpt_save": 1, "keep_checkpoints": 99})


def last_error(capsys) -> str:
    """The one line of the error."""
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in printed
    return errors[0].partition(": error: ")[2]


def strict(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; NaN and infinities are no JSON."""
    text = (folder / "run/metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def skipped(folder: Path) -> list[dict]:
    return [line for line in strict(folder) if line["split"] == "skipped_step"]


def assert_stopped(folder: Path, script, config: dict, capsys) -> str:
    """The run stops, and the checkpoint of the step before is the newest; returns the error."""
    assert script(folder, config) == 1
    error = last_error(capsys)
    step = int(re.match(r"optimizer step (\d+): ", error)[1])
    assert "stopped before the weights were changed; rows: row-" in error
    newest = folder / "run/model_checkpoints/last"
    assert newest.resolve().name == f"step-{step - 1}" if step > 1 else not newest.exists()
    if step > 1:
        assert all(value.isfinite().all() for value in weights(newest).values())
    strict(folder)
    return error


@pytest.mark.parametrize("every", [1, None])
def test_a_row_that_gives_nan(tmp_path, capsys, every):
    """Fault: one row's NaN reaches the weights, or rows of other micro-batches are blamed, or a checkpoint that does
    not exist is called good."""
    config = fine_tuning(tmp_path, [5], n_batch_ckpt_save=every)
    if every:
        error = assert_stopped(tmp_path, run, config, capsys)
    else:
        assert run(tmp_path, config) == 1
        error = last_error(capsys)
    saved = "the last checkpoint is good" if every else "no checkpoint was written yet"
    assert f"rows: row-5 (row 6); {saved}: " in error
    assert "set trainer_kwargs.skip_nonfinite_steps to skip such steps" in error


def test_a_learning_rate(tmp_path, capsys):
    """Fault: a learning rate that float32 cannot hold makes every weight NaN in one step."""
    config = changed(fine_tuning(tmp_path, skip_nonfinite_steps=5), optimizer_kwargs={"lm_lr": 1e308})
    assert run(tmp_path, config) == 2
    error = last_error(capsys)
    assert "with lm_lr 1e+308 " in error and "a step gives weights that are not finite; change " in error


def test_a_validation_loss(tmp_path, capsys):
    """Fault: a validation loss of NaN counts as no worse, is saved over good checkpoints, or hides its rows."""
    config = fine_tuning(tmp_path, max_steps=4)
    assert run(tmp_path, config) == 0
    ids = write_marked(tmp_path / "validation.csv", 6, [2], seed=1)
    capsys.readouterr()
    more = changed(config, trainer_kwargs={"max_steps": 6}, dataset_kwargs={"val_batch_size": 1})
    assert run(tmp_path, more) == 1
    error = last_error(capsys)
    assert error.startswith(f"the validation loss after optimizer step 6 is nan; rows: {ids[0]} (row 3); ")
    assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-5"
    assert not [line for line in strict(tmp_path) if line["split"] == "validation" and line["step"] == 6]


def test_a_score_of_loss_scaling(tmp_path, capsys):
    """Fault: the scale of the loss becomes NaN by the perplexity of a row, and every further loss with it."""
    config = fine_tuning(tmp_path, adaptive_loss_scaling=True, loss_scaling_batch=2, adaptive_loss_metric="perplexity")
    ids = write_marked(tmp_path / "subset.csv", 3, [1], seed=9)
    assert run(tmp_path, changed(config, dataset_kwargs={"validation_subset": "subset.csv"})) == 1
    error = last_error(capsys)
    assert error.startswith("the loss scaling loss after optimizer step 1 is nan;") and ids[0] in error
    assert all(line["loss"] is not None for line in strict(tmp_path))


def test_an_optimizer_state(tmp_path, capsys):
    """Fault: a moment that is not finite in a checkpoint ruins the weights in the first step after a resume."""
    config = fine_tuning(tmp_path, max_steps=2)
    assert run(tmp_path, config) == 0
    checkpoint = tmp_path / "run/model_checkpoints/step-2/trainer_state"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg_sq"].view(-1)[0] = math.inf
    torch.save(state, checkpoint / "optimizer.pt")
    content = (checkpoint / "optimizer.pt").read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["trainer_state/optimizer.pt"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.pop("sha256", None)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    more = changed(config, trainer_kwargs={"max_steps": 4})
    assert run(tmp_path, more) == 2
    assert "the optimizer's exp_avg_sq is not finite" in last_error(capsys)
    earlier = {"resume_from": str(tmp_path / "run/model_checkpoints/step-1")}
    assert run(tmp_path, changed(more, trainer_kwargs=earlier)) == 0


def test_weights_in_a_file(tmp_path, capsys):
    """Fault: NaN in a file is reported as "this family is not supported", or found after an hour."""
    def spoil(folder: Path, name: str, index: tuple) -> None:
        values = load_file(folder / "model.safetensors")
        values[name][index] = math.nan
        save_file(values, folder / "model.safetensors", {"format": "pt"})

    config = distilling(tmp_path)
    spoil(tmp_path / "teacher", "transformer.h.1.mlp.c_fc.bias", (7,))
    assert run_kd(tmp_path, config) == 2
    error = last_error(capsys)
    assert error.startswith("trainer_kwargs.teacher_ckpt_path: ") and "not finite" in error
    assert "transformer.h.1.mlp.c_fc.bias" in error and not (tmp_path / "run/config.json").exists()


def test_a_teacher_whose_outputs_overflow(tmp_path, capsys):
    """Fault: NaN of the teacher reaches the student's weights."""
    config = changed(distilling(tmp_path), dataset_kwargs={"train_batch_size": 1})
    overflow_at_mark(tmp_path / "teacher")
    ids = write_marked(tmp_path / "train.csv", ROWS, [9])
    assert f"rows: {ids[0]} (row 10)" in assert_stopped(tmp_path, run_kd, config, capsys)


def test_a_cache_of_a_teacher_whose_outputs_overflow(tmp_path, capsys):
    """Fault: NaN is stored, and every later run with this cache stops at the same row."""
    config = distilling(tmp_path, teacher_cache={"kind": "hidden"})
    overflow_at_mark(tmp_path / "teacher")
    ids = write_marked(tmp_path / "train.csv", ROWS, [9])
    assert run_kd(tmp_path, config) == 2
    error = last_error(capsys)
    assert error.startswith("the teacher's outputs are not finite") and f"{ids[0]} (row 10)" in error


def test_rewards_of_a_policy_gradient_stop_a_run_that_may_skip_steps(tmp_path, capsys):
    """Fault: steps without rewards are skipped one after the other, or the student is blamed for the teacher's."""
    config = changed(distilling(tmp_path, method="policy_gradient", rollout="labels"),
                     trainer_kwargs={"skip_nonfinite_steps": 9})
    overflow_at_mark(tmp_path / "teacher")
    ids = write_marked(tmp_path / "train.csv", ROWS, [9])
    assert run_kd(tmp_path, config) == 1
    error = last_error(capsys)
    assert re.match(r"optimizer step \d+: rewards .* (\d+) rollout tokens are not finite, the teacher's log p of \1 of "
                    rf"them; rows: {ids[0]} ", error)
    assert skipped(tmp_path) == []


# -- runs that skip steps ----------------------------------------------------------------------------------------


def test_skipped_steps_change_nothing_and_are_counted(tmp_path, capsys):
    """Fault: a skipped step moves the weights by momentum or decay, takes rows or a place in the schedule from
    another, or leaves no trace."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, monitor_train=True)
    assert run(tmp_path, config) == 0
    printed = capsys.readouterr().err
    lines = skipped(tmp_path)
    steps = [line["step"] for line in lines]
    assert len(steps) == 2 and [line["skipped_steps"] for line in lines] == [1, 2]
    logged = {line["step"]: line for line in metrics(tmp_path / "run")}
    assert sorted([*logged, *steps]) == list(range(1, 9))
    notices = [line for line in printed.splitlines() if "skipped optimizer step" in line]
    assert len(notices) == 2 and f"skipped optimizer step {steps[0]} (1 of at most 2, trainer_kwargs." in notices[0]
    assert sorted(re.search(r"rows: (row-\d+)", line)[1] for line in notices) == ["row-11", "row-5"]
    root = tmp_path / "run/model_checkpoints"
    for step in range(2, 9):
        (_, before), (state, after) = (load_state(root / f"step-{each}") for each in (step - 1, step))
        same = [torch.equal(weights(root / f"step-{step - 1}")[name], value)
                for name, value in weights(root / f"step-{step}").items()]
        moments = [[value["exp_avg"] for value in each["optimizer"]["state"].values()] for each in (before, after)]
        same += [torch.equal(*pair) for pair in zip(*moments, strict=True)]
        assert all(same) == (step in steps), step
        assert state["skipped_steps"] == sum(each <= step for each in steps)
    # The schedule continues as if the steps had been taken.
    assert [logged[step]["learning_rate"] for step in sorted(logged)] == pytest.approx(
        [0.01 * (8 - step + 1) / 8 for step in sorted(logged)])
    (epoch,) = metrics(tmp_path / "run", "train_epoch")
    total = sum(line["loss"] * line["label_tokens"] for line in logged.values())
    assert epoch["loss"] == pytest.approx(total / sum(line["label_tokens"] for line in logged.values()))


@pytest.mark.parametrize(("script", "options"), [
    (run, {}), (run_kd, {"teacher_cache": {"kind": "hidden"}}), (run_kd, {"on_policy_fraction": 0.5}),
], ids=["fine-tuning", "cached teacher", "on-policy"])
def test_resuming_repeats_a_run_with_skipped_steps(tmp_path, script, options):
    """Fault: a resumed run forgets how many steps were skipped, or continues with other rows, dropout or rollouts."""
    if script is run:
        config = changed(fine_tuning(tmp_path, [5, 11], epochs=2), model_arch={"dropout": 0.1})
    else:
        config = distilling(tmp_path, **options)
        overflow_at_mark(tmp_path / "student")
        write_marked(tmp_path / "train.csv", ROWS, [5, 11])
    config = changed(config, trainer_kwargs={"skip_nonfinite_steps": 4})
    assert script(tmp_path, config) == 0
    whole = tmp_path / "run"
    steps = sorted(int(path.name[5:]) for path in (whole / "model_checkpoints").glob("step-*"))
    assert load_state(whole / "model_checkpoints/last")[0]["skipped_steps"] == len(metrics(whole, "skipped_step")) >= 2
    for step in steps[1:-1:3]:
        again = tmp_path / f"again-{step}"
        back = {"output_dir": str(again), "resume_from": str(whole / f"model_checkpoints/step-{step}")}
        assert script(tmp_path, changed(config, trainer_kwargs=back)) == 0
        assert_equal_weights(*(weights(each / "model_checkpoints/last") for each in (whole, again)))
        assert [line["step"] for line in metrics(again, "skipped_step")] == [
            line["step"] for line in metrics(whole, "skipped_step") if line["step"] > step]
        shutil.rmtree(again)


def test_one_step_more_than_allowed_stops(tmp_path, capsys):
    """Fault: a run that only skips steps continues; or the count is reset by a resume, and never ends."""
    config = fine_tuning(tmp_path, [5, 9, 11], skip_nonfinite_steps=2)
    error = assert_stopped(tmp_path, run, config, capsys)
    assert "2 steps were skipped before (trainer_kwargs.skip_nonfinite_steps 2)" in error
    assert "or raise trainer_kwargs.skip_nonfinite_steps" in error
    assert assert_stopped(tmp_path, run, config, capsys) == error
    assert run(tmp_path, changed(config, trainer_kwargs={"skip_nonfinite_steps": 3})) == 0
    assert [line["skipped_steps"] for line in skipped(tmp_path)] == [1, 2, 3]


@pytest.mark.slow
def test_two_processes_skip_the_same_steps(tmp_path):
    """Fault: the process without the bad row takes the step, and the weights of the two differ for ever."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, gradient_accumulation_steps=4)
    printed = {}
    for processes in (1, 2):
        own = changed(config, trainer_kwargs={"output_dir": str(tmp_path / str(processes))})
        printed[processes] = launch("train.py", tmp_path, own, processes)
    one, two = (tmp_path / name for name in "12")
    assert metrics(one, "skipped_step") == metrics(two, "skipped_step") != []
    assert largest_difference(*(weights(each / "model_checkpoints/last") for each in (one, two))) < 1e-5
    rows = [sorted(re.findall(r"row-\d+", " ".join(line for line in text.splitlines() if "skipped optim" in line)))
            for text in printed.values()]
    assert rows[0] == rows[1] == ["row-11", "row-5"]
