"""Real articles, GPT-2's vocabulary and real pretrained weights, through the scripts as users run them."""

import csv
import json
import os
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_rows
from utils.runs.run_log import read_metrics

pytestmark = pytest.mark.slow


def run_script(name: str, *arguments: str) -> str:
    """Run a script to its end and return what it says on stderr."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, name, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def write_config(tmp_path: Path, **sections) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def test_small_gpt2_from_scratch(tmp_path, shared):
    """Fault: real articles do not go through train, resume and validate, or the loss does not fall."""
    data, output = shared / "data", tmp_path / "run"
    config = write_config(
        tmp_path,
        model_arch={"lang_model": "gpt2", "from_scratch": True, "tokenizer": str(data / "gpt2-tokenizer"),
                    "architecture": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256}},
        trainer_kwargs={"output_dir": str(output), "log_every": 1, "monitor_val": False, "precision": "float32",
                        "device": "cpu"},
        optimizer_kwargs={"lm_lr": 2e-3},
        lr_scheduler_kwargs={"num_warmup_steps": 10, "num_training_steps": 100},
        dataset_kwargs={"data_dir": str(data), "train_dataset": "cnn_dm_train.csv", "train_batch_size": 4,
                        "max_length": 256},
    )
    run_script("train.py", "--config", str(config), "--set", "trainer_kwargs.max_steps=50")
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl")] == list(range(1, 51))
    said = run_script("train.py", "--config", str(config), "--set", "trainer_kwargs.max_steps=100")
    assert "resuming from" in said and "(optimizer step 50)" in said
    assert "tokenising" not in said.split("resum")[0] and "step 50" in said

    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 101))  # continued: no step twice, none missing
    assert [line["learning_rate"] for line in lines][48:52] == pytest.approx(
        [2e-3 * (100 - done) / 90 for done in range(48, 52)])  # one schedule, not begun anew
    first, last = lines[0]["loss"], statistics.fmean(line["loss"] for line in lines[-10:])
    assert 10 < first < 12  # ln 50257 = 10.82: every token alike
    assert last < first - 2

    predictions_dir = tmp_path / "predictions"
    run_script("validate_model.py", "--csv_path", str(data / "cnn_dm_test.csv"), "--model_path",
               str(output / "model_checkpoints" / "last"), "--output_dir", str(predictions_dir),
               "--max_generation_length", "20", "--batch_size", "50")
    predictions = json.loads((predictions_dir / "predictions.json").read_text(encoding="utf-8"))
    with (data / "cnn_dm_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 500
    assert [record["id"] for record in predictions] == [row["id"] for row in rows]
    assert [record["target_highlight"] for record in predictions] == [row["highlights"] for row in rows]
    scores = json.loads((predictions_dir / "scores.json").read_text(encoding="utf-8"))
    assert (scores["rows"], scores["prompt_max_length"]) == (500, 256)


def test_small_pair_from_scratch_is_distilled(tmp_path, shared):
    """Fault: real articles do not go through train_kd.py, its loss does not fall, or the cache changes what it does."""
    data = shared / "data"
    with (data / "cnn_dm_train.csv").open(encoding="utf-8", newline="") as file:
        write_rows(tmp_path / "train.csv", list(islice(csv.DictReader(file), 120)))  # two epochs: the cache is read
    with (data / "cnn_dm_val.csv").open(encoding="utf-8", newline="") as file:
        write_rows(tmp_path / "validation.csv", list(islice(csv.DictReader(file), 8)))
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256}
    arch = {"from_scratch": True, "tokenizer": str(data / "gpt2-tokenizer"),
            "generation_kwargs": {"max_generation_length": 20}}
    trainer = {"log_every": 1, "max_steps": 50, "epochs": 2, "precision": "float32", "device": "cpu"}
    common = {
        "optimizer_kwargs": {"lm_lr": 2e-3},
        "dataset_kwargs": {"data_dir": str(tmp_path), "train_batch_size": 4, "max_length": 256},
    }
    teacher = {
        **common, "model_arch": {**arch, "lang_model": "gpt2", "architecture": shape},
        "trainer_kwargs": {**trainer, "output_dir": str(tmp_path / "teacher"), "metrics": []},
    }
    run_script("train.py", "--config", str(write_config(tmp_path, **teacher)))
    student = {
        **common, "model_arch": {**arch, "student_lang_model": "gpt2", "architecture": {**shape, "n_layer": 1}},
        "trainer_kwargs": {**trainer, "output_dir": str(tmp_path / "student"), "save_predictions": True,
                           "teacher_ckpt_path": str(tmp_path / "teacher/model_checkpoints/last")},
        "distillation_kwargs": {"kl_div": "JS", "kd_weight": 0.9, "teacher_cache": {"kind": "hidden"}},
    }
    config = str(write_config(tmp_path, **student))
    said = run_script("train_kd.py", "--config", config)
    assert "0.0" in said.split("teacher cache: 120 rows")[1].split(" GB")[0]  # told before it is written
    lines = [line for line in read_metrics(tmp_path / "student/metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 51))
    for line in lines:
        assert line["loss"] == pytest.approx(0.1 * line["cross_entropy"] + 0.9 * line["divergence"], rel=1e-5)
    for part in ("cross_entropy", "divergence"):
        assert statistics.fmean(line[part] for line in lines[-10:]) < 0.8 * lines[0][part]
    predictions = json.loads((tmp_path / "student/predictions/validation-step-50.json").read_text(encoding="utf-8"))
    assert len(predictions) == 8
    run_script("train_kd.py", "--config", config, "--set", f"trainer_kwargs.output_dir={tmp_path / 'live'}", "--set",
               "distillation_kwargs.teacher_cache=null")
    live, cached = ((tmp_path / name / "model_checkpoints/last/model.safetensors").read_bytes()
                    for name in ("live", "student"))
    assert live == cached


def test_real_pretrained_weights(tmp_path, shared):
    """Fault: fine-tuning harms a trained model instead of helping it (wrong shift, labels, scale or schedule)."""
    model = os.environ.get("REAL_MODEL")
    if not model:
        pytest.skip("REAL_MODEL does not name a folder with real weights (shared/real_model.py makes one)")
    with (shared / "data" / "cnn_dm_val.csv").open(encoding="utf-8", newline="") as file:
        write_rows(tmp_path / "validation.csv", list(islice(csv.DictReader(file), 32)))
    with (shared / "data" / "cnn_dm_train.csv").open(encoding="utf-8", newline="") as file:
        write_rows(tmp_path / "train.csv", list(islice(csv.DictReader(file), 200)))
    output = tmp_path / "run"
    sections = {
        "model_arch": {"lang_model": str(Path(model).resolve())},
        "trainer_kwargs": {"output_dir": str(output), "log_every": 1, "max_steps": 30, "metrics": [], "device": "cpu",
                           "gradient_accumulation_steps": 2},
        "optimizer_kwargs": {"lm_lr": 2e-5},
        "dataset_kwargs": {"data_dir": str(tmp_path), "train_dataset": "train.csv", "train_batch_size": 1,
                           "validation_dataset": "validation.csv", "max_length": 256},
    }
    before = loss_before(sections, tmp_path / "before")
    run_script("train.py", "--config", str(write_config(tmp_path, **sections)))
    *_, line = read_metrics(output / "metrics.jsonl")
    assert (line["split"], line["step"]) == ("validation", 30)
    print(f"validation loss {before:.4f} before, {line['loss']:.4f} after 30 steps")
    assert line["loss"] < before
    assert before < 4  # a trained model: ln 49152 = 10.8 would be none


def loss_before(sections: dict, output: Path) -> float:
    """Validation loss of the weights as they are, on the same rows in the same precision."""
    from model.fine_tuning import FineTuning
    from model.loading import load_language_model
    from utils.config.fine_tune import FineTuneConfig
    from utils.evaluation.evaluate import measure_loss
    from utils.evaluation.splits import Tables, make_prompt_format
    from utils.runs.run_log import RunLog
    from utils.training.distributed import init_distributed

    config = FineTuneConfig.model_validate(
        {**sections, "trainer_kwargs": {**sections["trainer_kwargs"], "output_dir": str(output)}}
    )
    language_model = load_language_model(config.model_arch.lang_model)
    place = init_distributed("cpu", None, "auto")
    prompt_format = make_prompt_format(config, language_model)
    table = Tables(config, prompt_format, place, RunLog(output)).open("validation.csv")
    return measure_loss(FineTuning(language_model), table, config.dataset_kwargs.val_batch_size, place)["loss"]
