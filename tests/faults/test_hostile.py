"""Files from strangers, through the scripts: no pickle and no code beside a model is run; each refusal is one line."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
import validate_model
from tests.conftest import tiny_gpt2, tiny_language_model, write_rows
from tests.small_runs import changed, make_project, make_rows, write_config

UGLY = "\x1b]0;owned\x07\x1b[2J\u202egood\x9b31m\u2028"  # sets a title, clears the screen, turns the direction


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
def evaluate(tmp_path, capsys):
    """evaluate(path, *arguments): (exit code of validate_model.py, its one error line or "")."""
    write_rows(tmp_path / "rows.csv", make_rows(2))

    def call(path: Path, *arguments: object) -> tuple[int, str]:
        flags = ["--csv_path", tmp_path / "rows.csv", "--output_dir", tmp_path / "out", "--device_id", "-1",
                 "--max_generation_length", "2"]
        code = validate_model.main([*map(str, [*flags, "--model_path", path, *arguments])])
        lines = [line for line in capsys.readouterr().err.splitlines() if "validate_model.py: error: " in line]
        assert len(lines) == (code != 0) and all(line.isprintable() for line in lines), lines
        return code, "".join(lines)

    return call


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_bomb_goes_off(tmp_path):
    """Fault: the tests below prove nothing, since their pickle would not run code at all."""
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "old.pt")
    torch.load(tmp_path / "old.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_in_a_legacy_file(tmp_path, model, mark, evaluate, zipped):
    """Fault: a pickle in a .pt file is executed."""
    torch.save({**tiny_gpt2().state_dict(), "more": Bomb(mark)}, tmp_path / "old.pt",
               _use_new_zipfile_serialization=zipped)
    code, line = evaluate(tmp_path / "old.pt", "--model_name", model)
    assert code == 2 and "old.pt" in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickle_in_a_model_folder(model, mark, evaluate, name):
    """Fault: pickled weights are executed, or the message advises to do so."""
    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(mark)}, model / name)
    code, line = evaluate(model)
    assert code == 2 and "weights_only" not in line


def test_pickles_and_code_beside_a_known_model(model, mark, evaluate):
    """Fault: a file that is none of the model's own is opened or run."""
    for name in ("training_args.bin", "optimizer.pt", ".metadata", "tokenizer.model"):
        (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    edit(model / "config.json", auto_map=add_code(model, mark), attn_implementation="evil/kernel:forward")
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "strange.Tokenizer"]})
    assert evaluate(model) == (0, "")


def test_code_of_an_unknown_family(model, mark, evaluate):
    """Fault: the user is asked whether to run the code, or it is run."""
    edit(model / "config.json", model_type=f"strange{UGLY}", auto_map=add_code(model, mark))
    assert evaluate(model)[0] == 2


def add_code(model: Path, mark: Path) -> dict:
    """Modeling code that creates `mark`; the auto_map that names it."""
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import GPT2Config as Config, GPT2LMHeadModel as Model\n"
    (model / "strange.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(f"{code}def generate(*arguments, **options): pass\n")
    return {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}


def test_weights_outside_the_model_folder(model, evaluate):
    """Fault: the index of a model folder makes the program read files elsewhere."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, model.parent / "outside.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    code, line = evaluate(model)
    assert code == 2 and "../outside.safetensors" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of one epoch, and its config with a second."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_project(folder, rows=4)
    assert train.main(["--config", str(write_config(folder, config))]) == 0
    return folder, changed(config, trainer_kwargs={"epochs": 2})


@pytest.mark.parametrize("name", ["optimizer.pt", "random.pt", "objective.pt", "a path that leads out"])
def test_checkpoint_whose_manifest_fits(finished, tmp_path, mark, capsys, name):
    """Fault: resuming executes a pickle whose checksum fits, or opens a file outside of the checkpoint."""
    folder, config = finished
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    state = (tmp_path / "run/model_checkpoints/last").resolve() / "trainer_state"
    manifest = state / "manifest.json"
    if name.endswith(".pt"):
        old = (state / name).read_bytes()
        torch.save([Bomb(mark)], state / name)
        new = (state / name).read_bytes()
        text = manifest.read_text().replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest())
        manifest.write_text(text.replace(f": {len(old)}", f": {len(new)}"))
    else:
        manifest.write_text(manifest.read_text().replace("model.safetensors", "../../../outside"))
    config = changed(config, trainer_kwargs={"output_dir": str(tmp_path / "run")})
    capsys.readouterr()
    assert train.main(["--config", str(write_config(tmp_path, config))]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if ": error: " in line]) == 1


def test_control_characters_are_escaped(tmp_path, model, evaluate, capsys):
    """Fault: a terminal obeys the names of files, weights, ids or keys."""
    torch.save({**tiny_gpt2().state_dict(), f"{UGLY}\nall is well": torch.ones(1)}, tmp_path / "old.pt")
    assert evaluate(tmp_path / "old.pt", "--model_name", model)[0] == 2
    write_rows(tmp_path / "rows.csv", [{**make_rows(1)[0], "id": UGLY, "article": ""}])
    code, line = evaluate(model)
    assert code == 2 and "\\x1b]0;owned" in line
    (tmp_path / f"{UGLY}.json").write_text(json.dumps({UGLY: 1, "trainer_kwargs": {"device": UGLY}}))
    assert train.main(["--config", str(tmp_path / f"{UGLY}.json")]) == 2
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
