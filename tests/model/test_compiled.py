"""trainer_kwargs.compile: what lies between GPT-2's attentions is compiled; slow, since compiling is."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from model.language_model import LanguageModel
from tests.conftest import byte_tokenizer
from tests.model.test_packed_forward import BATCHES, network_of, relative
from tests.small_kd_runs import make_kd_project, random_rows, run_kd
from tests.small_runs import changed, largest_difference, make_project, run, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None, reason="no C++ compiler here"),
]


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def states_and_gradients(network, batch, compiled: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    language_model = LanguageModel(copy.deepcopy(network), byte_tokenizer())
    if compiled:
        language_model.compile_forward()
    hidden, _ = language_model.label_hidden(*batch)
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return hidden.detach(), [each.grad for each in language_model.model.parameters() if each.grad is not None]


def test_compiled_blocks_equal_those_that_are_not():
    """Fault: a weight, norm or residual of another block is compiled in, or a gradient is lost."""
    network = network_of(layers=4).double()
    counters.clear()
    for rows in ("different lengths", "labels in the middle", "one row"):
        batch = random_rows(BATCHES[rows], columns=2)
        (plain, plain_gradients), (found, gradients) = (states_and_gradients(network, batch, each)
                                                        for each in (False, True))
        assert relative(found, plain) <= 1e-10
        assert len(gradients) == len(plain_gradients)
        assert all(relative(ours, theirs) <= 1e-9 or theirs.abs().max() < 1e-10
                   for ours, theirs in zip(gradients, plain_gradients, strict=True))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # not one for each of three blocks and three lengths


def test_runs_with_compile(tmp_path):
    """Fault: the key changes what is trained, or has no effect."""
    config = changed(make_project(tmp_path, rows=6, layers=3), trainer_kwargs={"precision": "float32"})
    made = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        counters.clear()
        options = {"output_dir": str(tmp_path / name), "compile": compiled}
        assert run(tmp_path, changed(config, trainer_kwargs=options)) == 0
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        made[name] = weights(tmp_path / name / "model_checkpoints/last")
    assert largest_difference(made["plain"], made["compiled"]) < 1e-5
    assert largest_difference(made["plain"], weights(tmp_path / "model")) > 1e-4


def test_distillation_with_compile(tmp_path):
    """Fault: the teacher, which alone has two blocks here, is not compiled, or gives other outputs then."""
    config = make_kd_project(tmp_path, rows=6)
    for name, compiled in (("plain", False), ("compiled", True)):
        counters.clear()
        options = {"output_dir": str(tmp_path / name), "compile": compiled}
        assert run_kd(tmp_path, changed(config, trainer_kwargs=options)) == 0
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    folders = [tmp_path / name / "model_checkpoints/last" for name in ("plain", "compiled")]
    assert largest_difference(*map(weights, folders)) < 1e-5
