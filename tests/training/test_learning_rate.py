"""Learning rates that are not what the user expects are reported: after a resume, or beyond the schedule."""

import pytest

from tests.small_runs import changed, make_project, metrics, run
from utils.config.fine_tune import FineTuneConfig
from utils.training.optimization import schedule_notices

pytestmark = pytest.mark.usefixtures("one_thread")


def told(capsys, start: str = "learning rate: ") -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(start)]


# -- after a resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "rates", "total"), [
    ({"trainer_kwargs": {"epochs": 2}}, "3.33e-03 at the checkpoint's last step, 5.00e-03 at the next", "6 steps from "
     "lm_lr 1.00e-02"),
    ({"trainer_kwargs": {"epochs": 2}, "optimizer_kwargs": {"lm_lr": 0.002}}, "3.33e-03 at the checkpoint's last step, "
     "1.00e-03 at the next", "6 steps from lm_lr 2.00e-03"),
])
def test_a_longer_run_tells_its_new_rate(tmp_path, capsys, changes, rates, total):
    """Fault: extending a finished run lets the learning rate jump, and no line says so."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"monitor_val": False})
    assert run(tmp_path, config) == 0
    assert told(capsys) == []
    longer = changed(config, **changes)
    assert run(tmp_path, longer) == 0
    (line,) = told(capsys)
    assert line.startswith(f"learning rate: {rates}: ") and total in line and "set optimizer_kwargs.lm_lr" in line
    used = [f"{each['learning_rate']:.2e}" for each in metrics(tmp_path / "run")]
    assert rates.split()[0] == used[2] and rates.split()[-4] == used[3]
    assert run(tmp_path, longer) == 0  # finished
    assert told(capsys) == []


# -- a schedule that does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "steps", "words"), [
    ({"num_warmup_steps": 500}, 200, "num_warmup_steps is 500, but the run has 200 optimizer steps: warm-up takes 200"),
    ({"num_warmup_steps": 50, "num_training_steps": 40}, 40, "num_warmup_steps is 50, but num_training_steps is 40: "
     "warm-up takes 40 "),
    ({"num_training_steps": 4000}, 200, "warm-up takes 400 steps, but the run has 200: the learning rate never reaches "
     "lm_lr (1.00e-03)"),
    ({"num_training_steps": 50}, 200, "num_training_steps is 50, but the run has 200 optimizer steps: after step 50 "
     "the learning rate stays 0.00e+00"),
])
def test_what_does_not_fit_is_told(keys, steps, words):
    """Fault: a warm-up longer than the run is cut short, or a decay ends before the run, without a word."""
    config = FineTuneConfig.model_validate({"lr_scheduler_kwargs": keys})
    (line,) = schedule_notices(config.lr_scheduler_kwargs, 1e-3, steps)
    assert words in line and line.startswith("lr_scheduler_kwargs") and "\n" not in line
