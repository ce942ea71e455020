"""Predictions, scores and a log that find no room: the training that they are of is kept, and they are made later."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_runs import assert_equal_weights, changed, error_line, make_project, run, weights
from utils.evaluation import validation
from utils.manifest import verify

pytestmark = pytest.mark.usefixtures("one_thread")


def failing(error: OSError, target: str) -> Callable:
    real = validation.write_text

    def write(path: Path, text: str) -> None:
        if target in str(path):
            raise OSError(error.errno, error.strerror, str(path))
        real(path, text)

    return write


def test_results_that_cannot_be_written_cost_no_training(tmp_path, monkeypatch, capsys):
    """An epoch of training is lost because the predictions after it find no room; or its results are never made."""
    target = "predictions/validation-step-2.json"
    config = changed(make_project(tmp_path, rows=4, dropout=0.1), trainer_kwargs={
        "metrics": ["rouge"], "save_predictions": True, "epochs": 2, "precision": "float32"})
    assert run(tmp_path, config) == 0
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    with monkeypatch.context() as patch:
        patch.setattr(validation, "write_text", failing(OSError(28, "No space left on device"), target))
        assert run(tmp_path, config) == 1
    line = error_line(capsys)
    assert f"run/{target}: No space left on device: free space" in line
    assert "stopped at optimizer step 2, checkpoint written; run the same command to resume" in line
    verify(tmp_path / "run/model_checkpoints/last")
    assert run(tmp_path, config) == 0
    assert "resuming from" in capsys.readouterr().err
    assert_equal_weights(weights(whole / "model_checkpoints/last"), weights(tmp_path / "run/model_checkpoints/last"))
    for name in ("predictions/validation-step-2.json", "predictions/validation-step-4.json", "scores.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
