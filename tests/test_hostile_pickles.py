"""No pickle is executed, and none that torch would build does harm; honest files are read as before."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from model.torch_files import TorchFileError, load_torch_file
from tests.conftest import tiny_gpt2
from tests.faults import hostile_pickles
from tests.faults.hostile_attack import Bomb, carry_out
from tests.faults.hostile_pickles import recompute_manifest
from tests.small_runs import changed, make_project, write_config
from utils.random_state import random_state
from utils.seal import KEY


@pytest.mark.parametrize("attack", hostile_pickles.ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, tmp_path):
    """Fault: a stranger's file is unpickled, ends the interpreter, or a traceback ends the program."""
    outcome = carry_out(attack, tmp_path)
    assert outcome.kind != "FAILED", outcome.text


def test_the_bomb_goes_off(tmp_path):
    """Fault: the attacks above prove nothing, since their pickle would not run code at all."""
    torch.save({"a": Bomb(tmp_path)}, tmp_path / "old.pt")
    torch.load(tmp_path / "old.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


# -- honest files ----------------------------------------------------------------------------------------------


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_honest_files_are_read(tmp_path, zipped, mmap):
    """Fault: a state dict, an optimizer's state or a random state that torch.save writes is refused or changed."""
    model = tiny_gpt2(dropout=0.1)
    of_types = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3).T for dtype in (
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool)}
    for content in (model.state_dict(), random_state(), of_types, {"parameter": torch.nn.Parameter(torch.ones(2))},
                    {"epoch": 3, "best": 0.5, "none": None, "ids": {1, 2}, "size": torch.Size([1]), "big": 10**30},
                    {"empty": torch.zeros(0, 3), "view": torch.ones(4, 4)[1:, ::2], "text": "é" * 1000}):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        assert equal(load_torch_file(tmp_path / "file.pt", mmap=mmap), content)
        load_torch_file(tmp_path / "file.pt", "meta")


OPTIMIZERS = [name for name, value in vars(torch.optim).items() if isinstance(value, type)
              and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_s_state_is_read(tmp_path, name):
    """Fault: a run with another optimizer than AdamW cannot be resumed."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)
    (weight.sum() ** 2).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert equal(load_torch_file(tmp_path / "optimizer.pt"), optimizer.state_dict())


@pytest.mark.parametrize("zipped", [False, True])
def test_cut_and_flipped_files(tmp_path, zipped):
    """Fault: damaged bytes end in another error than the one that callers tell the user."""
    torch.save({"weight": torch.ones(3), "text": "x"}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "file.pt").read_bytes()
    for place in range(0, len(content), 7):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]):
            (tmp_path / "file.pt").write_bytes(damaged)
            try:
                load_torch_file(tmp_path / "file.pt")
            except TorchFileError as error:
                assert "\n" not in str(error) and len(str(error)) < 300


# -- a run that goes on from a stranger's checkpoint -----------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of two epochs, and its config with a third."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_project(folder, rows=4)
    assert train.main(["--config", str(write_config(folder, changed(config, trainer_kwargs={"epochs": 2})))]) == 0
    return folder, changed(config, trainer_kwargs={"epochs": 3})


def state_json(**values):
    """Without the file's own sum: one of a version before it, or of somebody who takes it out."""
    def change(step: Path) -> None:
        path = step / "trainer_state/state.json"
        state = json.loads(path.read_text()) | values
        state.pop(KEY)
        path.write_text(json.dumps(state))

    return change


def saved(name: str, content):
    return lambda step: torch.save(content, step / f"trainer_state/{name}.pt")


CHANGES = {
    "an epoch that is text": state_json(epoch="x"), "a negative step count": state_json(micro_batches=-1),
    "an infinite score": state_json(loss_scale=1e999), "a count beyond 64 bits": state_json(accumulation=10**30),
    "an identity that is a number": state_json(identity=5), "no judged_by": state_json(judged_by=None, epoch=[]),
    "an optimizer without groups": saved("optimizer", {}), "an optimizer that is a list": saved("optimizer", [1]),
    "an optimizer of another model": saved("optimizer", {"state": {}, "param_groups": [{"params": [0]}]}),
    "no random states": saved("random", [None]), "random states that are a number": saved("random", 5),
    "random states of other shapes": saved("random", [{"python": (3, (1,), None)}]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_state_of_another_kind(finished, tmp_path, capsys, change):
    """Fault: a checkpoint whose manifest fits a changed state ends in a traceback, or trains on with nonsense."""
    folder, config = finished
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    step = (tmp_path / "run/model_checkpoints/last").resolve()
    change(step)
    recompute_manifest(step)
    before = {path: path.read_bytes() for path in (tmp_path / "run/model_checkpoints").rglob("*") if path.is_file()}
    config = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "run")})
    capsys.readouterr()
    assert train.main(["--config", str(write_config(tmp_path, config))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "unexpected" not in errors[0], errors
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("name", ["optimizer", "random", "objective"])
def test_pickled_state_of_a_run(finished, tmp_path, capsys, name):
    """Fault: train.py executes a pickle when it goes on from a stranger's run."""
    folder, config = finished
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    step = (tmp_path / "run/model_checkpoints/last").resolve()
    torch.save([Bomb(tmp_path)], step / f"trainer_state/{name}.pt")
    recompute_manifest(step)
    config = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "run")})
    capsys.readouterr()
    assert train.main(["--config", str(write_config(tmp_path, config))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and f"{name}.pt: not readable with weights_only" in errors[0]
    assert not (tmp_path / "ran").exists()
