"""How many weights a config.json asks for, told without memory for them, and how many there are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from model.language_model import ModelError
from model.torch_files import TorchFileError, load_torch_file, tensors_in

MOST_TENSORS = 10_000  # of a model: each part of it takes memory, even without its weights
SLACK = 10_000_000  # weights: 40 MB


class Amount(NamedTuple):
    weights: int
    tensors: int


class TooMany(Exception):
    """A model in the making is larger than it may be."""


def stored_in(files: list[Path]) -> Amount:
    """What weight files hold (safetensors or files of torch.save).

    Raises:
        ModelError: one holds more than tensors, or is damaged.
        OSError, SafetensorError: one cannot be read.
    """
    sizes: list[int] = []
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                sizes += [torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()]  # noqa: SIM118
            continue
        try:
            sizes += [tensor.numel() for tensor in tensors_in(load_torch_file(path, "meta"))]
        except TorchFileError as error:
            raise ModelError(f"{path}: its weights are not only tensors, or are damaged, and are not unpickled "
                             f"({error}): save them as safetensors") from error
    return Amount(sum(sizes), len(sizes))


def check_amount(name: str, config, stored: Amount | None) -> None:
    """Raises ModelError where a config asks for far more weights than its files hold, or than fit this machine.

    stored: what the files hold; None where the weights will be random. The model is built without memory for its
    weights, and no further than up to the first part too many.
    """
    most = Amount(machine_weights(), MOST_TENSORS)
    if stored is not None:
        most = Amount(min(stored.weights + stored.weights // 4 + SLACK, most.weights),
                      min(3 * stored.tensors + 1000, most.tensors))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), counted(most):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights = sum(parameter.numel() for parameter in model.parameters())
    except TooMany:
        weights = None
    if weights is None or weights > most.weights:
        asked = f"{weights:,} weights" if weights else f"more than {most.weights:,} weights or {most.tensors:,} tensors"
        there = f"its files hold {stored.weights:,} weights" if stored else "this machine has no memory for that"
        raise ModelError(f"{name}: its architecture asks for {asked}, and {there}: look at its config.json")


@contextmanager
def counted(most: Amount) -> Iterator[None]:
    """Raises TooMany as soon as modules made inside have more tensors or weights; tied ones count up to three times."""
    weights = tensors = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal weights, tensors
        if parameter is not None:
            weights, tensors = weights + parameter.numel(), tensors + 1
            if weights > 3 * most.weights or tensors > most.tensors:
                raise TooMany

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def machine_weights() -> int:
    """Weights in float32 that this machine has memory for."""
    if torch.get_default_device().type == "meta" or not hasattr(os, "sysconf"):
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
