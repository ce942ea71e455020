"""Configs for the tests, and ways to load them."""

import json
from pathlib import Path

import pytest

from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError, load_config

# Written by hand from the list of keys that users already have, each with its example value.
USERS_CONFIG = {
    "_description": "mine",
    "model_arch": {
        "_description": ["free", {"text": None}],
        "lang_model": "gpt2-medium",
        "gpu_device_id": 7,
        "from_scratch": False,
        "architecture": {"n_layer": 2, "n_embd": 64, "resid_pdrop": 0.0, "scale_attn_weights": True},
        "tokenizer": None,
        "dropout": None,
        "generation_kwargs": {"max_generation_length": 80, "num_beams": 5, "early_stopping": True},
    },
    "trainer_kwargs": {
        "epochs": 3, "device": "cuda", "gradient_clipping": 1.0, "gradient_accumulation_steps": 96,
        "output_dir": "out", "load_from_checkpoint": True, "monitor_train": True, "monitor_val": True,
        "monitor_test": False, "first_val_epoch": 0, "metrics": ["rouge"], "save_predictions": True,
        "n_batch_ckpt_save": 5000, "ckpt_training_batch": 10000, "adaptive_loss_scaling": False,
        "loss_scaling_batch": 4096, "adaptive_loss_metric": "rougeL", "baseline_threshold": 0.11,
        "multi_gpu": True, "multi_gpu_ids": [1, 3, 4], "is_training": True, "use_cache": True,
        "seed": 1234, "precision": "auto", "compile": False, "log_every": 10, "max_steps": None, "keep_checkpoints": 2,
        "resume_from": None, "skip_nonfinite_steps": 3,
    },
    "optimizer_kwargs": {
        "type": "AdamW", "kwargs": {"weight_decay": 0.1, "amsgrad": True}, "lm_lr": 5e-5, "default_lr": 1e-4,
        "decay_all": False,
    },
    "lr_scheduler_kwargs": {
        "num_warmup_steps": -1, "max_warmup_steps": 500, "num_training_steps": -1,
        "increase_batch_size_on_plateau": True,
    },
    "callbacks_kwargs": {"kwargs": {"patience": 3, "mode": "max", "threshold": 0.001, "save_final_model": True}},
    "dataset_kwargs": {
        "data_dir": "data", "train_dataset": "train.csv", "validation_dataset": "validation.csv",
        "validation_subset": "subset.csv", "train_batch_size": 2, "val_batch_size": 4,
        "prompt_template": "{article}\nTL;DR:",
        "columns": {"id": "id", "article": "article", "highlights": "highlights"}, "on_bad_row": "error",
        "max_length": None, "tokens_per_batch": None, "cache_dir": None, "num_workers": 0,
    },
}

# Written by hand from the issue: all defaults.
DEFAULTS = {
    "model_arch": {
        "lang_model": "gpt2", "gpu_device_id": 0, "from_scratch": False, "architecture": {}, "tokenizer": None,
        "dropout": None, "pack_rows": True, "prune_last_block": True,
        "generation_kwargs": {"max_generation_length": 80, "num_beams": 1, "early_stopping": False},
    },
    "trainer_kwargs": {
        "epochs": 1, "device": "auto", "gradient_clipping": 1.0, "gradient_accumulation_steps": 1,
        "output_dir": "runs/fine_tune", "load_from_checkpoint": True, "resume_from": None, "monitor_train": False,
        "monitor_val": True, "monitor_test": False, "first_val_epoch": 0, "metrics": ["rouge"],
        "save_predictions": False, "n_batch_ckpt_save": None, "ckpt_training_batch": None,
        "adaptive_loss_scaling": False, "loss_scaling_batch": 1024, "adaptive_loss_metric": "rougeL",
        "baseline_threshold": 0.15, "multi_gpu": False, "multi_gpu_ids": [], "seed": 1234, "precision": "auto",
        "compile": False, "log_every": 10, "max_steps": None, "keep_checkpoints": 2, "skip_nonfinite_steps": 0,
    },
    "optimizer_kwargs": {"type": "AdamW", "kwargs": {}, "lm_lr": 5e-5, "default_lr": None, "decay_all": False},
    "lr_scheduler_kwargs": {
        "num_warmup_steps": -1, "max_warmup_steps": None, "num_training_steps": -1, "type": "linear",
        "min_lr_ratio": 0.0, "increase_batch_size_on_plateau": False,
    },
    "callbacks_kwargs": {
        "kwargs": {"patience": None, "mode": "min", "threshold": 0.0, "save_final_model": True, "metric": None}
    },
    "dataset_kwargs": {
        "data_dir": "data/cnn_dailymail", "train_dataset": "train.csv", "validation_dataset": "validation.csv",
        "validation_subset": None, "test_dataset": None, "train_batch_size": 1, "val_batch_size": 8,
        "prompt_template": "{article}\nTL;DR:",
        "columns": {"id": "id", "article": "article", "highlights": "highlights"}, "on_bad_row": "error",
        "max_length": None, "tokens_per_batch": None, "cache_dir": None, "num_workers": 0,
    },
}

# Written by hand: what differs from config.json, with the one key that has no default of use.
TEACHER = {"model_arch": {"teacher_lang_model": "gpt2-medium"}}
KD_ARCH = {
    "teacher_lang_model": "gpt2-medium", "student_lang_model": "gpt2", "teacher_gpu_device_id": 0,
    "student_gpu_device_id": 0, "from_scratch": False, "architecture": {}, "tokenizer": None, "dropout": None,
    "pack_rows": True, "prune_last_block": True,
    "generation_kwargs": {"max_generation_length": 80, "num_beams": 1, "early_stopping": False},
}
KD_TRAINER = {"output_dir": "runs/distill", "teacher_ckpt_path": None, "student_ckpt_path": None}
KD_KWARGS = {
    "method": "divergence", "kl_div": "forward", "temperature": 1.0, "kd_weight": 0.5, "beta": 0.5, "lambda": 0.1,
    "mu": 0.5, "chunk_size": 128, "teacher_cache": None, "on_policy_fraction": 0.0, "rollout": "mixed", "alpha": 0.2,
    "rollout_temperature": 1.0, "rollout_top_k": None, "rollout_top_p": None, "rollout_batch_size": None,
    "rollout_epochs": 1, "importance_weight": "token", "lm_weight": 0.5, "clip_epsilon": 0.2, "whiten": False,
    "penalty": False, "frequency_weight": 0.1, "diversity_weight": 0.1, "entropy_weight": 0.01, "entropy_floor": None,
    "student_init": None, "student_layers": None,
}
# Each off its default, and all of use together with method policy_gradient.
POLICY_KWARGS = {
    "alpha": 0.5, "rollout_temperature": 0.7, "rollout_top_k": 50, "rollout_top_p": 0.9, "rollout_batch_size": 4,
    "rollout_epochs": 2, "importance_weight": "sequence", "lm_weight": 0.3, "clip_epsilon": None, "whiten": True,
    "penalty": True, "frequency_weight": 0.2, "diversity_weight": 0, "entropy_weight": 0.5, "entropy_floor": 1.5,
}
def distillation(**values) -> dict:
    return {**TEACHER, "distillation_kwargs": values}


def load(folder: Path, content: dict | str, *overrides: str, model=FineTuneConfig):
    """Writes config.json (values, or text as it is) into the folder and loads it, as an instance of `model`."""
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_config(path, overrides, model)


def refusal(folder: Path, content: dict | str, *overrides: str, model=FineTuneConfig) -> list[str]:
    """As `load`, for what is refused: the lines of the error, with the file's name alone."""
    with pytest.raises(ConfigError) as error:
        load(folder, content, *overrides, model=model)
    return str(error.value).replace(f"{folder / 'config.json'}", "config.json").split("\n")
