"""Runs with the teacher's outputs on disk train what runs without train: utils/distillation/cached_teacher.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.prompts import DEFAULT_TEMPLATE
from model.language_model import LanguageModel
from model.teacher import Teacher
from tests.conftest import byte_tokenizer, write_rows
from tests.small_kd_runs import make_kd_project, random_rows, run_kd, save_model, tiny_teacher
from tests.small_runs import assert_equal_weights, changed, largest_difference, make_rows, metrics, weights
from utils.config.distill import DistillationKwargs
from utils.distillation.cached_teacher import CachedTeacher
from utils.runs import build
from utils.training.distributed import DistributedContext

HIDDEN = {"kind": "hidden"}


@pytest.fixture
def project(tmp_path) -> dict:
    """One epoch of steps of up to 2 micro-batches, with dropout, on rows that do not fill the last step.

    A second epoch has other batches, in which the teacher's states may be rounded otherwise than those on disk.
    """
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


def logs(folder: Path) -> list[dict]:
    return [*metrics(folder), *metrics(folder, "validation")]


# -- equal to no cache -------------------------------------------------------------------------------------------


def test_hidden_states_are_exact(tmp_path, project, loads, capsys):
    """Fault: states of another row or another precision, or kept but computed again."""
    plain = distil(project, "plain")
    assert len(loads) == 1
    assert_equal_weights(plain, distil(project, "stored", HIDDEN))
    assert logs(tmp_path / "plain") == logs(tmp_path / "stored")
    assert len(loads) == 2
    assert "the teacher is no longer needed" in capsys.readouterr().err
    found = caches(tmp_path / "stored/teacher_cache")
    assert found.keys() == {"train", "validation"}
    labels = sum(len(row["highlights"]) + 2 for row in make_rows(11))
    assert (found["train"] / "hidden.bin").stat().st_size == labels * 32 * 4


def test_later_epochs_only_read(project, loads, monkeypatch):
    """Fault: a second epoch, whose batches are others, does not find its rows, or finds others."""
    twice = {"trainer_kwargs": {"epochs": 2}}
    plain = distil(project, "plain", **twice)
    computed, hidden = [], Teacher.hidden

    def recorded(self, *arguments):
        computed.append(len(arguments[0]))
        return hidden(self, *arguments)

    monkeypatch.setattr(Teacher, "hidden", recorded)
    stored = distil(project, "stored", HIDDEN, **twice)
    assert sum(computed) == 11 + 4 and len(loads) == 2
    assert largest_difference(plain, stored) < 1e-5


def test_a_second_run_needs_no_teacher(tmp_path, project, monkeypatch, capsys):
    """Fault: the teacher's weights are loaded although all its outputs are on disk."""
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
    assert not (tmp_path / "second/teacher_cache").exists()
    with pytest.raises(AssertionError):
        distil(project, "fourth", HIDDEN)
    assert "AssertionError: loaded" in capsys.readouterr().err


def test_precision_of_the_run_loses_nothing(tmp_path, project):
    """Fault: dtype auto rounds what a bfloat16 run would have used, or stores it in twice the space."""
    half = {"trainer_kwargs": {"precision": "bfloat16"}}
    assert_equal_weights(distil(project, "plain", **half), distil(project, "stored", HIDDEN, **half))
    labels = sum(len(row["highlights"]) + 2 for row in make_rows(11))
    file = caches(tmp_path / "stored/teacher_cache")["train"] / "hidden.bin"
    assert file.stat().st_size == labels * 32 * 2


def test_bfloat16_is_near(tmp_path, project):
    """Fault: dtype bfloat16 stores other bits than the number's, or is not used."""
    plain, stored = distil(project, "plain"), distil(project, "stored", {**HIDDEN, "dtype": "bfloat16"})
    assert 0 < largest_difference(plain, stored) < 0.03
    ours, theirs = ([line["divergence"] for line in metrics(tmp_path / name)] for name in ("stored", "plain"))
    assert ours != theirs and ours == pytest.approx(theirs, rel=1e-2)
    folder = tmp_path / "stored/teacher_cache"
    values = np.fromfile(caches(folder)["train"] / "hidden.bin", "uint16")
    states = torch.from_numpy(values.view("int16")).view(torch.bfloat16).float().unflatten(0, (-1, 32))
    # After the final layer norm of a new model: mean 0, variance 1.
    torch.testing.assert_close(states.var(-1, unbiased=False), torch.ones(len(states)), rtol=0.02, atol=0)
    assert_equal_weights(plain, distil(project, "exact", {**HIDDEN, "dir": str(folder)}))
    assert len(list(folder.iterdir())) == 4  # the rounded states are still there


def test_all_but_one_token_is_nearly_exact(tmp_path, project):
    """Fault: log-probabilities at another temperature, of other ids, or a rest that is not the rest."""
    warm = {"distillation_kwargs": {"temperature": 2.0}}
    plain = distil(project, "plain", **warm)
    for k in (256, 5000):  # the vocabulary has 257 tokens
        cache = {"kind": "top_k", "top_k": k}
        top = distil(project, f"top-{k}", cache, distillation_kwargs={"temperature": 2.0, "teacher_cache": cache})
        assert largest_difference(plain, top) < 2e-4
        ours, theirs = ([line["loss"] for line in logs(tmp_path / name)] for name in (f"top-{k}", "plain"))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_all_tokens_in_bfloat16(tmp_path, project):
    """Fault: in bfloat16 the head and the states that it takes are of two types, and the run dies in its first step."""
    precise = {"trainer_kwargs": {"precision": "bfloat16"}}
    distil(project, "plain", **precise)
    distil(project, "top", {"kind": "top_k", "top_k": 257}, **precise)
    ours, theirs = ([line["divergence"] for line in logs(tmp_path / name)] for name in ("top", "plain"))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=0.01)


def test_a_few_tokens_are_a_lower_bound(tmp_path, project):
    """Fault: top_k keeps the worst tokens, as many as the vocabulary, or more divergence than there is."""
    cache = {"kind": "top_k", "top_k": 10}
    still = {"optimizer_kwargs": {"lm_lr": 1e-12}}  # the same student at each step
    distil(project, "plain", **still)
    distil(project, "top", cache, **still)
    ours, theirs = ([line["divergence"] for line in logs(tmp_path / name)] for name in ("top", "plain"))
    assert len(ours) == len(theirs) == 4
    for low, high in zip(ours, theirs, strict=True):
        assert 0.3 * high < low < high
    folder = caches(tmp_path / "top/teacher_cache")["train"]
    labels = sum(len(row["highlights"]) + 2 for row in make_rows(11))
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    assert sizes == {"ids.bin": labels * 10 * 2, "log_probs.bin": labels * 10 * 4, "log_rest.bin": labels * 4,
                     "checks.bin": 11 * 4}
    assert not (folder / "head.safetensors").exists()
    mass = np.fromfile(folder / "log_probs.bin", "float32").reshape(-1, 10)
    rest = np.fromfile(folder / "log_rest.bin", "float32")
    np.testing.assert_allclose(np.exp(mass).sum(1) + np.exp(rest), 1, rtol=1e-5)
    assert (np.diff(mass, axis=1) <= 0).all()


def test_an_epoch_that_leaves_rows_out(project):
    """Fault: a batch with some rows on disk and some not takes values of the wrong rows."""
    part = {"trainer_kwargs": {"ckpt_training_batch": 3, "epochs": 4}}
    assert largest_difference(distil(project, "plain", **part), distil(project, "stored", HIDDEN, **part)) < 1e-5


# -- stale and damaged -------------------------------------------------------------------------------------------


def test_another_teacher_finds_nothing(tmp_path, project, loads):
    """Fault: outputs of a teacher that was trained on since are taken for those of the new one."""
    cache = {**HIDDEN, "dir": str(tmp_path / "shared")}
    first = distil(project, "first", cache)
    save_model(tmp_path / "teacher", tiny_teacher(seed=9), DEFAULT_TEMPLATE)
    plain, second = distil(project, "plain"), distil(project, "second", cache)
    assert_equal_weights(plain, second)
    assert largest_difference(first, second) > 1e-3
    assert len(list((tmp_path / "shared").iterdir())) == 4 and len(loads) == 3


def test_a_new_head_alone_is_another_teacher(tmp_path, project):
    """Fault: the key is of the body, so that a changed output head is not noticed."""
    cache = {**HIDDEN, "dir": str(tmp_path / "shared")}
    distil(project, "first", cache)
    network = tiny_teacher()
    network.transformer.ln_f.bias.data += 0.5
    save_model(tmp_path / "teacher", network, DEFAULT_TEMPLATE)
    assert_equal_weights(distil(project, "plain"), distil(project, "second", cache))


def test_other_rows_and_other_k_find_nothing(tmp_path, project, loads):
    """Fault: a changed CSV, k or temperature reads what was stored before."""
    shared = str(tmp_path / "shared")
    for name, options in (
        ("k8", {"teacher_cache": {"kind": "top_k", "top_k": 8, "dir": shared}}),
        ("k9", {"teacher_cache": {"kind": "top_k", "top_k": 9, "dir": shared}}),
        ("warm", {"teacher_cache": {"kind": "top_k", "top_k": 8, "dir": shared}, "temperature": 2.0}),
    ):
        distil(project, name, distillation_kwargs=options)
    assert len(loads) == 3 and len(list((tmp_path / "shared").iterdir())) == 6
    write_rows(tmp_path / "train.csv", make_rows(11, seed=5))
    cache = {"kind": "top_k", "top_k": 8, "dir": shared}
    distil(project, "rows", cache)
    assert len(loads) == 4 and len(list((tmp_path / "shared").iterdir())) == 7


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(bytes(content))


def test_damage_is_mended(tmp_path, project, loads, capsys):
    """Fault: a damaged or lost head, or a damaged row, is learnt from, or stops the run."""
    first = distil(project, "first", HIDDEN)
    shared = {**HIDDEN, "dir": str(tmp_path / "first/teacher_cache")}
    folders = caches(tmp_path / "first/teacher_cache")
    assert load_file(folders["train"] / "head.safetensors")["weight"].shape == (257, 32)
    for number, (split, name, how) in enumerate([
        ("train", "head.safetensors", damage), ("validation", "hidden.bin", damage), ("train", "checks.bin", damage),
        ("train", "manifest.json", damage), ("train", "head.safetensors", Path.unlink),
    ]):
        how(folders[split] / name)
        loads.clear()
        capsys.readouterr()
        assert_equal_weights(first, distil(project, f"again-{number}", shared))
        assert logs(tmp_path / "first") == logs(tmp_path / f"again-{number}")
        assert len(loads) == 1
        rebuilt = name in ("head.safetensors", "manifest.json")
        assert ("a damaged one was there" in capsys.readouterr().err) == rebuilt
    loads.clear()
    assert_equal_weights(first, distil(project, "whole", shared))
    assert not loads


def test_no_room_is_told_before_the_run(tmp_path, project, monkeypatch, capsys):
    """Fault: the run starts, sets an earlier one aside, and dies when the disk is full."""
    class Usage:
        free = 5

    distil(project, "first")
    before = (tmp_path / "first/metrics.jsonl").read_bytes()
    monkeypatch.setattr("data.teacher_cache.shutil.disk_usage", lambda path: Usage)
    capsys.readouterr()
    config = changed(project, distillation_kwargs={"teacher_cache": HIDDEN},
                     trainer_kwargs={"output_dir": str(tmp_path / "first"), "load_from_checkpoint": False})
    assert run_kd(tmp_path, config) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("train_kd.py: error: distillation_kwargs.teacher_cache.dir: the cache of train-")
    assert (tmp_path / "first/metrics.jsonl").read_bytes() == before
    assert not list((tmp_path / "first").glob("earlier-run-*"))


def test_a_batch_of_no_table(tmp_path):
    """Fault: what is computed for a batch outside the tables is not what would be stored for it."""
    options = DistillationKwargs.model_validate({"teacher_cache": {"kind": "top_k", "top_k": 7}})
    plain = Teacher(LanguageModel(tiny_teacher(), byte_tokenizer()))
    context = DistributedContext(torch.device("cpu"))
    teacher = CachedTeacher(lambda: plain, "x", 32, 257, options, tmp_path, context, print)
    batch = random_rows([(9, [7, 8]), (5, [3])])
    outputs = teacher.outputs(*batch)
    expected = torch.log_softmax(plain.outputs(*batch).hidden @ plain.head.weight.T, -1).sort(-1, descending=True)
    assert torch.equal(outputs.ids, expected.indices[:, :7]) and outputs.ids.dtype == torch.int64
    torch.testing.assert_close(outputs.log_probs, expected.values[:, :7])
    torch.testing.assert_close(outputs.log_rest, expected.values[:, 7:].logsumexp(-1))
    assert list(tmp_path.iterdir()) == []
