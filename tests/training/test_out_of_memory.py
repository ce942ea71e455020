"""Out of memory: one line with the numbers to set, which train the same; checkpoints stay."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import utils.evaluation.evaluate
import validate_model
from data.batches import plan_epoch
from model.errors import ModelError
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.faults.memory import CPU_ERRORS, GPU, full_in, full_in_forward
from tests.small_runs import changed, largest_difference, make_project, make_rows, metrics, run, weights
from utils.config.fine_tune import FineTuneConfig
from utils.training.out_of_memory import (
    ACCUMULATION,
    OutOfMemory,
    is_out_of_memory,
    out_of_memory_remedy,
    training_remedy,
    with_batch_size,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def last_error(capsys) -> str:
    """The one line of the error."""
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in printed
    return errors[0].partition(": error: ")[2]


def project(folder: Path, batch: int = 8, **dataset) -> dict:
    return changed(make_project(folder, rows=40), dataset_kwargs={"train_batch_size": batch, **dataset},
                   trainer_kwargs={"gradient_accumulation_steps": 2})


def with_remedy(message: str, config: dict) -> dict:
    """The config with the numbers of a message."""
    config = json.loads(json.dumps(config))
    for section, key, value in re.findall(r"(\w+_kwargs)\.(\w+) (\d+) \(now ", message):
        config[section][key] = int(value)
    return config


@pytest.mark.parametrize("error", [GPU, *CPU_ERRORS], ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_errors_of_memory(error):
    """Fault: out of memory, also if a library wraps the error, is reported as a fault of the program."""
    wrapped = ModelError("cannot be loaded")
    wrapped.__cause__ = error
    assert is_out_of_memory(error) and is_out_of_memory(wrapped)
    with pytest.raises(OutOfMemory, match=r"^(GPU )?out of memory: do$"), out_of_memory_remedy("do"):
        raise wrapped


@pytest.mark.parametrize("error", [GPU, CPU_ERRORS[0]], ids=lambda error: type(error).__name__)
def test_training_with_the_numbers_of_the_message(tmp_path, capsys, error):
    """Fault: the numbers are refused by the checkpoint, or train another model."""
    config = project(tmp_path)
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "whole")})) == 0
    config = changed(config, trainer_kwargs={"n_batch_ckpt_save": 2})
    with full_in_forward(error, most_tokens=1200):
        capsys.readouterr()
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        assert message.startswith("GPU out of memory: " if error is GPU else "out of memory: ")
        assert ("set dataset_kwargs.train_batch_size 4 (now 8) and trainer_kwargs.gradient_accumulation_steps 4 "
                "(now 2) and trainer_kwargs.n_batch_ckpt_save 4 (now 2): the optimizer steps stay the same") in message
        assert run(tmp_path, with_remedy(message, config)) == 0
    folders = [tmp_path / name for name in ("run", "whole")]
    assert largest_difference(*(weights(folder / "model_checkpoints/last") for folder in folders)) < 1e-5
    losses = [[line["loss"] for line in metrics(folder)] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("batch", "smaller"), [(8, 4), (6, 3), (3, 1), (9, 3), (7, 1)])
def test_a_smaller_batch_divides_the_old_one(batch, smaller):
    """Fault: half of 3 rows is 1.5, other rows in a step, or keys that count micro-batches now mean other rows."""
    options = {"ckpt_training_batch": 100, "gradient_accumulation_steps": 2}
    config = FineTuneConfig.model_validate({"dataset_kwargs": {"train_batch_size": batch}, "trainer_kwargs": options})
    assert f"train_batch_size {smaller} (now {batch})" in training_remedy(config)
    values = with_batch_size(config, smaller)
    assert values["trainer_kwargs.ckpt_training_batch"] == round(100 * batch / smaller)
    lengths, accumulation = np.random.default_rng(0).integers(2, 99, 50), values[ACCUMULATION]
    for whole, part in zip(plan_epoch(lengths, batch, 2, 1, 0), plan_epoch(lengths, smaller, accumulation, 1, 0),
                           strict=True):
        assert np.array_equal(np.concatenate(whole), np.concatenate(part))


@pytest.mark.parametrize(("options", "step"), [
    ({}, 3), ({"adaptive_loss_scaling": True, "loss_scaling_batch": 2, "adaptive_loss_metric": "perplexity"}, 1),
], ids=["validation", "loss scaling"])
def test_evaluation(tmp_path, capsys, options, step):
    """Fault: the training batch is blamed for an evaluation batch, or the steps before it are lost."""
    config = changed(project(tmp_path), trainer_kwargs=options)
    with full_in_forward(GPU, most_tokens=700, training=False):
        assert run(tmp_path, config) == 1
        message = last_error(capsys)
        assert "set dataset_kwargs.val_batch_size 4 (now 8): the scores stay the same" in message
        assert (tmp_path / "run/model_checkpoints/last").resolve().name == f"step-{step}"
        assert run(tmp_path, changed(config, dataset_kwargs={"val_batch_size": 2})) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("flags", "expected"), [
    ([], "set --batch_size 4 (now 8)"), (["--batch_size", "1", "--num_beams", "5"], "set --num_beams 2 (now 5)"),
    (["--batch_size", "1"], "lower --max_generation_length"),
])
def test_validate_model(tmp_path, capsys, flags, expected):
    """Fault: validate_model.py names keys of a config that it does not have."""
    tiny_gpt2(positions=320).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    table = write_rows(tmp_path / "test.csv", make_rows(6))
    arguments = ["--csv_path", str(table), "--model_path", str(tmp_path / "model"), "--output_dir",
                 str(tmp_path / "out"), "--max_generation_length", "8", "--device_id", "-1", *flags]
    evaluate = utils.evaluation.evaluate
    with full_in(evaluate, "greedy_decode", GPU), full_in(evaluate, "beam_search", GPU):
        assert validate_model.main(arguments) == 1
    assert expected in last_error(capsys) and not (tmp_path / "out/predictions.json").exists()
