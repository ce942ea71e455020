"""The valid runs that mutations start from: three scripts, tiny models, a few rows, one or two steps.

Each runs in a folder of its own, in which all names of the config are relative: `model`, `teacher`, `student`,
`legacy.pt`, `data/*.csv`, and an earlier finished run in `run`.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import torch

from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import byte_tokenizer, tiny_gpt2
from tests.small_runs import WORDS, changed

POSITIONS = 96
ROWS = 4
SCRIPTS = ("train.py", "train_kd.py", "validate_model.py")
COLUMNS = ("id", "article", "highlights", "category", "facts")
CONFIG_FILE = "config.json"


class Case(NamedTuple):
    """script: its name. config: of its --config file; None where flags say all. arguments: the others."""

    script: str
    config: dict | None
    arguments: tuple[str, ...] = ()


def write_project(folder: Path) -> None:
    """Models and CSVs that every case uses."""
    for name, seed, width, layers, template in (
        ("model", 1, 8, 1, DEFAULT_TEMPLATE), ("student", 2, 8, 1, None), ("teacher", 3, 16, 2, DEFAULT_TEMPLATE),
    ):
        network = tiny_gpt2(seed=seed, width=width, layers=layers, positions=POSITIONS, std=0.2)
        if template is not None:
            network.config.prompt_template, network.config.prompt_max_length = template, POSITIONS
        network.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        if name == "teacher":
            torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, folder / "legacy.pt")
    (folder / "data").mkdir()
    for name, rows in (("train", ROWS), ("validation", 2), ("test", 2), ("subset", 1)):
        write_csv(folder / "data" / f"{name}.csv", rows)


def write_csv(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in range(rows):
            words = WORDS[row:] + WORDS[:row]
            article, highlights = " ".join(words[: 3 + row]), f"{words[0]}, café"
            writer.writerow((f"{path.stem}-{row}", article, highlights, "news", f'["{words[0]}"]'))


def sections(**changes: dict) -> dict:
    """A config of train.py for the project, with some keys of some sections changed."""
    config = {
        "_description": "a small run",
        "model_arch": {"lang_model": "model", "generation_kwargs": {"max_generation_length": 4}},
        "trainer_kwargs": {"output_dir": "run", "metrics": [], "device": "cpu", "precision": "float32", "epochs": 1,
                           "max_steps": 2, "log_every": 1, "keep_checkpoints": 1},
        "optimizer_kwargs": {"type": "AdamW", "lm_lr": 0.01, "kwargs": {"weight_decay": 0.1}},
        "lr_scheduler_kwargs": {"num_warmup_steps": 1},
        "callbacks_kwargs": {"kwargs": {"mode": "min"}},
        "dataset_kwargs": {"data_dir": "data", "train_dataset": "train.csv", "validation_dataset": "validation.csv",
                           "train_batch_size": 2, "val_batch_size": 2, "cache_dir": "cache"},
    }
    return changed(config, **changes)


def kd_sections(distillation: dict, **trainer) -> dict:
    """A config of train_kd.py for the project."""
    config = sections(trainer_kwargs={"teacher_ckpt_path": "teacher", "max_steps": 1, **trainer})
    arch = {"student_lang_model": "student", "generation_kwargs": {"max_generation_length": 4}}
    return {**config, "model_arch": arch, "distillation_kwargs": distillation}


VALIDATE = {"csv_path": "data/test.csv", "model_path": "model", "output_dir": "run", "max_generation_length": 4,
            "batch_size": 2, "precision": "float32", "device_id": -1}
MEASURED = {
    "trainer_kwargs": {"metrics": ["rouge"], "save_predictions": True, "monitor_train": True, "monitor_test": True,
                       "n_batch_ckpt_save": 1, "adaptive_loss_scaling": True, "loss_scaling_batch": 1},
    "callbacks_kwargs": {"kwargs": {"mode": "max", "patience": 1}},
    "dataset_kwargs": {"test_dataset": "test.csv", "validation_subset": "subset.csv", "on_bad_row": "skip",
                       "columns": {"id": "id", "article": "article"}},
}
PENALTIES = {"method": "policy_gradient", "rollout_batch_size": 2, "penalty": True, "frequency_weight": 0.2}
CASES = {
    "fine-tuning": Case("train.py", sections()),
    "fine-tuning, all measured": Case("train.py", sections(**MEASURED)),
    "from scratch": Case("train.py", sections(model_arch={"from_scratch": True, "architecture": {"n_layer": 1},
                                                          "tokenizer": "model", "dropout": 0.1})),
    "divergence": Case("train_kd.py", kd_sections({"kl_div": "generalized_js", "beta": 0.3, "chunk_size": 8})),
    "hidden cache": Case("train_kd.py", kd_sections({"teacher_cache": {"kind": "hidden", "dir": "cache"}})),
    "top-k cache": Case("train_kd.py", kd_sections({"teacher_cache": {"kind": "top_k", "top_k": 5}, "kl_div": "JS"})),
    "on-policy": Case("train_kd.py", kd_sections({"on_policy_fraction": 1.0, "rollout_temperature": 0.9})),
    "policy gradient": Case("train_kd.py", kd_sections(PENALTIES)),
    "validation by flags": Case("validate_model.py", None,
                                tuple(f"--{name}={value}" for name, value in VALIDATE.items())),
    "validation by file": Case("validate_model.py", {**VALIDATE, "num_beams": 2, "on_bad_row": "skip"}),
    "validation of legacy weights": Case("validate_model.py", {**VALIDATE, "model_path": "legacy.pt",
                                                               "model_name": "teacher"}),
    "lead-3": Case("validate_model.py", {**VALIDATE, "model_path": "lead-3", "columns": {"id": "id"}}),
}
# Changes of several keys at a time that are valid together.
TOGETHER = [
    {"trainer_kwargs": {"load_from_checkpoint": False}},
    {"trainer_kwargs": {"epochs": 2, "max_steps": 3}},
    {"trainer_kwargs": {"load_from_checkpoint": False, "save_predictions": True, "metrics": ["rouge"]}},
    {"trainer_kwargs": {"resume_from": "run/model_checkpoints/last", "output_dir": "other", "max_steps": 3,
                        "epochs": 2}},
    {"trainer_kwargs": {"monitor_val": False}, "dataset_kwargs": {"validation_dataset": None}},
    {"trainer_kwargs": {"gradient_accumulation_steps": 2, "gradient_clipping": None}},
    {"trainer_kwargs": {"metrics": ["rouge"]}, "callbacks_kwargs": {"kwargs": {"mode": "max", "metric": "rouge2"}}},
    {"trainer_kwargs": {"metrics": ["rouge"]},
     "model_arch": {"generation_kwargs": {"num_beams": 2, "early_stopping": True}}},
    {"lr_scheduler_kwargs": {"type": "cosine", "num_warmup_steps": -1, "min_lr_ratio": 1.0}},
    {"optimizer_kwargs": {"type": "SGD", "kwargs": {"momentum": 0.9}}},
    {"optimizer_kwargs": {"type": "Adafactor", "kwargs": {}}},
    {"optimizer_kwargs": {"type": "Muon", "kwargs": {}}},
    {"optimizer_kwargs": {"kwargs": {"capturable": True}}},
    {"optimizer_kwargs": {"kwargs": {"betas": [0.9, 0.9, 0.9]}}},
    {"dataset_kwargs": {"tokens_per_batch": 50, "max_length": 60}},
    {"dataset_kwargs": {"columns": {"id": None, "highlights": "category"}}},
    {"dataset_kwargs": {"num_workers": 1, "on_bad_row": "skip"}},
    {"distillation_kwargs": {"method": "policy_gradient", "rollout": "labels", "whiten": True}},
    {"distillation_kwargs": {"method": "policy_gradient", "importance_weight": "sequence", "rollout_epochs": 3}},
    {"distillation_kwargs": {"kl_div": "skew_reverse", "lambda": 0.9, "temperature": 1000}},
    {"distillation_kwargs": {"student_init": "teacher_layers", "student_layers": [1]}},
    {"trainer_kwargs": {"student_ckpt_path": "model"}},
    {"trainer_kwargs": {"teacher_ckpt_path": "legacy.pt"}, "model_arch": {"teacher_lang_model": "teacher"}},
    {"trainer_kwargs": {"precision": "bfloat16"}},
]
