"""NaN and infinities put where they can come from in a training: rows, weights, gradients, outputs, files, numbers."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import utils.runs.run
import utils.training.step
from data.teacher_cache import ArrayShape, TeacherCache
from data.token_cache import TokenizedDataset
from tests.conftest import write_rows
from tests.small_runs import make_rows
from utils.files import write_json
from utils.runs.checkpoint import load_state
from utils.runs.seal import KEY, sealed
from utils.training.optimization import LRSchedule
from utils.training.trainer import Trainer

MARK = "^"  # a token whose embedding overflows in the first layer norm: finite itself, but NaN comes of it
HUGE = 3e38


def overflow_at_mark(folder: Path) -> None:
    """Gives the GPT-2 in `folder` an output head of its own and an embedding of MARK that is too large to compute
    with. Every loss of a row with MARK in its article is NaN, every other one what it is."""
    before = GPT2LMHeadModel.from_pretrained(folder)
    after = GPT2LMHeadModel(GPT2Config(**{**before.config.to_dict(), "tie_word_embeddings": False}))
    weights = before.state_dict()
    after.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()})
    with torch.no_grad():
        after.transformer.wte.weight[ord(MARK)] = HUGE
    after.save_pretrained(folder)


def write_marked(path: Path, count: int, marked: list[int], seed: int = 0) -> list[str]:
    """A CSV of `make_rows`, with MARK in the articles of some; ids of those."""
    rows = make_rows(count, seed)
    for index in marked:
        rows[index]["article"] = f"{MARK} {rows[index]['article']}"
    write_rows(path, rows)
    return [rows[index]["id"] for index in marked]


@contextlib.contextmanager
def watched() -> Iterator[list[Trainer]]:
    """The trainers that are made inside, so that weights and optimizer can be looked at after a run has stopped."""
    made: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    with mock.patch.object(utils.runs.run, "Trainer", Watched):
        yield made


@contextlib.contextmanager
def at_step(number: int, spoil: Callable[[Trainer], None]) -> Iterator[None]:
    """Calls `spoil(trainer)` before optimizer step `number`."""
    train_step = Trainer.train_step

    def spoilt(trainer, *arguments):
        if trainer.state.step + 1 == number:
            spoil(trainer)
        return train_step(trainer, *arguments)

    with mock.patch.object(Trainer, "train_step", spoilt):
        yield


def spoil_weight(trainer: Trainer, value: float = math.nan) -> None:
    """The last weight of the first layer norm."""
    with torch.no_grad():
        next(each for each in trainer.parameters if each.dim() == 1)[-1] = value


def spoil_moment(trainer: Trainer, name: str, value: float) -> None:
    """One value of a moment of the first weight."""
    trainer.optimizer.state[trainer.parameters[0]][name].view(-1)[0] = value


@contextlib.contextmanager
def gradient_at(numbers: set[int], value: float = math.nan) -> Iterator[None]:
    """One value of the gradient of those optimizer steps, counted from 1, before it is summed over processes."""
    sum_gradients, done = utils.training.step.sum_gradients, []

    def spoilt(parameters: list[nn.Parameter], place) -> None:
        done.append(1)
        if len(done) in numbers:
            parameters[0].grad.view(-1)[3] = value
        sum_gradients(parameters, place)

    with mock.patch.object(utils.training.step, "sum_gradients", spoilt):
        yield


@contextlib.contextmanager
def learning_rate_at(number: int, value: float) -> Iterator[None]:
    """The learning rate of optimizer step `number`."""
    learning_rate = LRSchedule.learning_rate

    def spoilt(schedule: LRSchedule, step: int) -> float:
        return value if step + 1 == number else learning_rate(schedule, step)

    with mock.patch.object(LRSchedule, "learning_rate", spoilt):
        yield


# -- files, with checksums that fit ------------------------------------------------------------------------------------


def spoil_file_of_model(folder: Path, name: str, index: tuple, value: float) -> None:
    """One value of a weight in a `save_pretrained` folder."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name][index] = value
    save_file(weights, path, {"format": "pt"})


def spoil_optimizer(checkpoint: Path, name: str, value: float) -> None:
    """One value of the optimizer's state in a checkpoint, as if it had been written so."""
    path = checkpoint / "trainer_state/optimizer.pt"
    state = load_state(checkpoint)[1]["optimizer"]
    state["state"][0][name].view(-1)[0] = value
    torch.save(state, path)
    manifest = checkpoint / "trainer_state/manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["trainer_state/optimizer.pt"] = described(path)
    content.pop(KEY, None)
    write_json(manifest, sealed(content))


def spoil_cached_row(folder: Path, table: TokenizedDataset, row: int, name: str, value: float) -> None:
    """One value of a row of a teacher's cache, with the row's checksum, as if the teacher had computed it."""
    arrays = json.loads((folder / "manifest.json").read_text())["arrays"]
    cache = TeacherCache(folder, table, {array: ArrayShape(*shape) for array, shape in arrays.items()})
    values = cache.read(np.array([row]))
    values[name].flat[0] = value
    cache._checks[row] = 0  # a row that is there is never written again
    cache.write(np.array([row]), values)


def spoil_cached_head(folder: Path, value: float) -> None:
    """One value of the head in a teacher's cache, and the manifest's checksum of it."""
    path = folder / "head.safetensors"
    tensors = load_file(path)
    tensors["weight"][2, 1] = value
    save_file(tensors, path)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["head.safetensors"] = described(path)["sha256"]
    manifest.write_text(json.dumps(content))


def described(path: Path) -> dict:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
