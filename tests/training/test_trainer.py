"""The loop: one division a step, the last window, clipping, what stops a run, what evaluation must not change."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from model.objective import LossTerms
from tests.small_runs import changed, largest_difference, make_project, make_rows, metrics, run, weights
from utils.training.distributed import DistributedContext
from utils.training.step import optimizer_step


def test_same_step_for_every_split_into_micro_batches(tmp_path):
    """Fault: means of micro-batch means, so that 8x1 and 1x8 train different models (case A17)."""
    project = make_project(tmp_path, layers=2)
    results = []
    for batch, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        output = tmp_path / f"run-{batch}"
        config = changed(
            project, dataset_kwargs={"train_batch_size": batch},
            trainer_kwargs={"output_dir": str(output), "gradient_accumulation_steps": accumulation},
        )
        assert run(tmp_path, config) == 0
        assert len(metrics(output)) == 5
        results.append((weights(output / "model_checkpoints/last"), metrics(output)))
    start = weights(tmp_path / "model")
    for found, lines in results[1:]:
        assert largest_difference(results[0][0], found) < 1e-5
        assert [line["label_tokens"] for line in lines] == [line["label_tokens"] for line in results[0][1]]
        losses = [[line["loss"] for line in each] for each in (lines, results[0][1])]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    assert largest_difference(start, results[0][0]) > 1e-3


def test_token_budget_changes_no_step(tmp_path):
    """Fault: a token budget that changes which rows make a step."""
    project = make_project(tmp_path)
    found = []
    for budget in (None, 300):
        output = tmp_path / f"run-{budget}"
        config = changed(project, dataset_kwargs={"train_batch_size": 8, "tokens_per_batch": budget},
                         trainer_kwargs={"output_dir": str(output)})
        assert run(tmp_path, config) == 0
        found.append(weights(output / "model_checkpoints/last"))
    assert largest_difference(*found) < 1e-5


class Distance(nn.Module):
    """The sum over rows of (w - x)^2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: float) -> LossTerms:
        return LossTerms((self.w - x) ** 2, 1, {})


def test_last_window_is_divided_by_its_own_rows():
    """Fault: the last window, of 1 row after one of 4, is divided by 4 (w ends as 0.725), not by 1 (case A17)."""
    objective, found = Distance(), []
    optimizer = torch.optim.SGD(objective.parameters())
    for rows in ([1.0, 2.0, 3.0, 4.0], [5.0]):
        optimizer_step(objective, [(x,) for x in rows], optimizer, DistributedContext(torch.device("cpu")),
                       label_tokens=len(rows), learning_rate=0.1, clip_norm=None)
        found.append(objective.w.item())
    assert found == pytest.approx([0.5, 1.4], abs=1e-6)


class Slope(nn.Module):
    """loss_sum = w . x, so that the gradient is the sum of all x."""

    def __init__(self, size: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> LossTerms:
        return LossTerms((self.w * x).sum(), len(x), {})


def slope_step(inputs, label_tokens, clip_norm=None):
    """The weight after one step of SGD with learning rate 1 (minus the gradient), and the step's metrics."""
    inputs = [torch.tensor(each) for each in inputs]
    objective = Slope(len(inputs[0]))
    metrics = optimizer_step(
        objective, [(each,) for each in inputs], torch.optim.SGD(objective.parameters()),
        DistributedContext(torch.device("cpu")), label_tokens=label_tokens, learning_rate=1.0, clip_norm=clip_norm,
    )
    return (-objective.w).tolist(), metrics


def test_tokens_not_micro_batches_are_weighted():
    """Fault: mean of micro-batch means, 2.5, where the mean over tokens is 1.75 (case A17)."""
    assert slope_step([[4.0], [1.0], [1.0], [1.0]], 4)[0] == pytest.approx([1.75])


def test_clipping_acts_on_the_divided_gradient():
    """Fault: clipping before the division leaves a gradient far too small (case A17)."""
    moved, metrics = slope_step([[3.0 * 65536, 4.0 * 65536]], 65536, clip_norm=1.0)
    assert moved == pytest.approx([0.6, 0.8], abs=1e-6) and metrics.grad_norm == pytest.approx(5.0)
    moved, metrics = slope_step([[0.3, 0.4]], 1, clip_norm=1.0)
    assert moved == pytest.approx([0.3, 0.4]) and metrics.grad_norm == pytest.approx(0.5)


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """Fault: a finite loss, a step to NaN weights, and a checkpoint that pushes out the good ones (case A11)."""
    config = changed(make_project(tmp_path, rows=8), optimizer_kwargs={"kwargs": {"eps": 0}}, trainer_kwargs={
        "n_batch_ckpt_save": 1, "gradient_clipping": None, "epochs": 2})
    assert run(tmp_path, config) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("train.py: error: ")
    for checkpoint in (tmp_path / "run/model_checkpoints").glob("step-*"):
        assert all(value.isfinite().all() for value in weights(checkpoint).values()), checkpoint


def test_evaluation_changes_nothing_of_training(tmp_path):
    """Fault: evaluation draws random numbers, or leaves the model in eval mode: dropout then differs (A19, A20)."""
    project = make_project(tmp_path, dropout=0.3)
    found = []
    for monitor in (True, False):
        output = tmp_path / f"run-{monitor}"
        config = changed(project, trainer_kwargs={
            "output_dir": str(output), "epochs": 2, "monitor_val": monitor, "metrics": ["rouge"] if monitor else [],
        })
        assert run(tmp_path, config) == 0
        found.append(weights(output / "model_checkpoints/last"))
        lines = metrics(output, "validation")
        assert [line["epoch"] for line in lines] == ([0, 1] if monitor else [])
    assert largest_difference(*found) == 0.0


def test_first_line_is_logged_and_learning_rates_are_those_used(tmp_path):
    """Fault: learning rates logged one step late, or the first step missing from metrics.jsonl."""
    config = changed(make_project(tmp_path, rows=12), trainer_kwargs={"log_every": 4}, optimizer_kwargs={"lm_lr": 1e-3},
                     lr_scheduler_kwargs={"num_warmup_steps": 2})
    assert run(tmp_path, config) == 0
    found = {line["step"]: line["learning_rate"] for line in metrics(tmp_path / "run")}
    assert found == pytest.approx({1: 0.0, 4: 7.5e-4, 6: 2.5e-4})


def test_early_stopping_and_best_checkpoint(tmp_path):
    """Fault: `best` follows the newest epoch, or a run whose loss rises never stops."""
    config = changed(
        make_project(tmp_path, rows=8), trainer_kwargs={"epochs": 30}, optimizer_kwargs={"lm_lr": 0.3},
        callbacks_kwargs={"kwargs": {"patience": 2}},
    )
    assert run(tmp_path, config) == 0
    lines = metrics(tmp_path / "run", "validation")
    losses = [line["loss"] for line in lines]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30
    checkpoints = tmp_path / "run/model_checkpoints"
    assert (checkpoints / "best").resolve().name == f"step-{lines[best]['step']}"
    assert (checkpoints / "last").resolve().name == f"step-{lines[-1]['step']}"


def test_plateau_doubles_the_accumulation(tmp_path, capsys):
    """Fault: increase_batch_size_on_plateau without effect."""
    config = changed(
        make_project(tmp_path, rows=8), trainer_kwargs={"epochs": 6}, optimizer_kwargs={"lm_lr": 1e-9},
        callbacks_kwargs={"kwargs": {"patience": 1, "threshold": 0.1}},
        lr_scheduler_kwargs={"increase_batch_size_on_plateau": True},
    )
    assert run(tmp_path, config) == 0
    steps = [line["epoch"] for line in metrics(tmp_path / "run")]
    assert [steps.count(epoch) for epoch in range(4)] == [4, 4, 2, 1]
    assert "accumulation is now 2" in capsys.readouterr().err


def test_adaptive_loss_scaling(tmp_path):
    """Fault: the scale is not sigmoid(baseline - score), or a better score does not become the baseline."""
    config = changed(
        make_project(tmp_path, rows=8), trainer_kwargs={
            "adaptive_loss_scaling": True, "loss_scaling_batch": 2, "metrics": ["rouge"], "baseline_threshold": 0.2,
        },
    )
    assert run(tmp_path, config) == 0
    lines = metrics(tmp_path / "run", "loss_scaling")
    assert [line["step"] for line in lines] == [2, 4]
    baseline = 0.2
    for line in lines:
        assert line["loss_scale"] == pytest.approx(1 / (1 + np.exp(-(baseline - line["score"]))))
        baseline = max(baseline, line["score"])
    steps = metrics(tmp_path / "run")
    assert [line["loss"] / line["cross_entropy"] for line in steps] == pytest.approx(
        [1, 1, lines[0]["loss_scale"], lines[0]["loss_scale"]]
    )


def test_results_of_a_run(tmp_path):
    """Fault: NaN in metrics.jsonl, keys that users' plots read are missing, or scores that no one can trace to rows."""
    config = changed(make_project(tmp_path, rows=8), trainer_kwargs={
        "metrics": ["rouge"], "monitor_train": True, "save_predictions": True})
    assert run(tmp_path, config) == 0
    text = (tmp_path / "run/metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    train = {"split", "step", "epoch", "loss", "cross_entropy", "learning_rate", "grad_norm", "label_tokens",
             "tokens_per_second"}
    assert train <= lines[0].keys()
    validation = next(line for line in lines if line["split"] == "validation")
    assert {"step", "epoch", "loss", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"} <= validation.keys()
    assert validation["perplexity"] == pytest.approx(np.exp(validation["loss"]))
    assert any((tmp_path / "run/tensorboard").iterdir())
    records = json.loads((tmp_path / "run/predictions/validation-step-4.json").read_text())
    assert [record["id"] for record in records] == [row["id"] for row in make_rows(6, seed=1)]
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["validation"]["rouge1"] == pytest.approx(np.mean([record["rouge"]["rouge1"] for record in records]))
