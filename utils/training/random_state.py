"""One seed for every generator, and their state as values that a checkpoint can hold."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy's global generator and torch on every device; `seed` in [0, 2**32)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, object]:
    """State of all global generators: Python, NumPy (legacy), torch's CPU and, if there is CUDA, each GPU's.

    Holds only tuples, numbers, text and CPU tensors, so `torch.load(weights_only=True)` reads it back. Nothing is
    drawn.
    """
    name, key, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(key.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, object]) -> bool:
    """Restore what `random_state` gave; returns False if the number of GPUs has changed: only those on both sides are
    restored then."""
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for gpu, gpu_state in zip(range(gpus), state["cuda"], strict=False):
        torch.cuda.set_rng_state(gpu_state, gpu)
    return gpus == len(state["cuda"])


@contextlib.contextmanager
def forked_random_state() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the global generators (GPUs too) are afterwards as before."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
