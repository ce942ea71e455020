"""NaN and infinities: a run stops before they reach weights, optimizer or checkpoints, and says where they are."""

import math
import re
import shutil

import pytest
import torch

from data.token_cache import TokenizedDataset
from tests.faults import numerics
from tests.faults.numerics_runs import (
    ROWS,
    assert_stopped,
    checkpoints,
    distilling,
    fine_tuning,
    last_error,
    skipped,
    strict,
)
from tests.small_kd_runs import run_kd
from tests.small_runs import assert_equal_weights, changed, make_project, make_rows, run, weights
from utils.training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


# -- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_row_that_gives_nan(tmp_path, capsys, accumulation):
    """Fault: one row's NaN reaches the weights, or the message blames the rows beside it too."""
    config = fine_tuning(tmp_path, [5], gradient_accumulation_steps=accumulation)
    with numerics.watched() as trainers:
        error = assert_stopped(tmp_path, run, config, trainers, capsys)
    left = "the last checkpoint is good" if accumulation == 1 else "no checkpoint was written yet"
    assert f"rows: row-5 (row 6); {left}: " in error
    assert "set trainer_kwargs.skip_nonfinite_steps to leave such steps out" in error


def test_a_first_step(tmp_path, capsys):
    """Fault: a run that has saved nothing says that its last checkpoint is good, or that the checkpoints are kept."""
    config = changed(fine_tuning(tmp_path, n_batch_ckpt_save=None), optimizer_kwargs={"lm_lr": 1e308})
    assert run(tmp_path, config) == 1
    error = last_error(capsys)
    assert "; no checkpoint was written yet: " in error and "good" not in error
    assert not list((tmp_path / "run").glob("model_checkpoints/step-*"))
    config = changed(config, optimizer_kwargs={"lm_lr": 0.01})
    for spoil, beginning in ((numerics.spoil_weight, "optimizer step 8: "),
                             (lambda trainer: numerics.spoil_moment(trainer, "exp_avg_sq", math.inf),
                              "after optimizer step 8 the optimizer's exp_avg_sq is not finite: not saved, ")):
        with numerics.at_step(8, spoil):
            assert run(tmp_path, config) == 1
        error = last_error(capsys)
        assert error.startswith(beginning) and "no checkpoint was written yet" in error
        assert "start anew, with a lower optimizer_kwargs.lm_lr" in error and "resume" not in error


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
    assert not state.update_best(math.inf, "min", 0.0)
    assert state.best_score is None and state.evaluations_without_gain == 1
    assert state.update_best(7.0, "min", 0.0) and not state.update_best(math.nan, "min", 0.0)
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
    numerics.spoil_cached_row(folder, TokenizedDataset(table), 6, array, value)
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


def test_rows_of_make_rows_are_finite(tmp_path):
    """Fault: the mark is in rows that are meant to be good, or does nothing, and the tests above show nothing."""
    assert not any(numerics.MARK in row["article"] for row in make_rows(ROWS))
    assert run(tmp_path, fine_tuning(tmp_path)) == 0
