"""Runs of train_kd.py: what they log and leave, exact resume, several processes. Errors: test_teacher_source.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_kd
from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import END, write_rows
from tests.model.test_teacher_student import formula
from tests.runs.test_train_script import last_error
from tests.small_kd_runs import make_kd_project, run_kd, save_model, tiny_teacher
from tests.small_runs import (
    assert_equal_weights,
    changed,
    largest_difference,
    launch,
    make_rows,
    metrics,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = {"lm_lr": 1e-12}  # the student stays what it was
HIDDEN = {"kind": "hidden"}


def batch_by_hand(rows: list[dict]) -> tuple:
    """input_ids, attention_mask, labels: a token is a byte, the highlights and the end-of-text are labels."""
    prompts = [f"{row['article']}\nTL;DR:".encode() for row in rows]
    texts = [[*f" {row['highlights']}".encode(), END] for row in rows]
    width = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
    ids, mask = torch.full((len(rows), width), END), torch.zeros(len(rows), width)
    labels = torch.full_like(ids, -100)
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        length = len(prompt) + len(text)
        ids[index, :length], mask[index, :length] = torch.tensor([*prompt, *text]), 1
        labels[index, len(prompt) : length] = torch.tensor(text)
    return ids, mask, labels


# -- what a run logs and leaves ----------------------------------------------------------------------------------


def test_a_run_from_a_config_file(tmp_path, capsys):
    """Fault: a part of the loss is not logged or not what is minimised, or a run leaves what no one can use."""
    options = {"kl_div": "reverse", "kd_weight": 0.3, "temperature": 2.0}
    config = changed(make_kd_project(tmp_path, **options), trainer_kwargs={"metrics": ["rouge"],
                                                                           "save_predictions": True})
    before = {path: path.read_bytes() for name in ("teacher", "student") for path in (tmp_path / name).iterdir()}
    assert run_kd(tmp_path, config) == 0
    told = capsys.readouterr().err
    assert f"teacher: {tmp_path / 'teacher'}, on cpu" in told and "student: " in told
    lines, validation = metrics(tmp_path / "run"), metrics(tmp_path / "run", "validation")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    parts = {"loss", "cross_entropy", "divergence", "learning_rate", "grad_norm", "label_tokens"}
    assert all(parts <= line.keys() for line in lines)
    assert {"loss", "cross_entropy", "divergence", "perplexity", "rougeL"} <= validation[0].keys()
    for line in (*lines, *validation):
        assert line["loss"] == pytest.approx(0.7 * line["cross_entropy"] + 0.3 * 4 * line["divergence"], rel=1e-5)
        assert line["divergence"] > 0.1
    assert validation[0]["perplexity"] == pytest.approx(math.exp(validation[0]["cross_entropy"]))
    assert {path: path.read_bytes() for path in before} == before

    checkpoint = tmp_path / "run/model_checkpoints/last"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (model.config.n_embd, model.config.n_layer, model.config.prompt_template) == (16, 1, DEFAULT_TEMPLATE)
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 257
    start, found = weights(tmp_path / "student"), weights(checkpoint)
    assert {name: value.shape for name, value in start.items()} == {name: value.shape for name, value in found.items()}
    assert largest_difference(start, found) > 1e-3
    moments = torch.load(checkpoint / "trainer_state/optimizer.pt", weights_only=True)["state"]
    assert sum(each["exp_avg"].numel() for each in moments.values()) == sum(each.numel() for each in found.values())
    records = json.loads((tmp_path / "run/predictions/validation-step-6.json").read_text())
    assert [record["id"] for record in records] == [row["id"] for row in make_rows(4, seed=1)]
    assert json.loads((tmp_path / "run/scores.json").read_text())["validation"]["rougeL"] >= 0

    assert train_kd.main(["--config", str(tmp_path / "run/config.json")]) == 0
    assert "already finished at step 6" in capsys.readouterr().err


@pytest.mark.parametrize("cache", [None, HIDDEN], ids=["live", "hidden"])
@pytest.mark.parametrize(("kl_div", "temperature"), [("forward", 1.0), ("JS", 2.0)])
def test_logged_values_are_the_formula_s(tmp_path, kl_div, temperature, cache):
    """Fault: the loss of a run is of other rows, other labels or another teacher than its files say."""
    config = changed(make_kd_project(tmp_path, kl_div=kl_div, temperature=temperature, teacher_cache=cache),
                     optimizer_kwargs=STILL, dataset_kwargs={"train_batch_size": 12})
    assert run_kd(tmp_path, config) == 0
    networks = [AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("teacher", "student")]
    for split, rows in (("train", make_rows(12)), ("validation", make_rows(4, seed=1))):
        labels = sum(len(row["highlights"]) + 2 for row in rows)
        with torch.no_grad():
            expected = [value.item() / labels for value in
                        formula(*networks, batch_by_hand(rows), kl_div, temperature)]
        (line,) = metrics(tmp_path / "run", split)
        assert [line["cross_entropy"], line["divergence"]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cache", [None, HIDDEN], ids=["live", "hidden"])
def test_validation_does_not_change_the_training(tmp_path, cache):
    """Fault: after validation the student stays in eval mode, or the random numbers are others (case A19)."""
    project = changed(make_kd_project(tmp_path, dropout=0.1, teacher_cache=cache), optimizer_kwargs={"lm_lr": 1e-3})
    write_rows(tmp_path / "subset.csv", make_rows(3, seed=2))
    # In the middle of an epoch, on rows that nothing else reads; sigmoid(perplexity) is 1 to the last bit here.
    often = {"adaptive_loss_scaling": True, "adaptive_loss_metric": "perplexity", "loss_scaling_batch": 2}
    found = []
    for name, options in (("none", {"monitor_val": False}), ("epoch", {}), ("often", often)):
        output = tmp_path / name
        config = changed(project, trainer_kwargs={"epochs": 2, "output_dir": str(output), **options},
                         dataset_kwargs={"validation_subset": "subset.csv"})
        assert run_kd(tmp_path, config) == 0
        found.append(weights(output / "model_checkpoints/last"))
    scaled = metrics(tmp_path / "often", "loss_scaling")
    assert len(scaled) >= 5 and {line["loss_scale"] for line in scaled} == {1.0}
    assert_equal_weights(found[0], found[1])
    assert_equal_weights(found[0], found[2])


def test_same_step_for_every_split_into_micro_batches(tmp_path):
    """Fault: means of micro-batch means, of cross-entropy or divergence (case A17)."""
    project = make_kd_project(tmp_path)
    found = []
    for batch, accumulation in ((1, 4), (4, 1)):
        output = tmp_path / f"run-{batch}"
        config = changed(project, dataset_kwargs={"train_batch_size": batch}, trainer_kwargs={
            "output_dir": str(output), "gradient_accumulation_steps": accumulation})
        assert run_kd(tmp_path, config) == 0
        found.append((weights(output / "model_checkpoints/last"), metrics(output)))
    assert largest_difference(found[0][0], found[1][0]) < 1e-5
    for name in ("loss", "cross_entropy", "divergence"):
        ours, theirs = ([line[name] for line in lines] for _, lines in found)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# -- resume ------------------------------------------------------------------------------------------------------


def resumable(folder: Path, **distillation) -> dict:
    """6 steps in 2 epochs, with dropout; the last step of an epoch is not full."""
    return changed(
        make_kd_project(folder, rows=11, dropout=0.1, **distillation),
        trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 2}, lr_scheduler_kwargs={"num_training_steps": 6},
    )


def assert_stopping_changes_nothing(folder: Path, config: dict, steps: list[int], capsys, told: str = "") -> None:
    """Stopped after each of `steps` and continued, weights and training lines are those of the whole run."""
    whole = changed(config, trainer_kwargs={"output_dir": str(folder / "whole")})
    assert run_kd(folder, whole) == 0
    expected, lines = weights(folder / "whole/model_checkpoints/last"), metrics(folder / "whole")
    assert len(lines) == 6
    for step in steps:
        output = folder / f"parts-{step}"
        parts = changed(config, trainer_kwargs={"output_dir": str(output), "max_steps": step})
        assert run_kd(folder, parts) == 0
        assert len(metrics(output)) == step
        capsys.readouterr()
        assert run_kd(folder, changed(parts, trainer_kwargs={"max_steps": None})) == 0
        errors = capsys.readouterr().err
        assert f"resuming from {output}" in errors and told in errors
        assert_equal_weights(expected, weights(output / "model_checkpoints/last"))
        assert metrics(output) == lines


EVERY = [pytest.param([1, 4, 5], marks=pytest.mark.slow, id="other steps")]


@pytest.mark.parametrize("steps", [pytest.param([2, 3], id="2, 3"), *EVERY])
def test_resume_with_a_live_teacher(tmp_path, capsys, steps):
    """Fault: after a stop the student sees other rows, other dropout or another teacher (case A20)."""
    assert_stopping_changes_nothing(tmp_path, resumable(tmp_path, kl_div="JS"), steps, capsys)


@pytest.mark.parametrize("steps", [pytest.param([2], id="2"), *EVERY])
@pytest.mark.parametrize("cache", [HIDDEN, {"kind": "top_k", "top_k": 20}], ids=["hidden", "top_k"])
def test_resume_with_a_cache(tmp_path, capsys, cache, steps):
    """Fault: values on disk are not those that the whole run used, or filling them changes dropout (case A20)."""
    assert_stopping_changes_nothing(tmp_path, resumable(tmp_path, teacher_cache=cache), steps, capsys,
                                    "teacher cache: all 11 rows of train-")


@pytest.mark.parametrize(("change", "told"), [
    ({"kl_div": "JS"}, "distillation_kwargs.kl_div was 'forward' and is 'JS'"),
    ({"temperature": 2.0}, "distillation_kwargs.temperature was 1.0 and is 2.0"),
    ({"kd_weight": 0.9}, "distillation_kwargs.kd_weight was 0.5 and is 0.9"),
    ({"student_init": "teacher_layers"}, "distillation_kwargs.student_init was None and is 'teacher_layers'"),
    ("teacher", "the teacher's weights was"),
])
def test_what_decides_the_loss_must_not_change(tmp_path, capsys, change, told):
    """Fault: a resumed run silently goes on with another loss or another teacher."""
    config = changed(make_kd_project(tmp_path, rows=6), trainer_kwargs={"max_steps": 2})
    assert run_kd(tmp_path, config) == 0
    expected = weights(tmp_path / "run/model_checkpoints/last")
    more = changed(config, trainer_kwargs={"max_steps": 3})
    if change == "teacher":
        save_model(tmp_path / "teacher", tiny_teacher(seed=11), DEFAULT_TEMPLATE)
    else:
        more = changed(more, distillation_kwargs=change)
    assert run_kd(tmp_path, more) == 2
    error = last_error(capsys)
    assert error.startswith("train_kd.py: error: cannot resume: ") and told in error
    assert_equal_weights(expected, weights(tmp_path / "run/model_checkpoints/last"))
    assert not list((tmp_path / "run").glob("earlier-run-*"))


def test_what_decides_nothing_may_change(tmp_path):
    """Fault: another chunk_size, or a teacher that was moved, forbids to go on."""
    config = changed(make_kd_project(tmp_path, rows=6), trainer_kwargs={"max_steps": 2})
    assert run_kd(tmp_path, config) == 0
    (tmp_path / "teacher").rename(tmp_path / "moved")
    more = changed(config, trainer_kwargs={"max_steps": 3, "teacher_ckpt_path": str(tmp_path / "moved")},
                   distillation_kwargs={"chunk_size": 5})
    assert run_kd(tmp_path, more) == 0
    assert len(metrics(tmp_path / "run")) == 3


# -- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, HIDDEN, {"kind": "top_k", "top_k": 20}], ids=["live", "hidden", "top_k"])
def test_two_processes_equal_one(tmp_path, cache):
    """Fault: gradients or parts are averaged over processes, or processes spoil each other's cache."""
    project = changed(make_kd_project(tmp_path, rows=21, teacher_cache=cache),
                      trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 4})
    for processes in (1, 2):
        own = changed(project, trainer_kwargs={"output_dir": str(tmp_path / str(processes))})
        launch("train_kd.py", tmp_path, own, processes)
    one, two = tmp_path / "1", tmp_path / "2"
    assert largest_difference(*(weights(folder / "model_checkpoints/last") for folder in (one, two))) < 1e-5
    for split in ("train", "validation"):
        left, right = metrics(one, split), metrics(two, split)
        assert len(left) == len(right) > 0
        for mine, theirs in zip(left, right, strict=True):
            assert mine.pop("split") == theirs.pop("split") == split
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for path in (one / "teacher_cache").glob("*/log_rest.bin"):
        np.testing.assert_allclose(*(np.fromfile(folder / "teacher_cache" / path.parent.name / path.name, "float32")
                                     for folder in (one, two)), rtol=1e-4)
