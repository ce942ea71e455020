"""Files from strangers: no pickle and no code beside a model is run, and each refusal is one line."""

import contextlib
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import train
import validate_model
from model.loading import load_language_model
from tests.conftest import tiny_gpt2, tiny_language_model, write_rows
from tests.small_runs import changed, make_project, make_rows, write_config

UGLY = "\x1b]0;owned\x07\x1b[2J\u202egood\u200b\x9b31m\u2028"  # sets a title, clears the screen, turns the direction


class Bomb:
    """Unpickled without care, it creates a file."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that code in the hostile file would create."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_language_model(seed=7).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refusal(tmp_path, capsys):
    """refusal(path, *arguments): the one line with which validate_model.py refuses a model, writing nothing."""
    write_rows(tmp_path / "rows.csv", make_rows(2))

    def validate(path: Path, *arguments: object) -> str:
        flags = ["--csv_path", tmp_path / "rows.csv", "--output_dir", tmp_path / "out", "--device_id", "-1"]
        assert validate_model.main([*map(str, [*flags, "--model_path", path, *arguments])]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "validate_model.py: error: " in line]
        assert len(errors) == 1 and errors[0].isprintable() and "fault of the program" not in errors[0], errors
        assert not list((tmp_path / "out").glob("*.json"))
        return errors[0]

    return validate


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- pickles -------------------------------------------------------------------------------------------------------


def test_the_bomb_goes_off(tmp_path):
    """Fault: the tests below prove nothing, since their pickle would not run code at all."""
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "old.pt")
    torch.load(tmp_path / "old.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "optimizer"])
def test_pickle_in_a_legacy_file(tmp_path, model, mark, refusal, zipped, wrapper):
    """Fault: a pickle in a .pt file is executed."""
    bomb = Bomb(mark) if wrapper is None else {wrapper: Bomb(mark)}
    state = {**tiny_gpt2().state_dict(), "more": bomb}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
    assert "old.pt is damaged or holds more than tensors" in refusal(tmp_path / "old.pt", "--model_name", model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickle_in_a_model_folder(model, mark, refusal, name):
    """Fault: pickled weights are executed, or the message advises to do so."""
    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(mark)}, model / name)
    message = refusal(model)
    assert "model cannot be loaded: " in message and "weights_only" not in message


def test_pickles_beside_the_weights(model, mark):
    """Fault: a pickle that is none of the model's files is opened."""
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", ".metadata", "tokenizer.model"):
        (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    load_language_model(str(model))
    (model / "model.safetensors").rename(model / "shard-00001-model-00001-of-00001.safetensors")
    with contextlib.suppress(BaseException):  # torch's reader of checkpoints of several processes has such an error
        load_language_model(str(model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of two epochs, and its config with a third."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_project(folder, rows=4)
    assert train.main(["--config", str(write_config(folder, changed(config, trainer_kwargs={"epochs": 2})))]) == 0
    return folder, changed(config, trainer_kwargs={"epochs": 3})


def state_json(**values):
    def change(step: Path, mark: Path) -> None:
        edit(step / "trainer_state/state.json", **values)

    return change


def saved(name: str, content):
    return lambda step, mark: torch.save(content(mark), step / f"trainer_state/{name}.pt")


CHANGES = {
    **{f"a pickle in {name}.pt": saved(name, lambda mark: [Bomb(mark)])
       for name in ("optimizer", "random", "objective")},
    "an epoch that is text": state_json(epoch="x"), "a negative step count": state_json(micro_batches=-1),
    "a count beyond 64 bits": state_json(accumulation=10**30), "an identity that is a number": state_json(identity=5),
    "an optimizer without groups": saved("optimizer", lambda mark: {}),
    "an optimizer of another model": saved(
        "optimizer", lambda mark: {"state": {}, "param_groups": [{"params": [0]}]}),
    "no random states": saved("random", lambda mark: [None]),
    "random states of other shapes": saved("random", lambda mark: [{"python": (3, (1,), None)}]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_checkpoint_with_a_manifest_that_fits(finished, tmp_path, mark, capsys, change):
    """Fault: resuming executes a pickle, ends in a traceback, or trains on with nonsense."""
    folder, config = finished
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    step = (tmp_path / "run/model_checkpoints/last").resolve()
    change(step, mark)
    manifest = json.loads((step / "trainer_state/manifest.json").read_text())
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "trainer_state/manifest.json").write_text(json.dumps(manifest))
    before = {path: path.read_bytes() for path in (tmp_path / "run/model_checkpoints").rglob("*") if path.is_file()}
    config = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "run")})
    capsys.readouterr()
    assert train.main(["--config", str(write_config(tmp_path, config))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "unexpected" not in errors[0], errors
    assert before == {path: path.read_bytes() for path in before}


# -- model folders -------------------------------------------------------------------------------------------------


def add_code(model: Path, mark: Path) -> dict:
    """Modeling code beside the model that creates `mark`; the auto_map that names it."""
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import GPT2Config as Config, GPT2LMHeadModel as Model\n"
    (model / "strange.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(f"{code}def generate(*arguments, **options): pass\n")
    return {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}


def test_code_beside_a_known_family_is_ignored(model, mark):
    """Fault: code that lies beside a model is run, or an attention kernel of the hub is taken."""
    edit(model / "config.json", auto_map=add_code(model, mark), attn_implementation="evil/kernel:forward")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]})
    network = load_language_model(str(model)).model
    assert type(network) is GPT2LMHeadModel and network.config._attn_implementation in ("sdpa", "eager")


def test_code_of_an_unknown_family_is_refused(model, mark, refusal):
    """Fault: the user is asked whether to run the code, or it is run."""
    edit(model / "config.json", model_type="strange", auto_map=add_code(model, mark))
    assert "model cannot be loaded: " in refusal(model)


def lead_out(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, model.parent / "outside.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


FOLDERS = {
    "an adapter": (lambda model: (model / "adapter_config.json").write_text("{}"), "is an adapter"),
    "quantized": (lambda model: edit(model / "config.json", quantization_config={"quant_method": "fp8"}), "quantized"),
    "weights elsewhere": (lead_out, "names '../outside.safetensors': expected a file in the same folder"),
    "no JSON": (lambda model: (model / "config.json").write_text("{"), "model cannot be loaded: "),
    "deep JSON": (lambda model: (model / "config.json").write_text("[" * 10**6), "model cannot be loaded: "),
    "a list": (lambda model: (model / "config.json").write_text("[]"), "model cannot be loaded: "),
    "an unknown family": (lambda model: edit(model / "config.json", model_type=f"{UGLY}\nfine"), "\\x1b]0;owned"),
    "other shapes": (lambda model: edit(model / "config.json", n_embd=32), "do not fit its config.json"),
    "a template that is none": (lambda model: edit(model / "config.json", prompt_template=[UGLY]), "prompt_template"),
    "a length that is none": (lambda model: edit(model / "config.json", prompt_max_length="9"), "prompt_max_length"),
}


@pytest.mark.parametrize(("change", "words"), FOLDERS.values(), ids=FOLDERS)
def test_model_folder_that_cannot_be_used(model, refusal, change, words):
    """Fault: a traceback, several lines, a file outside the folder is read, or a terminal obeys what stands there."""
    change(model)
    assert words in refusal(model)


# -- names that reach the console ----------------------------------------------------------------------------------


def test_control_characters_are_escaped(tmp_path, model, refusal, capsys):
    """Fault: a terminal obeys the names of files, weights, ids or keys."""
    torch.save({**tiny_gpt2().state_dict(), f"{UGLY}\nall is well": torch.ones(1)}, tmp_path / "old.pt")
    assert "1 unexpected (\\x1b]0;owned" in refusal(tmp_path / "old.pt", "--model_name", model)
    write_rows(tmp_path / "rows.csv", [{**make_rows(1)[0], "id": UGLY, "article": ""}])
    assert "\\x1b]0;owned" in refusal(model)
    (tmp_path / f"{UGLY}.json").write_text(json.dumps({UGLY: 1, "trainer_kwargs": {"device": UGLY}}))
    assert train.main(["--config", str(tmp_path / f"{UGLY}.json")]) == 2
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
