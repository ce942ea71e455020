"""NaN and infinities: a run stops before they reach weights, optimizer or checkpoints, or leaves counted steps out."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.token_cache import TokenTable
from tests.conftest import write_rows
from tests.faults import numerics
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import (
    assert_equal_weights,
    changed,
    largest_difference,
    launch,
    make_project,
    make_rows,
    metrics,
    run,
    weights,
)
from utils.checkpoint import load_state
from utils.train_state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")
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


# -- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_row_that_gives_nan(tmp_path, capsys, accumulation):
    """Fault: one row's NaN reaches the weights, or the message blames the rows beside it too."""
    config = fine_tuning(tmp_path, [5], gradient_accumulation_steps=accumulation)
    with numerics.watched() as trainers:
        error = assert_stopped(tmp_path, run, config, trainers, capsys)
    assert "rows: row-5 (row 6); the last checkpoint is good" in error
    assert "set trainer_kwargs.skip_nonfinite_steps to leave such steps out" in error


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient(tmp_path, capsys, value):
    """Fault: a finite loss with a gradient that is not: the weights are ruined, and the step looks well in the log."""
    config = fine_tuning(tmp_path)
    with numerics.watched() as trainers, numerics.gradient_at({4}, value):
        error = assert_stopped(tmp_path, run, config, trainers, capsys)
    assert error.startswith("optimizer step 4: the loss is ")
    assert f"gradient norm {abs(value)}" in error and error.count("(row ") == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("most", [0, 5])
def test_a_weight(tmp_path, capsys, value, most):
    """Fault: a weight that was ruined in memory is saved, or all steps that may be left out are spent on it."""
    config = fine_tuning(tmp_path, skip_nonfinite_steps=most)
    with numerics.at_step(3, lambda trainer: numerics.spoil_weight(trainer, value)):
        assert run(tmp_path, config) == 1
    error = last_error(capsys)
    assert error.startswith("optimizer step 3: ") and "the weights themselves are not finite, such as tr" in error
    assert "rows: row-" in error and skipped(tmp_path) == []
    last = tmp_path / "run/model_checkpoints/last"
    assert last.resolve().name == "step-2" and all(each.isfinite().all() for each in weights(last).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
def test_a_learning_rate(tmp_path, capsys, value):
    """Fault: a learning rate that float32 cannot hold makes every weight NaN in one step."""
    config = fine_tuning(tmp_path, skip_nonfinite_steps=5)
    with numerics.watched() as trainers, numerics.learning_rate_at(5, value):
        error = assert_stopped(tmp_path, run, config, trainers, capsys)
    assert error.startswith(f"optimizer step 5: the learning rate is {value}; stopped") and "lm_lr" in error


def test_a_validation_loss(tmp_path, capsys):
    """Fault: a validation loss of NaN counts as no worse, is saved over good checkpoints, or hides its row."""
    config = fine_tuning(tmp_path, max_steps=4)
    assert run(tmp_path, config) == 0
    before = checkpoints(tmp_path)
    ids = numerics.write_marked(tmp_path / "validation.csv", 6, [2], seed=1)
    capsys.readouterr()
    assert run(tmp_path, changed(config, trainer_kwargs={"max_steps": 6})) == 1
    error = last_error(capsys)
    assert error.startswith("the validation loss after optimizer step 6 is nan; stopped, the checkpoints are those of ")
    assert f"rows: {ids[0]} (row 3): look at these rows" in error
    after = checkpoints(tmp_path)
    assert {name: after[name] for name in before if name != "last"} == {
        name: content for name, content in before.items() if name != "last"}
    assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-5"
    assert not [line for line in strict(tmp_path) if line["split"] == "validation" and line["step"] == 6]


def test_a_score_of_loss_scaling(tmp_path, capsys):
    """Fault: the scale of the loss becomes NaN by the perplexity of a row, and every further loss with it."""
    config = fine_tuning(tmp_path, adaptive_loss_scaling=True, loss_scaling_batch=2, adaptive_loss_metric="perplexity")
    ids = numerics.write_marked(tmp_path / "subset.csv", 3, [1], seed=9)
    assert run(tmp_path, changed(config, dataset_kwargs={"validation_subset": "subset.csv"})) == 1
    error = last_error(capsys)
    assert error.startswith("the loss scaling loss after optimizer step 2 is nan;") and ids[0] in error
    assert all(line["loss"] is not None for line in strict(tmp_path))


def test_a_perplexity_that_overflows():
    """Fault: a perplexity of infinity becomes the best score, which no checkpoint can hold."""
    state = TrainState(step=3)
    assert not state.judge(math.inf, "min", 0.0) and state.best_score is None and state.evaluations_without_gain == 1
    assert state.judge(7.0, "min", 0.0) and not state.judge(math.nan, "min", 0.0)
    assert (state.best_score, state.evaluations_without_gain) == (7.0, 1)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_optimizer_state(tmp_path, capsys, name, value):
    """Fault: a moment that is not finite in a checkpoint ruins the weights in the first step after a resume."""
    config = fine_tuning(tmp_path, max_steps=2)
    assert run(tmp_path, config) == 0
    numerics.spoil_optimizer(tmp_path / "run/model_checkpoints/step-2", name, value)
    before = checkpoints(tmp_path)
    capsys.readouterr()
    go_on = changed(config, trainer_kwargs={"max_steps": 4})
    assert run(tmp_path, go_on) == 2
    error = last_error(capsys)
    assert error.startswith(f"the optimizer's {name} in the checkpoint is not finite: resume from another checkpoint")
    assert checkpoints(tmp_path) == before
    earlier = {"resume_from": str(tmp_path / "run/model_checkpoints/step-1")}
    assert run(tmp_path, changed(go_on, trainer_kwargs=earlier)) == 0


def test_an_optimizer_state_is_never_saved(tmp_path, capsys):
    """Fault: a moment of infinity: its weight never moves again, and the checkpoint looks well."""
    config = fine_tuning(tmp_path)
    with numerics.at_step(3, lambda trainer: numerics.spoil_moment(trainer, "exp_avg_sq", math.inf)):
        assert run(tmp_path, config) == 1
    error = last_error(capsys)
    assert error.startswith("after optimizer step 3 the optimizer's exp_avg_sq is not finite: not saved")
    assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-2"


# -- weights in files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_of_a_model_folder(tmp_path, capsys, value):
    """Fault: NaN in a file is told as "this family is not supported", or found after an hour."""
    config = make_project(tmp_path, rows=4)
    numerics.spoil_file_of_model(tmp_path / "model", "transformer.wte.weight", (200, 3), value)
    assert run(tmp_path, config) == 2
    error = last_error(capsys)
    model = tmp_path / "model"
    assert error.startswith(f"{model}: its weights are not finite, 1 of 4112 values of transformer.wte.weight (rows 20")
    assert "supported" not in error and not (tmp_path / "run/config.json").exists()


def test_weights_of_a_teacher(tmp_path, capsys):
    """Fault: a teacher with NaN weights is called an unsupported family."""
    config = distilling(tmp_path)
    numerics.spoil_file_of_model(tmp_path / "teacher", "transformer.h.1.mlp.c_fc.bias", (7,), math.nan)
    assert run_kd(tmp_path, config) == 2
    error = last_error(capsys)
    assert error.startswith("trainer_kwargs.teacher_ckpt_path: ")
    assert "its weights are not finite, 1 of 128 values of transformer.h.1.mlp.c_fc.bias (rows 7)" in error


# -- a teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, {"kind": "hidden"}, {"kind": "top_k", "top_k": 5}], ids=str)
def test_a_teacher_whose_outputs_overflow(tmp_path, capsys, cache):
    """Fault: the student's rows and learning rate are blamed for the teacher's NaN; or a cache keeps it for ever."""
    config = distilling(tmp_path, teacher_cache=cache)
    numerics.overflow_at_mark(tmp_path / "teacher")
    ids = numerics.write_marked(tmp_path / "train.csv", ROWS, [9])
    with numerics.watched() as trainers:
        error = assert_stopped(tmp_path, run_kd, config, trainers, capsys)
    assert f"rows: {ids[0]} (row 10); the teacher's outputs" in error and "are not finite" in error
    if cache is None:
        return
    (folder,) = (tmp_path / "run/teacher_cache").glob("train-*")
    checks = torch.frombuffer(bytearray((folder / "checks.bin").read_bytes()), dtype=torch.int32)
    assert checks[9] == 0 and (checks != 0).sum() > 1  # known to be missing, so computed again


@pytest.mark.parametrize(("kind", "array"), [("hidden", "hidden"), ("top_k", "log_probs"), ("top_k", "log_rest")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cached_row(tmp_path, capsys, kind, array, value):
    """Fault: NaN in a cache is learnt from, or the message does not say which folder to delete."""
    config = distilling(tmp_path, teacher_cache={"kind": kind, "dir": str(tmp_path / "shared")})
    first = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "first")})
    assert run_kd(tmp_path, first) == 0
    (folder,), (table,) = ((tmp_path / name).glob("train-*") for name in ("shared", "cache"))
    numerics.spoil_cached_row(folder, TokenTable(table), 6, array, value)
    capsys.readouterr()
    with numerics.watched() as trainers:
        error = assert_stopped(tmp_path, run_kd, config, trainers, capsys)
    assert "rows: row-6 (row 7); the teacher's outputs, kept in " in error and "delete that folder" in error
    shutil.rmtree(tmp_path / "shared")
    assert run_kd(tmp_path, config) == 0
    assert_equal_weights(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("run", "first")))


def test_a_cached_head(tmp_path, capsys):
    """Fault: the head beside the cached states is not finite, and every step is blamed on its rows."""
    config = distilling(tmp_path, teacher_cache={"kind": "hidden", "dir": str(tmp_path / "shared")})
    assert run_kd(tmp_path, config) == 0
    (folder,) = (tmp_path / "shared").glob("train-*")
    numerics.spoil_cached_head(folder, math.nan)
    capsys.readouterr()
    again = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "again")})
    assert run_kd(tmp_path, again) == 2
    error = last_error(capsys)
    assert "head.safetensors: the head of the teacher is not finite: delete" in error
    assert not (tmp_path / "again/model_checkpoints").exists()


# -- left out ----------------------------------------------------------------------------------------------------


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
def test_resuming_after_every_step_repeats_a_run_with_left_out_steps(tmp_path, options):
    """Fault: a resumed run forgets how many steps were left out, or goes on with other rows, dropout or schedule."""
    config = fine_tuning(tmp_path, [5, 11], skip_nonfinite_steps=2, epochs=2, **options)
    config = changed(config, model_arch={"dropout": 0.1})
    config = changed(config, trainer_kwargs={"skip_nonfinite_steps": 4})
    assert run(tmp_path, config) == 0
    whole = tmp_path / "run"
    steps = sorted(int(path.name[5:]) for path in (whole / "model_checkpoints").glob("step-*"))
    assert load_state(whole / "model_checkpoints/last")[0]["skipped_steps"] == len(metrics(whole, "skipped_step")) >= 2
    splits = ("train", "validation", "skipped_step", "loss_scaling")
    for step in steps[:-1]:
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


def test_rewards_of_a_policy_gradient_stop_a_run_that_may_leave_steps_out(tmp_path, capsys):
    """Fault: steps without rewards are left out one after the other, or the student is blamed for the teacher's."""
    config = changed(distilling(tmp_path, method="policy_gradient", rollout="labels"),
                     trainer_kwargs={"skip_nonfinite_steps": 9})
    numerics.overflow_at_mark(tmp_path / "teacher")
    ids = numerics.write_marked(tmp_path / "train.csv", ROWS, [9])
    assert run_kd(tmp_path, config) == 1
    error = last_error(capsys)
    assert re.match(r"optimizer step \d+: rewards .* (\d+) rollout tokens are not finite, the teacher's log p of \1 of "
                    rf"them; rows: {ids[0]} ", error)
    assert skipped(tmp_path) == []


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


def test_rows_of_make_rows_are_finite(tmp_path):
    """Fault: the mark is in rows that are meant to be good, or does nothing, and the tests above show nothing."""
    assert not any(numerics.MARK in row["article"] for row in make_rows(ROWS))
    write_rows(tmp_path / "x.csv", make_rows(2))
    assert run(tmp_path, fine_tuning(tmp_path)) == 0
