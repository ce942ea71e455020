"""Learning rates that are not what the user expects are reported: after a resume, or beyond the schedule."""

import shutil

import pytest

from tests.small_runs import changed, make_project, metrics, run
from utils.config.fine_tune import FineTuneConfig
from utils.training.optimization import make_schedule, schedule_notices

pytestmark = pytest.mark.usefixtures("one_thread")


def reported(capsys, start: str = "learning rate: ") -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(start)]


# -- after a resume ------------------------------------------------------------------------------------------------


def test_a_longer_run_reports_its_new_rate(tmp_path, capsys):
    """Fault: more epochs of a finished run start from the beginning, or the learning rate jumps without a word."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"monitor_val": False})
    assert run(tmp_path, config) == 0
    assert reported(capsys) == []
    longer = changed(config, trainer_kwargs={"epochs": 2})
    assert run(tmp_path, longer) == 0
    (notice,) = reported(capsys)
    assert notice.startswith("learning rate: 5.00e-03 at the next step, 0.00e+00 when the checkpoint was written: ")
    assert "now covers 6 steps from lm_lr 1.00e-02; set optimizer_kwargs.lm_lr" in notice
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [f"{line['learning_rate']:.2e}" for line in lines[2:4]] == ["3.33e-03", "5.00e-03"]
    assert run(tmp_path, longer) == 0  # finished
    assert reported(capsys) == []


def test_a_fall_is_reported_too(tmp_path, capsys):
    """Fault: a resumed run is back in a longer warm-up, or has the rate of another lm_lr, without a word."""
    config = changed(make_project(tmp_path, rows=6), trainer_kwargs={"monitor_val": False, "max_steps": 2},
                     lr_scheduler_kwargs={"num_training_steps": 6})
    assert run(tmp_path, config) == 0
    for change, rate in (({"lr_scheduler_kwargs": {"num_training_steps": 60}}, "3.33e-03"),
                         ({"optimizer_kwargs": {"lm_lr": 1e-3}}, "6.67e-04")):
        shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
        again = {"output_dir": str(tmp_path / "again"), "max_steps": 3}
        assert run(tmp_path, changed(changed(config, **change), trainer_kwargs=again)) == 0
        (notice,) = reported(capsys)
        assert notice.startswith(f"learning rate: {rate} at the next step, 6.67e-03 when the checkpoint was written: ")
        shutil.rmtree(tmp_path / "again")


# -- a schedule that does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "steps", "words"), [
    ({"num_warmup_steps": 500}, 200, "all 200 optimizer steps of the run are warm-up; lower num_warmup_steps"),
    ({"num_training_steps": 4000}, 200, "all 200 optimizer steps of the run are warm-up; lower num_warmup_steps"),
    ({"num_training_steps": 50}, 200, "num_training_steps is 50, but the run has 200 optimizer steps: after step 50 "
     "the learning rate stays 0.00e+00"),
])
def test_what_does_not_fit_is_reported(keys, steps, words):
    """Fault: a warm-up longer than the run is cut short, or a decay ends before the run, without a word."""
    config = FineTuneConfig.model_validate({"lr_scheduler_kwargs": keys})
    (line,) = schedule_notices(make_schedule(config.lr_scheduler_kwargs, 1e-3, steps), steps)
    assert words in line and line.startswith("lr_scheduler_kwargs") and "\n" not in line
