"""One seed for every generator, and their state as values that a checkpoint can hold."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy's global generator and torch on every device; `seed` in [0, 2**32) or ValueError."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: choose a whole number from 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, object]:
    """State of all global generators: Python, NumPy (legacy), torch's CPU and, where there is CUDA, each GPU's.

    Holds only tuples, numbers, text and CPU tensors, so `torch.load(weights_only=True)` reads it back. Nothing is
    drawn.
    """
    name, key, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(key.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, object]) -> list[str]:
    """Put back what `random_state` gave; returns notices (one line each) if the number of GPUs has changed.

    Generators of GPUs present on both sides are restored; the others keep their own state.
    Raises ValueError, without having changed anything, if `state` is something else.
    """
    before = random_state()
    try:
        _set(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        _set(before)
        raise ValueError(f"random state not restored, unrecognised format ({error!r}): start a new run") from error
    saved, present = len(state["cuda"]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved == present:
        return []
    return [
        f"random state: saved with {saved} GPU(s), {present} here: {min(saved, present)} restored; "
        "the run continues, but dropout will differ"
    ]


@contextlib.contextmanager
def forked_random_state() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the global generators (GPUs too) are afterwards as before."""
    before = random_state()
    try:
        yield
    finally:
        _set(before)


def _set(state: dict[str, object]) -> None:
    version, internal, gauss_next = state["python"]
    name, key, position, has_gauss, gauss = state["numpy"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state((name, key.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, cuda_state in zip(range(devices), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)
