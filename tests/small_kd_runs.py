"""Small distillation runs for the tests: a tiny teacher's checkpoint, a tinier student, and both driven in process."""

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

import train_kd
from data.prompts import DEFAULT_TEMPLATE
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.small_runs import make_rows, write_config

POSITIONS = 320  # every row of make_rows fits


def save_model(folder: Path, network: GPT2LMHeadModel, template: str | None = None) -> Path:
    """A model folder as save_pretrained writes it; with the prompt template of a run of train.py, where given."""
    if template is not None:
        network.config.prompt_template, network.config.prompt_max_length = template, POSITIONS
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_teacher(seed: int = 5, width: int = 32, layers: int = 2, **shape) -> GPT2LMHeadModel:
    """Random, but sure of itself: its distributions are far from uniform and differ from token to token."""
    return tiny_gpt2(seed=seed, width=width, layers=layers, std=0.3, **{"positions": POSITIONS, **shape})


def make_kd_project(folder: Path, rows: int = 12, dropout: float = 0.0, **distillation) -> dict:
    """`teacher` and `student` folders and CSVs in `folder`, and the config of a run on them (a dict to change)."""
    save_model(folder / "teacher", tiny_teacher(), DEFAULT_TEMPLATE)
    save_model(folder / "student", tiny_gpt2(seed=6, positions=POSITIONS, dropout=dropout))
    write_rows(folder / "train.csv", make_rows(rows))
    write_rows(folder / "validation.csv", make_rows(4, seed=1))
    return {
        "model_arch": {"student_lang_model": str(folder / "student"),
                       "generation_kwargs": {"max_generation_length": 8}},
        "trainer_kwargs": {"output_dir": str(folder / "run"), "metrics": [], "device": "cpu", "precision": "float32",
                           "log_every": 1, "teacher_ckpt_path": str(folder / "teacher")},
        "optimizer_kwargs": {"lm_lr": 0.01},
        "lr_scheduler_kwargs": {},
        "callbacks_kwargs": {"kwargs": {}},
        "dataset_kwargs": {"data_dir": str(folder), "train_batch_size": 2, "cache_dir": str(folder / "cache")},
        "distillation_kwargs": distillation,
    }


def run_kd(folder: Path, config: dict) -> int:
    """`train_kd.py --config`, in this process; the exit code."""
    return train_kd.main(["--config", str(write_config(folder, config))])


def randomised(network: GPT2LMHeadModel, seed: int = 0) -> GPT2LMHeadModel:
    """The network with biases and layer norms that are not the zeros and ones of a new one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


def random_rows(rows: list[tuple[int, list[int]]], seed: int = 0, columns: int = 0, pad: int = 256) -> tuple:
    """input_ids, attention_mask and labels [B, T] of random tokens, padded on the right.

    rows: (length, columns of it that are labels) of each; columns: padding beyond the longest row.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(length for length, _ in rows) + columns
    input_ids, labels = torch.full((len(rows), width), pad), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, (length, labelled) in enumerate(rows):
        input_ids[index, :length] = torch.randint(0, 256, (length,), generator=generator)
        mask[index, :length] = 1
        labels[index, labelled] = input_ids[index, labelled]
    return input_ids, mask, labels


def predicted_from(labels: torch.Tensor) -> list[tuple[int, int]]:
    """(row, column) of each hidden state that predicts a label, by hand: the one before it."""
    return [(row, column - 1) for row, values in enumerate(labels.tolist())
            for column, value in enumerate(values) if column > 0 and value != -100]
