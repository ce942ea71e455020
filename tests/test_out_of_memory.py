"""Memory that is full: one line with batch, phase and the numbers to write, which do the same; checkpoints stay."""

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import model.rollout_sets
import model.vocabulary_loss
import utils.evaluation
import utils.training_run
import validate_model
from data.batches import plan_epoch
from data.token_cache import TokenTable
from model.language_model import LanguageModel, ModelError
from model.teacher import Teacher
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.faults.memory import CPU_ERRORS, GPU, full_in, full_in_forward
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import changed, largest_difference, make_project, make_rows, metrics, run, weights
from utils.batch_numbers import smaller_batch, with_batch_size
from utils.config import FineTuneConfig
from utils.out_of_memory import OutOfMemory, memory_error, memory_told

pytestmark = pytest.mark.usefixtures("one_thread")


def last_error(capsys) -> str:
    """The one line of the error."""
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in told
    return errors[0].partition(": error: ")[2]


def project(folder: Path, batch: int = 8, accumulation: int = 2, **dataset) -> dict:
    return changed(make_project(folder, rows=40), dataset_kwargs={"train_batch_size": batch, **dataset},
                   trainer_kwargs={"gradient_accumulation_steps": accumulation})


def lengths(folder: Path) -> np.ndarray:
    (table,) = (folder / "cache").glob("train-*")
    return TokenTable(table).lengths


def written(message: str, config: dict) -> dict:
    """The config with the numbers that a message says."""
    config = json.loads(json.dumps(config))
    for section, key, value in re.findall(r"(\w+_kwargs)\.(\w+) (\d+) \(now ", message):
        config[section][key] = int(value)
    return config


# -- what is an error of memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [GPU, *CPU_ERRORS], ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_errors_of_memory(error):
    """Fault: torch's error for the CPU, or one that a library has wrapped, is told as a fault of the program."""
    assert memory_error(error) is error
    for wrapped in (ModelError("cannot be loaded"), ValueError("x")):
        wrapped.__cause__ = error
        assert memory_error(wrapped) is error
    with pytest.raises(OutOfMemory, match=r"^(the GPU's )?memory is full(?: \(.* more were asked for\))?: do$"), \
            memory_told(lambda done: "do"):
        raise error


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(errno.ENOSPC, "No space left on device"),
    ModelError("cannot allocate memory"), KeyError("bad_alloc"),
])
def test_other_errors_are_not_of_memory(error):
    """Fault: a full disk, or a name that holds the words, is told as full memory."""
    assert memory_error(error) is None
    with pytest.raises(type(error)), memory_told(lambda done: "do"):
        raise error


# -- the training step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [GPU, CPU_ERRORS[0], CPU_ERRORS[2]], ids=lambda error: type(error).__name__)
def test_half_the_batch_and_twice_the_accumulation_train_the_same(tmp_path, capsys, error):
    """Fault: the message hides batch or remedy, its numbers are refused by the checkpoint, or train another model."""
    config = project(tmp_path)
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "whole")})) == 0
    config = changed(config, trainer_kwargs={"n_batch_ckpt_save": 2, "keep_checkpoints": 9})
    plan = plan_epoch(lengths(tmp_path), 8, 2, 1234, 0)
    tokens = [max(len(rows) * lengths(tmp_path)[rows].max() for rows in step) for step in plan]
    assert tokens.index(max(tokens)) > 0  # so that there is a checkpoint before
    capsys.readouterr()
    with full_in_forward(error, most_tokens=max(tokens) - 1):
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        stopped = tokens.index(max(tokens)) + 1
        start = "the GPU's memory is full" if error is GPU else "memory is full"
        assert message.startswith(f"{start} in training step {stopped} (8 rows, the longest of {max(tokens) // 8} "
                                  f"tokens: {max(tokens)} tokens with padding")
        assert (error is CPU_ERRORS[2]) != ("more were asked for" in message)
        assert "set dataset_kwargs.train_batch_size 4 (now 8)" in message
        assert "trainer_kwargs.gradient_accumulation_steps 4 (now 2)" in message
        assert "the steps stay the same" in message and "the checkpoints stay as they are" in message
        root = tmp_path / "run/model_checkpoints"
        assert (root / "last").resolve().name == f"step-{stopped - 1}"
        smaller = written(message, config)
        assert smaller["trainer_kwargs"]["n_batch_ckpt_save"] == 4
        assert run(tmp_path, smaller) == 0
    halves = plan_epoch(lengths(tmp_path), 4, 4, 1234, 0)
    for whole, half in zip(plan, halves, strict=True):  # bit for bit the same rows in the same steps
        assert np.array_equal(np.concatenate(whole), np.concatenate(half))
    folders = [tmp_path / name for name in ("run", "whole")]
    assert largest_difference(*(weights(folder / "model_checkpoints/last") for folder in folders)) < 1e-5
    left, right = map(metrics, folders)
    for mine, theirs in zip(left, right, strict=True):
        assert mine.pop("split") == theirs.pop("split") and mine == pytest.approx(theirs, rel=1e-4)


def test_a_plateaus_accumulation_is_kept(tmp_path):
    """Fault: a run that had doubled its accumulation goes on in smaller batches with smaller steps."""
    config = changed(
        project(tmp_path, batch=4, accumulation=2), trainer_kwargs={"epochs": 2}, optimizer_kwargs={"lm_lr": 1e-9},
        callbacks_kwargs={"kwargs": {"patience": 1, "threshold": 9}},
        lr_scheduler_kwargs={"increase_batch_size_on_plateau": True},
    )
    assert run(tmp_path, config) == 0
    smaller = changed(config, dataset_kwargs={"train_batch_size": 2},
                      trainer_kwargs={"epochs": 3, "gradient_accumulation_steps": 4})
    assert run(tmp_path, smaller) == 0
    steps = [line["epoch"] for line in metrics(tmp_path / "run")]
    assert [steps.count(epoch) for epoch in range(3)] == [5, 5, 3]  # of 8, 8 and 16 rows


@pytest.mark.parametrize(("batch", "rows", "expected"), [
    (8, 8, 4), (6, 6, 3), (3, 3, 1), (9, 9, 3), (8, 3, 2), (2, 2, 1), (12, 12, 6), (7, 7, 1), (8, 2, 1),
])
def test_a_smaller_batch_divides_the_old_one(batch, rows, expected):
    """Fault: half of 3 rows is 1.5; or a last, smaller batch that did not fit is as large with the new number."""
    assert smaller_batch(batch, rows) == expected
    config = FineTuneConfig.model_validate({"dataset_kwargs": {"train_batch_size": batch}})
    values = with_batch_size(config, expected)
    assert values["dataset_kwargs.train_batch_size"] * values["trainer_kwargs.gradient_accumulation_steps"] == batch


def test_counts_of_micro_batches_follow(tmp_path):
    """Fault: half the batch halves the epoch that ckpt_training_batch bounds, and doubles the checkpoints."""
    config = FineTuneConfig.model_validate({
        "dataset_kwargs": {"train_batch_size": 8},
        "trainer_kwargs": {"n_batch_ckpt_save": 50, "ckpt_training_batch": 100, "adaptive_loss_scaling": True},
    })
    assert with_batch_size(config, 4) == {
        "dataset_kwargs.train_batch_size": 4, "trainer_kwargs.gradient_accumulation_steps": 2,
        "trainer_kwargs.n_batch_ckpt_save": 100, "trainer_kwargs.ckpt_training_batch": 200,
        "trainer_kwargs.loss_scaling_batch": 2048,
    }


def test_a_bound_in_micro_batches_still_forbids_other_ones(tmp_path, capsys):
    """Fault: a run whose epochs are bounded by micro-batches goes on with other rows."""
    config = changed(project(tmp_path), trainer_kwargs={"ckpt_training_batch": 4, "epochs": 1})
    assert run(tmp_path, config) == 0
    other = changed(config, trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 4},
                    dataset_kwargs={"train_batch_size": 4})
    assert run(tmp_path, other) == 2
    assert "train_batch_size was 8 and is 4" in last_error(capsys)


def test_tokens_per_batch(tmp_path, capsys):
    """Fault: half the rows are advised where tokens cut the batch, so nothing changes."""
    config = project(tmp_path, tokens_per_batch=600)
    with full_in_forward(GPU, most_tokens=400):
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        assert "dataset_kwargs.tokens_per_batch" in message and "train_batch_size" not in message
        assert "(now 600): the steps stay the same" in message
        assert run(tmp_path, written(message, config)) == 0


def test_one_row(tmp_path, capsys):
    """Fault: "halve the batch" where it is one row."""
    config = project(tmp_path, batch=1)
    with full_in_forward(GPU, most_tokens=200):
        assert run(tmp_path, config) == 1
    message = last_error(capsys)
    longest = int(re.search(r"\(1 row, the longest of (\d+) tokens: \1 tokens with padding", message)[1])
    assert f"the batch is one row already: lower dataset_kwargs.max_length (such as {longest // 2})" in message
    assert 'trainer_kwargs.precision to "bfloat16"' in message and "smaller model" in message


def test_the_optimizers_state(tmp_path, capsys):
    """Fault: a smaller batch is advised where the optimizer's state does not fit."""
    with full_in(torch.optim.AdamW, "step", GPU, lambda optimizer: optimizer.param_groups[0]["params"][0].numel() > 4):
        assert run(tmp_path, project(tmp_path)) == 1
    message = last_error(capsys)
    assert message.startswith("the GPU's memory is full in training step 1, the optimizer's update (2.50 GiB more")
    assert "smaller model" in message and "train_batch_size" not in message


# -- other phases --------------------------------------------------------------------------------------------------


def test_validation(tmp_path, capsys):
    """Fault: the training batch is blamed for a validation batch, or the epoch before it is lost."""
    config = project(tmp_path)
    with full_in_forward(GPU, most_tokens=700, training=False):
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        assert re.match(r"the GPU's memory is full in measuring validation loss \(6 rows, the longest of \d+ ", message)
        assert "set dataset_kwargs.val_batch_size 3 (now 8): the scores stay the same" in message
        assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-3"
        assert run(tmp_path, written(message, config)) == 0
    assert "epoch 1/1" not in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 3 and len(metrics(tmp_path / "run", "validation")) == 1


def test_a_score_of_loss_scaling(tmp_path, capsys):
    """Fault: a score on the way that does not fit loses the steps since the last checkpoint, or changes the run."""
    config = changed(project(tmp_path), trainer_kwargs={
        "adaptive_loss_scaling": True, "loss_scaling_batch": 2, "adaptive_loss_metric": "perplexity"})
    whole = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "whole")})
    assert run(tmp_path, changed(whole, dataset_kwargs={"val_batch_size": 3})) == 0
    with full_in_forward(GPU, most_tokens=700, training=False):
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        assert "in measuring loss scaling loss (6 rows" in message and "val_batch_size 3 (now 8)" in message
        assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-1"
        assert run(tmp_path, written(message, config)) == 0
    assert largest_difference(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("run", "whole"))) == 0


def test_decoding(tmp_path, capsys):
    """Fault: a batch that is decoded is told as one that is trained; beams are not thought of."""
    config = changed(project(tmp_path), trainer_kwargs={"metrics": ["rouge"]})
    with full_in(utils.evaluation, "greedy_decode", GPU):
        assert run(tmp_path, config) == 1
    message = last_error(capsys)
    assert re.match(r"the GPU's memory is full in decoding validation ROUGE \(6 rows, the longest of \d+ ", message)
    assert "set dataset_kwargs.val_batch_size 3 (now 8)" in message
    beams = changed(config, dataset_kwargs={"val_batch_size": 1}, model_arch={
        "generation_kwargs": {"max_generation_length": 8, "num_beams": 4}})
    with full_in(utils.evaluation, "beam_search", GPU):
        assert run(tmp_path, beams) == 1
    assert "set model_arch.generation_kwargs.num_beams 2 (now 4)" in last_error(capsys)


def test_loading(tmp_path, capsys):
    """Fault: full memory while a model is loaded, moved or checked is told as a family that is not supported."""
    for owner, name in ((LanguageModel, "last_hidden"), (LanguageModel, "hidden_states"), (LanguageModel, "to")):
        with full_in(owner, name, GPU):
            assert run(tmp_path, make_project(tmp_path, rows=4)) == 1
        message = last_error(capsys)
        assert message.startswith("the GPU's memory is full in loading the model (2.50 GiB more were asked for): ")
        assert "take a smaller model_arch.lang_model" in message and "supported" not in message
    assert not (tmp_path / "run/model_checkpoints").exists()


def test_the_teacher(tmp_path, capsys):
    """Fault: the teacher's batch is not told apart from the student's, or its loading from its work."""
    config = changed(make_kd_project(tmp_path), dataset_kwargs={"train_batch_size": 4})
    with full_in(LanguageModel, "label_hidden", GPU,
                 lambda each, ids, *others: not next(each.parameters()).requires_grad and len(ids) > 3):
        assert run_kd(tmp_path, config) == 1
        message = last_error(capsys)
        assert message.startswith("the GPU's memory is full in training step 1, the teacher (4 rows, the longest of ")
        assert "set dataset_kwargs.train_batch_size 2 (now 4)" in message
        assert "gradient_accumulation_steps 2 (now 1)" in message
        assert run_kd(tmp_path, changed(written(message, config), trainer_kwargs={"monitor_val": False})) == 0
    with full_in(Teacher, "__init__", GPU):
        assert run_kd(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "other")})) == 1
    message = last_error(capsys)
    assert "in loading the teacher" in message and "model_arch.teacher_gpu_device_id" in message


@pytest.mark.parametrize("options", [
    {"method": "policy_gradient"}, {"on_policy_fraction": 1.0}, {"method": "policy_gradient", "rollout_batch_size": 6},
], ids=str)
def test_rollouts(tmp_path, capsys, options):
    """Fault: a smaller training batch is advised where rollouts do not fit."""
    config = changed(make_kd_project(tmp_path, **options), dataset_kwargs={"train_batch_size": 4, "val_batch_size": 3})
    slots = options.get("rollout_batch_size")
    with full_in(model.rollout_sets, "draw_rollouts", GPU, lambda *given: given[4] > 2):
        assert run_kd(tmp_path, config) == 1
        message = last_error(capsys)
        rows = 4 if slots else 3
        assert message.startswith(f"the GPU's memory is full in training step 1, drawing rollouts ({rows} rows, the ")
        assert f"set distillation_kwargs.rollout_batch_size {rows // 2} (now {slots or 'null'}): fewer rows" in message
        assert run_kd(tmp_path, written(message, config)) == 0


def test_rollouts_of_other_micro_batches(tmp_path):
    """Fault: a run that goes on in smaller batches finds a set of rollouts cut into the old ones, and fails."""
    config = make_kd_project(tmp_path, method="policy_gradient", rollout="student", rollout_epochs=2)
    first = changed(config, dataset_kwargs={"train_batch_size": 4}, trainer_kwargs={"max_steps": 1})
    assert run_kd(tmp_path, first) == 0
    assert run_kd(tmp_path, changed(config, trainer_kwargs={"gradient_accumulation_steps": 2})) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_logits(tmp_path, capsys):
    """Fault: the chunks of logits, which take most with a large vocabulary, are not thought of."""
    config = changed(make_kd_project(tmp_path, chunk_size=64), dataset_kwargs={"train_batch_size": 4})
    with full_in(model.vocabulary_loss, "all_chunks", GPU, lambda hidden, weight, bias, work, *others: any(
            part.stop - part.start > 32 for part in work.parts)):
        assert run_kd(tmp_path, config) == 1
        message = last_error(capsys)
        assert "in training step 1, logits (4 rows, " in message
        assert "set distillation_kwargs.chunk_size 32 (now 64): the result stays the same; or set " in message
        chunks = changed(config, distillation_kwargs={"chunk_size": 32})
        assert run_kd(tmp_path, chunks) == 0


def test_validate_model(tmp_path, capsys):
    """Fault: validate_model.py tells of keys of a config that it does not have."""
    tiny_gpt2(positions=320).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "test.csv", make_rows(6))
    arguments = ["--csv_path", str(tmp_path / "test.csv"), "--model_path", str(tmp_path / "model"), "--output_dir",
                 str(tmp_path / "out"), "--max_generation_length", "8", "--precision", "float32", "--device_id", "-1"]
    for more, told in (
        ([], "set --batch_size 3 (now 8): the predictions stay the same"),
        (["--batch_size", "4"], "--batch_size 2 (now 4)"),
        (["--batch_size", "1", "--num_beams", "5"], "set --num_beams 2 (now 5)"),
        (["--batch_size", "1"], "one row at a time is decoded already: lower --max_generation_length, set --precision"),
    ):
        with full_in(utils.evaluation, "greedy_decode", GPU), full_in(utils.evaluation, "beam_search", GPU):
            assert validate_model.main([*arguments, *more]) == 1
        message = last_error(capsys)
        assert "memory is full in decoding predictions (" in message and told in message
        assert not (tmp_path / "out/predictions.json").exists()
    with full_in(LanguageModel, "to", CPU_ERRORS[0]):
        assert validate_model.main(arguments) == 1
    assert last_error(capsys).startswith("memory is full in loading the model (4294967296 bytes more were asked for): ")
