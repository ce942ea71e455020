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


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    """A seed that NumPy refuses ends in its own message, after Python's generator was already seeded."""
    random.seed(5)
    with pytest.raises(ValueError, match=str(seed)):
        seed_everything(seed)
    assert random.random() == random.Random(5).random()


def test_round_trip_through_a_file(tmp_path):
    """The state is not complete (a Gaussian in store), or not loadable with weights_only (A20)."""
    seed_everything(7)
    draws()
    torch.save(random_state(), tmp_path / "random.pt")
    expected = draws()
    seed_everything(99)
    notices = set_random_state(torch.load(tmp_path / "random.pt", map_location="cpu", weights_only=True))
    assert draws() == expected and notices == []


def test_taking_the_state_draws_nothing():
    """Storing the state moves a generator, so that a run with more checkpoints is another run."""
    seed_everything(7)
    expected = draws()
    seed_everything(7)
    random_state()
    assert draws() == expected


def test_lists_instead_of_tuples():
    """A state whose tuples became lists on the way is refused."""
    seed_everything(7)
    state = random_state()
    expected = draws()
    version, internal, gauss = state["python"]
    set_random_state({**state, "python": [version, list(internal), gauss], "numpy": list(state["numpy"])})
    assert draws() == expected


@pytest.mark.parametrize("harm", ["missing", "short", "kind"])
def test_bad_state_changes_nothing(harm):
    """A damaged state sets half of the generators and then raises whatever the library raises."""
    seed_everything(7)
    state = random_state()
    if harm == "missing":
        del state["torch"]
    elif harm == "short":
        state["torch"] = state["torch"][:10]
    else:
        state["numpy"] = 5
    seed_everything(8)
    with pytest.raises(ValueError, match="random state not restored") as caught:
        set_random_state(state)
    assert "\n" not in str(caught.value)
    after = draws()
    seed_everything(8)
    assert draws() == after


def test_other_number_of_gpus(monkeypatch):
    """A run saved with three GPUs cannot be resumed on two; the states are sent to a GPU (lanl/hippynn#12)."""
    placed = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16, dtype=torch.uint8)] * 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: placed.update({device: state}))
    saved = [torch.full((16,), number, dtype=torch.uint8) for number in (1, 2, 3)]
    notices = set_random_state({**random_state(), "cuda": saved})
    assert {device: state[0].item() for device, state in placed.items()} == {0: 1, 1: 2}
    assert all(state.device.type == "cpu" for state in placed.values())
    assert len(notices) == 1 and "3 GPU(s), 2 here: 2 restored" in notices[0]
    assert set_random_state({**random_state(), "cuda": saved[:2]}) == []


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_generators():
    """The GPUs' generators are left out of the state or of the fork."""
    seed_everything(7)
    state = random_state()
    with forked_random_state():
        expected = torch.rand(4, device="cuda").tolist()
    assert torch.rand(4, device="cuda").tolist() == expected
    set_random_state(state)
    assert torch.rand(4, device="cuda").tolist() == expected
