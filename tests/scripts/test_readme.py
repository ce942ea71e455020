"""Every command of README.md's real use runs as written, on small stand-ins for the hub's data and models; the Python
example runs; the pages name files and links that exist."""

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
from tests.conftest import ROOT, byte_tokenizer, tiny_gpt2, write_rows
from tests.small_runs import make_rows

MAINS = {
    "train.py": train.main, "train_kd.py": train_kd.main, "validate_model.py": validate_model.main,
    "data.cnn_dailymail": data.cnn_dailymail.main, "utils.compare": utils.compare.main,
}
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
    (tmp_path / "my_news").mkdir()
    for split, rows in splits.items():
        write_rows(tmp_path / f"my_news/{split}.csv", rows)
    commands = readme_commands()
    assert {command[0] for command in commands} == MAINS.keys()
    for name, *arguments in commands:
        assert MAINS[name](arguments) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "runs/gpt2-medium-cnn/test/scores.json").read_text())
    assert scores["rows"] == 20
    assert "lead-3" in capsys.readouterr().out


def test_python_example_runs(tmp_path, monkeypatch):
    """Fault: the example of TeacherStudent in docs/python.md does not run, or trains the teacher."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, width in (("gpt2", 16), ("gpt2-medium", 32)):
        tiny_gpt2(width=width).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    names = {}
    exec(example, names)
    assert names["terms"].token_count == 5
    assert all(parameter.grad is not None for parameter in names["student"].parameters())
    assert all(parameter.grad is None for parameter in names["teacher"].language_model.parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_exists(page):
    """Fault: a page names files which are gone, or links to a page or heading which is not there."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:model|data|utils|tests|benchmarks|demo|docs)/[\w/]+\.(?:py|md|json|sh|c)\b", text):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
