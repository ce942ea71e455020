"""Every command of README.md's real use runs as it stands there, on small stand-ins for the hub's data and models."""

import json
import re
import shlex
import shutil

import datasets
import pytest

import data.cnn_dailymail
import train
import train_kd
import utils.compare
import validate_model
from tests.conftest import ROOT, byte_tokenizer, tiny_gpt2
from tests.small_runs import make_rows

MAINS = {
    "train.py": train.main, "train_kd.py": train_kd.main, "validate_model.py": validate_model.main,
    "data.cnn_dailymail": data.cnn_dailymail.main, "utils.compare": utils.compare.main,
}


def readme_commands() -> list[list[str]]:
    """The `python ...` commands of README.md's bash blocks, as (name, arguments)."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.strip()]
    return [command[2:] if command[1] == "-m" else command[1:] for command in commands if command[0] == "python"]


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    """Fault: a README whose commands do not work."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "config_kd.json"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("gpt2", "gpt2-medium"):  # a folder of that name stands in for the hub's model
        tiny_gpt2(positions=1024).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    splits = {split: make_rows(20, seed) for seed, split in enumerate(("train", "validation", "test"))}
    hub = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: hub)
    commands = readme_commands()
    assert {command[0] for command in commands} == MAINS.keys()
    for name, *arguments in commands:
        assert MAINS[name](arguments) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "runs/gpt2-medium-cnn/test/scores.json").read_text())
    assert scores["rows"] == 20
    assert "lead-3" in capsys.readouterr().out


def test_python_example_runs(tmp_path, monkeypatch):
    """Fault: the README's example of TeacherStudent does not run, or trains the teacher."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, width in (("gpt2", 16), ("gpt2-medium", 32)):
        tiny_gpt2(width=width).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    names = {}
    exec(example, names)
    assert names["terms"].token_count == 5
    assert all(parameter.grad is not None for parameter in names["student"].parameters())
    assert all(parameter.grad is None for parameter in names["teacher"].language_model.parameters())


def test_readme_names_files_that_exist():
    """Fault: a README that names files which are gone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:model|data|utils|benchmarks|demo)/\w+\.(?:py|md|json)\b", text):
        assert (ROOT / path).is_file(), path


def test_scripts_start_with_two_commands():
    """Fault: the two first commands of the README are not the scripts that are there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"```bash\n\./demo\.sh\n\./test\.sh\n```", text)
    for name in ("demo.sh", "test.sh", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, name


@pytest.mark.parametrize("line", (ROOT / "demo.sh").read_text().splitlines())
def test_demo_asks_nothing(line):
    """Fault: a demo that waits for an answer."""
    assert not re.match(r"\s*read\b|\s*select\b", line)
