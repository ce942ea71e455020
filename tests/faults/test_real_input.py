"""Real articles, GPT-2's vocabulary and real pretrained weights, through the scripts as users run them."""

import csv
import json
import os
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.conftest import write_rows
from tests.faults.runs import fork_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_script(tmp_path_factory) -> Iterator:
    """run_script(name, *arguments): runs a script to its end; what it says on stderr."""
    folder = tmp_path_factory.mktemp("runs")
    with fork_server() as run:
        def call(name: str, *arguments: str) -> str:
            outcome = run(name, list(arguments), folder, limit=600.0)
            assert outcome.code == 0, outcome.errors[-2000:]
            return outcome.errors

        yield call


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(path: Path, count: int) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(islice(csv.DictReader(file), count))


def write_config(tmp_path: Path, **sections) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def test_small_gpt2_from_scratch(tmp_path, shared, run_script):
    """Fault: real articles do not go through train, resume and validate, or the loss does not fall."""
    data, output = shared / "data", tmp_path / "run"
    config = write_config(
        tmp_path,
        model_arch={"lang_model": "gpt2", "from_scratch": True, "tokenizer": str(data / "gpt2-tokenizer"),
                    "architecture": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256}},
        trainer_kwargs={"output_dir": str(output), "log_every": 1, "monitor_val": False, "precision": "float32",
                        "device": "cpu"},
        optimizer_kwargs={"lm_lr": 1e-2},
        lr_scheduler_kwargs={"num_warmup_steps": 5, "num_training_steps": 30},
        dataset_kwargs={"data_dir": str(tmp_path), "train_batch_size": 4, "max_length": 256},
    )
    write_rows(tmp_path / "train.csv", rows_of(data / "cnn_dm_train.csv", 160))
    run_script("train.py", "--config", str(config), "--set", "trainer_kwargs.max_steps=15")
    said = run_script("train.py", "--config", str(config), "--set", "trainer_kwargs.max_steps=30")
    assert "resuming from" in said and "step-15" in said

    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))  # continued: no step twice, none missing
    assert [line["learning_rate"] for line in lines][13:17] == pytest.approx(
        [1e-2 * (30 - done) / 25 for done in range(13, 17)])  # one schedule
    first, last = lines[0]["loss"], statistics.fmean(line["loss"] for line in lines[-5:])
    assert 10 < first < 12  # ln 50257 = 10.82: every token alike
    assert last < first - 2

    rows = rows_of(data / "cnn_dm_test.csv", 60)
    write_rows(tmp_path / "test.csv", rows)
    predictions_dir = tmp_path / "predictions"
    run_script("validate_model.py", "--csv_path", str(tmp_path / "test.csv"), "--model_path",
               str(output / "model_checkpoints" / "last"), "--output_dir", str(predictions_dir),
               "--max_generation_length", "20", "--batch_size", "30")
    predictions = json.loads((predictions_dir / "predictions.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in predictions] == [row["id"] for row in rows]
    assert [record["target_highlight"] for record in predictions] == [row["highlights"] for row in rows]
    scores = json.loads((predictions_dir / "scores.json").read_text(encoding="utf-8"))
    assert (scores["rows"], scores["prompt_max_length"]) == (60, 256)


def test_small_pair_from_scratch_is_distilled(tmp_path, shared, run_script):
    """Fault: real articles do not go through train_kd.py, its loss does not fall, or the cache changes what it does."""
    data = shared / "data"
    write_rows(tmp_path / "train.csv", rows_of(data / "cnn_dm_train.csv", 40))  # two epochs: the cache is read
    write_rows(tmp_path / "validation.csv", rows_of(data / "cnn_dm_val.csv", 4))
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256}
    arch = {"from_scratch": True, "tokenizer": str(data / "gpt2-tokenizer"),
            "generation_kwargs": {"max_generation_length": 10}}
    trainer = {"log_every": 1, "epochs": 2, "precision": "float32", "device": "cpu"}
    common = {
        "optimizer_kwargs": {"lm_lr": 1e-2},
        "dataset_kwargs": {"data_dir": str(tmp_path), "train_batch_size": 4, "max_length": 256},
    }
    teacher = {
        **common, "model_arch": {**arch, "lang_model": "gpt2", "architecture": shape},
        "trainer_kwargs": {**trainer, "output_dir": str(tmp_path / "teacher"), "metrics": [], "monitor_val": False},
    }
    run_script("train.py", "--config", str(write_config(tmp_path, **teacher)))
    student = {
        **common, "model_arch": {**arch, "student_lang_model": "gpt2", "architecture": {**shape, "n_layer": 1}},
        "trainer_kwargs": {**trainer, "output_dir": str(tmp_path / "student"), "save_predictions": True,
                           "teacher_ckpt_path": str(tmp_path / "teacher/model_checkpoints/last")},
        "distillation_kwargs": {"kl_div": "JS", "kd_weight": 0.9, "teacher_cache": {"kind": "hidden"}},
    }
    config = str(write_config(tmp_path, **student))
    run_script("train_kd.py", "--config", config)
    lines = [line for line in read_metrics(tmp_path / "student/metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert line["loss"] == pytest.approx(0.1 * line["cross_entropy"] + 0.9 * line["divergence"], rel=1e-5)
    for part in ("cross_entropy", "divergence"):
        assert statistics.fmean(line[part] for line in lines[-5:]) < 0.8 * lines[0][part]
    predictions = json.loads((tmp_path / "student/predictions/validation-step-20.json").read_text(encoding="utf-8"))
    assert len(predictions) == 4
    run_script("train_kd.py", "--config", config, "--set", f"trainer_kwargs.output_dir={tmp_path / 'live'}", "--set",
               "distillation_kwargs.teacher_cache=null")
    live, cached = ((tmp_path / name / "model_checkpoints/last/model.safetensors").read_bytes()
                    for name in ("live", "student"))
    assert live == cached


def test_real_pretrained_weights(tmp_path, shared, run_script):
    """Fault: fine-tuning harms a trained model instead of helping it (wrong shift, labels, scale or schedule)."""
    model = os.environ.get("REAL_MODEL")
    if not model:
        pytest.skip("REAL_MODEL does not name a folder with real weights (shared/real_model.py makes one)")
    write_rows(tmp_path / "validation.csv", rows_of(shared / "data/cnn_dm_val.csv", 32))
    write_rows(tmp_path / "train.csv", rows_of(shared / "data/cnn_dm_train.csv", 200))
    output = tmp_path / "run"
    sections = {
        "model_arch": {"lang_model": str(Path(model).resolve())},
        "trainer_kwargs": {"output_dir": str(output), "log_every": 1, "max_steps": 30, "metrics": [], "device": "cpu",
                           "gradient_accumulation_steps": 2},
        "optimizer_kwargs": {"lm_lr": 2e-5},
        "dataset_kwargs": {"data_dir": str(tmp_path), "train_dataset": "train.csv", "train_batch_size": 1,
                           "validation_dataset": "validation.csv", "max_length": 256},
    }
    config = str(write_config(tmp_path, **sections))
    run_script("train.py", "--config", config, "--set", f"trainer_kwargs.output_dir={tmp_path / 'before'}", "--set",
               "trainer_kwargs.max_steps=1", "--set", "optimizer_kwargs.lm_lr=1e-30")  # the weights as they are
    run_script("train.py", "--config", config)
    *_, before = read_metrics(tmp_path / "before/metrics.jsonl")
    *_, after = read_metrics(output / "metrics.jsonl")
    assert (after["split"], after["step"]) == ("validation", 30)
    print(f"validation loss {before['loss']:.4f} before, {after['loss']:.4f} after 30 steps")
    assert after["loss"] < before["loss"] < 4  # a trained model: ln 49152 = 10.8 would be none
