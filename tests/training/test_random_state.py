"""All global generators are seeded, stored and put back: utils/training/random_state.py."""

import random

import numpy as np
import pytest
import torch

from utils.training.random_state import forked_random_state, random_state, seed_everything, set_random_state


@pytest.fixture(autouse=True)
def _generators_as_before():
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def draws() -> list:
    """Some of every generator; the odd number of Gaussians leaves one in store in Python and NumPy."""
    python = [random.random(), random.gauss(0, 1)]
    return [*python, *np.random.randn(3).tolist(), np.random.rand(), *torch.randn(5).tolist()]


def test_seed_reaches_every_generator():
    """A generator is forgotten by the seed, so that two runs of one seed differ."""
    seed_everything(1234)
    first = draws()
    seed_everything(1234)
    assert draws() == first
    seed_everything(1234)
    expected = [random.Random(1234).random(), np.random.RandomState(1234).rand(),
                torch.rand(1, generator=torch.Generator().manual_seed(1234)).item()]
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected


def test_round_trip_through_a_file(tmp_path):
    """The state is not complete (a Gaussian in store), or not loadable with weights_only (A20)."""
    seed_everything(7)
    draws()
    torch.save(random_state(), tmp_path / "random.pt")
    expected = draws()
    seed_everything(99)
    assert set_random_state(torch.load(tmp_path / "random.pt", map_location="cpu", weights_only=True))
    assert draws() == expected


def test_forked_state():
    """An evaluation that draws or seeds changes the training after it, also when it fails."""
    seed_everything(7)
    expected = draws()
    seed_everything(7)
    with pytest.raises(RuntimeError, match="failed"), forked_random_state():
        draws()
        seed_everything(1)
        raise RuntimeError("failed")
    assert draws() == expected
