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
from utils.run_log import read_metrics

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
    from utils.config import FineTuneConfig
    from utils.datasets import Tables, make_prompt_format
    from utils.devices import find_place
    from utils.evaluation import measure_loss
    from utils.run_log import RunLog

    config = FineTuneConfig.model_validate(
        {**sections, "trainer_kwargs": {**sections["trainer_kwargs"], "output_dir": str(output)}}
    )
    language_model = load_language_model(config.model_arch.lang_model)
    place = find_place("cpu", None, "auto")
    prompt_format = make_prompt_format(config, language_model)
    table = Tables(config, prompt_format, place, RunLog(output)).open("validation.csv")
    return measure_loss(FineTuning(language_model), table, config.dataset_kwargs.val_batch_size, place)["loss"]
