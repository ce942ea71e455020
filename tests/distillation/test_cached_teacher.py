"""Runs with the teacher's outputs on disk train what runs without train: utils/distillation/cached_teacher.py."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.prompts import DEFAULT_TEMPLATE, PromptFormat
from data.tokenized import open_token_table
from model.language_model import LanguageModel
from model.teacher import Teacher
from tests.conftest import END, byte_tokenizer, write_rows
from tests.small_kd_runs import make_kd_project, run_kd, save_model, tiny_teacher
from tests.small_runs import assert_equal_weights, changed, largest_difference, make_rows, metrics, weights
from utils.config.distill import DistillationKwargs
from utils.distillation.cached_teacher import CachedTeacher
from utils.runs import build
from utils.training.distributed import DistributedContext

HIDDEN = {"kind": "hidden"}
LABELS = sum(len(row["highlights"]) + 2 for row in make_rows(11))


@pytest.fixture
def project(tmp_path) -> dict:
    """An epoch of steps of up to 2 micro-batches, with dropout, on rows that do not fill the last step."""
    return changed(make_kd_project(tmp_path, rows=11, dropout=0.1), trainer_kwargs={"gradient_accumulation_steps": 2})


@pytest.fixture
def loads(monkeypatch) -> list:
    """Grows by one whenever the teacher's weights are loaded."""
    found, load = [], build.load_teacher

    def recorded(*arguments):
        found.append(1)
        return load(*arguments)

    monkeypatch.setattr(build, "load_teacher", recorded)
    return found


def distil(project: dict, name: str, cache: dict | None = None, **sections: dict) -> dict[str, torch.Tensor]:
    """The student's weights after a run in folder `name`."""
    folder = Path(project["dataset_kwargs"]["data_dir"])
    config = changed(changed(project, distillation_kwargs={"teacher_cache": cache}), **sections)
    config = changed(config, trainer_kwargs={"output_dir": str(folder / name)})
    assert run_kd(folder, config) == 0
    return weights(folder / name / "model_checkpoints/last")


def caches(folder: Path) -> dict[str, Path]:
    """The folder of each table's cache, by the CSV's name."""
    return {path.name.split("-")[0]: path for path in folder.iterdir()}


def logged(folder: Path, key: str) -> list[float]:
    return [line[key] for line in (*metrics(folder), *metrics(folder, "validation"))]


# -- equal to no cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 4, "ckpt_training_batch": 3}], ids=["whole", "part"])
def test_hidden_states_are_exact(tmp_path, project, loads, monkeypatch, options):
    """Fault: states of another row or another precision, or computed again in each epoch."""
    plain = distil(project, "plain", trainer_kwargs=options)
    computed, hidden = [], Teacher.hidden

    def recorded(self, *arguments):
        computed.append(len(arguments[0]))
        return hidden(self, *arguments)

    monkeypatch.setattr(Teacher, "hidden", recorded)
    assert largest_difference(plain, distil(project, "stored", HIDDEN, trainer_kwargs=options)) < 1e-5
    assert logged(tmp_path / "stored", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"), rel=1e-5)
    assert sum(computed) == 11 + 4 and len(loads) == 2
    found = caches(tmp_path / "stored/teacher_cache")
    assert found.keys() == {"train", "validation"}
    assert (found["train"] / "hidden.bin").stat().st_size == LABELS * 32 * 4


def test_a_second_run_needs_no_teacher(tmp_path, project, monkeypatch):
    """Fault: the teacher's weights are loaded although all its outputs are on disk, or the filling changes dropout."""
    first = distil(project, "first", HIDDEN)
    shared = {**HIDDEN, "dir": str(tmp_path / "first/teacher_cache")}
    before = {path: path.read_bytes() for path in (tmp_path / "first/teacher_cache").rglob("*.*")}

    def fail(*arguments):
        raise AssertionError("loaded")

    monkeypatch.setattr(build, "load_teacher", fail)
    assert_equal_weights(first, distil(project, "second", shared))
    # Stored states serve any temperature and divergence.
    assert largest_difference(first, distil(
        project, "third", shared, distillation_kwargs={"teacher_cache": shared, "kl_div": "JS", "temperature": 2.0}
    )) > 1e-4
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("run", "dtype", "size"), [("bfloat16", "auto", 2), ("float32", "bfloat16", 2)])
def test_bfloat16_is_near(tmp_path, project, run, dtype, size):
    """Fault: bfloat16 stores other bits than the number's, is not used, or its head is of another type."""
    precise = {"trainer_kwargs": {"precision": run}}
    plain, stored = (distil(project, name, cache, **precise)
                     for name, cache in (("plain", None), ("stored", {**HIDDEN, "dtype": dtype})))
    assert largest_difference(plain, stored) < 0.03
    ours, theirs = (logged(tmp_path / name, "divergence") for name in ("stored", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-2)
    folder = tmp_path / "stored/teacher_cache"
    values = np.fromfile(caches(folder)["train"] / "hidden.bin", "uint16")
    assert values.nbytes == LABELS * 32 * size
    states = torch.from_numpy(values).view(torch.bfloat16).float().unflatten(0, (-1, 32))
    # After the final layer norm of a new model: mean 0, variance 1.
    torch.testing.assert_close(states.var(-1, unbiased=False), torch.ones(len(states)), rtol=0.02, atol=0)


@pytest.mark.parametrize(("precision", "temperature", "key", "tolerance"), [
    ("float32", 2.0, "loss", 1e-4), ("bfloat16", 1.0, "divergence", 0.01),
])
def test_all_tokens_are_nearly_exact(tmp_path, project, precision, temperature, key, tolerance):
    """Fault: log-probabilities at another temperature or of other ids; a rest that is not the rest."""
    kwargs = {"temperature": temperature}
    project = changed(project, trainer_kwargs={"precision": precision}, distillation_kwargs=kwargs)
    plain = distil(project, "plain")
    for k in (256, 5000):  # the vocabulary has 257 tokens
        top = distil(project, f"top-{k}", {"kind": "top_k", "top_k": k})
        assert precision == "bfloat16" or largest_difference(plain, top) < 2e-4
        assert logged(tmp_path / f"top-{k}", key) == pytest.approx(logged(tmp_path / "plain", key), rel=tolerance)


def test_a_few_tokens_are_a_lower_bound(tmp_path, project):
    """Fault: top_k keeps the worst tokens, as many as the vocabulary, or more divergence than there is."""
    still = {"optimizer_kwargs": {"lm_lr": 1e-12}}  # the same student at each step
    distil(project, "plain", **still)
    distil(project, "top", {"kind": "top_k", "top_k": 10}, **still)
    ours, theirs = (logged(tmp_path / name, "divergence") for name in ("top", "plain"))
    assert len(ours) == len(theirs) == 4
    for low, high in zip(ours, theirs, strict=True):
        assert 0.3 * high < low < high
    folder = caches(tmp_path / "top/teacher_cache")["train"]
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    assert sizes == {"ids.bin": LABELS * 10 * 2, "log_probs.bin": LABELS * 10 * 4, "log_rest.bin": LABELS * 4}
    mass = np.fromfile(folder / "log_probs.bin", "float32").reshape(-1, 10)
    rest = np.fromfile(folder / "log_rest.bin", "float32")
    np.testing.assert_allclose(np.exp(mass).sum(1) + np.exp(rest), 1, rtol=1e-5)
    assert (np.diff(mass, axis=1) <= 0).all()


# -- kills -------------------------------------------------------------------------------------------------------


class CountingTeacher(Teacher):
    """Counts the rows it computes, and kills its process at the call `die_at`."""

    def __init__(self, die_at: int = -1):
        super().__init__(LanguageModel(tiny_teacher(width=16), byte_tokenizer()))
        self.die_at, self.calls, self.rows = die_at, 0, 0

    def hidden(self, input_ids, *others):
        self.calls, self.rows = self.calls + 1, self.rows + len(input_ids)
        if self.calls == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().hidden(input_ids, *others)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_killed_fill_goes_on(tmp_path, one_thread, kind):
    """Fault: after a kill all rows are computed again, or some are taken for stored that are zeros."""
    rows = [{"id": str(number), "article": "news" * (1 + number % 5), "highlights": "x" * (1 + number % 7)}
            for number in range(1, 701)]
    table = open_token_table(write_rows(tmp_path / "rows.csv", rows), PromptFormat(byte_tokenizer()), tmp_path)
    options = DistillationKwargs.model_validate({"teacher_cache": {"kind": kind, "top_k": 7}})

    def fill(folder: str, teacher: Teacher) -> CachedTeacher:
        context = DistributedContext(torch.device("cpu"))
        cached = CachedTeacher(lambda: teacher, "x", 16, 257, options, tmp_path / folder, context, print)
        cached.prepare([table], 64, None, END)
        return cached

    def target():
        fill("killed", CountingTeacher(die_at=10))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    whole, rest = CountingTeacher(), CountingTeacher()
    fill("whole", whole)
    assert fill("killed", rest).is_complete(table)
    assert whole.rows == 700 and 0 < rest.rows < 700 - 256 + 1
    for path in sorted((tmp_path / "whole").glob("*/*.bin")):
        (other,) = (tmp_path / "killed").glob(f"*/{path.name}")
        assert path.read_bytes() == other.read_bytes()


# -- stale and damaged -------------------------------------------------------------------------------------------


def other_body(folder: Path) -> None:
    save_model(folder / "teacher", tiny_teacher(seed=9), DEFAULT_TEMPLATE)


def other_norm(folder: Path) -> None:
    network = tiny_teacher()
    network.transformer.ln_f.bias.data += 0.5
    save_model(folder / "teacher", network, DEFAULT_TEMPLATE)


@pytest.mark.parametrize("change", [other_body, other_norm])
def test_another_teacher_finds_nothing(tmp_path, project, loads, change):
    """Fault: outputs of a teacher that was trained since then, or of another head, are taken for the new one's."""
    cache = {**HIDDEN, "dir": str(tmp_path / "shared")}
    first = distil(project, "first", cache)
    change(tmp_path)
    plain, second = distil(project, "plain"), distil(project, "second", cache)
    assert largest_difference(plain, second) < 1e-5 and largest_difference(first, second) > 1e-4
    assert len(list((tmp_path / "shared").iterdir())) == 4 and len(loads) == 3


def test_what_is_damaged_is_computed_again_or_named(tmp_path, project, loads, capsys):
    """Fault: a truncated array or head is learnt from, or ends the run with a traceback."""
    first = distil(project, "first", HIDDEN)
    shared = {**HIDDEN, "dir": str(tmp_path / "first/teacher_cache")}
    folder = caches(tmp_path / "first/teacher_cache")["train"]
    os.truncate(folder / "hidden.bin", 1000)
    loads.clear()
    assert_equal_weights(first, distil(project, "again", shared))
    assert len(loads) == 1
    head = folder / "head.safetensors"
    assert load_file(head)["weight"].shape == (257, 32)
    os.truncate(head, 100)
    capsys.readouterr()
    assert run_kd(tmp_path, changed(project, distillation_kwargs={"teacher_cache": shared})) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"train_kd.py: error: {head} is damaged (") and f"delete {folder}" in error
