"""Runs in which some rows give a loss of NaN."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import write_rows
from tests.small_runs import changed, make_project, make_rows

ROWS = 16  # 8 steps of 2 rows
MARK = "^"  # a token whose embedding overflows in the first layer norm: finite itself, but NaN comes of it


def overflow_at_mark(folder: Path) -> None:
    """Gives the GPT-2 in `folder` an output head of its own and an embedding of MARK that is too large to compute
    with. Every loss of a row with MARK in its article is NaN, every other one is as before."""
    before = GPT2LMHeadModel.from_pretrained(folder)
    after = GPT2LMHeadModel(GPT2Config(**{**before.config.to_dict(), "tie_word_embeddings": False}))
    values = before.state_dict()
    after.load_state_dict({**values, "lm_head.weight": values["transformer.wte.weight"].clone()})
    with torch.no_grad():
        after.transformer.wte.weight[ord(MARK)] = 3e38
    after.save_pretrained(folder)


def write_marked(path: Path, count: int, marked: list[int], seed: int = 0) -> list[str]:
    """A CSV of `make_rows`, with MARK in the articles of some; ids of those."""
    rows = make_rows(count, seed)
    for index in marked:
        rows[index]["article"] = f"{MARK} {rows[index]['article']}"
    write_rows(path, rows)
    return [rows[index]["id"] for index in marked]


def fine_tuning(folder: Path, marked: list[int] = (), **trainer_kwargs) -> dict:
    """A run of batches of one row with a checkpoint after each step, of a model that cannot compute marked rows."""
    config = make_project(folder, rows=ROWS)
    overflow_at_mark(folder / "model")
    write_marked(folder / "train.csv", ROWS, list(marked))
    return changed(config, dataset_kwargs={"train_batch_size": 1}, trainer_kwargs={
        "gradient_accumulation_steps": 2, "n_batch_ckpt_save": 1, "keep_checkpoints": 99, **trainer_kwargs})
