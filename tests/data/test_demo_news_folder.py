"""The folder that data/demo_news.py writes."""

import hashlib
import os
import subprocess
import sys

from data import demo_news
from tests.conftest import ROOT

SMALL = ["--max_rows=24", "--vocab_size=300"]
KNOWN = {  # table: the beginning of its SHA-256
    "student": "ec6d2fcc9e9fa959",
    "student_noisy": "a4ba61f896e758a9",
    "student_short": "d033365754ce17d0",
    "student_short_noisy": "0185a5e149a2a2c2",
    "teacher": "c4eb1674370388dc",
    "teacher_short": "8d0ab1b928c923e1",
    "test": "b52c6ae9c34db8d5",
    "validation": "b90d47e14d78483f",
}


def contents(folder):
    """{path: bytes, or None for a folder} of all that lies below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def run(folder, *options):
    return demo_news.main(["--output_dir", str(folder), *SMALL, *map(str, options)])


def error_of(capsys, folder, *options, code):
    """The last line that a failing run prints."""
    capsys.readouterr()
    try:
        actual = run(folder, *options)
    except SystemExit as exit:
        actual = exit.code
    assert actual == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m data.demo_news: error: ")
    return line


# -- seeds -------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path):
    """Fault: other rows or another tokenizer in another process (hash order, threads), or with a locale of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TOKENIZERS_PARALLELISM": "false", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-m", "data.demo_news", "--output_dir", tmp_path / "a"], cwd=ROOT,
                   env=environment, check=True, stdout=subprocess.DEVNULL)
    assert demo_news.main(["--output_dir", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # The rows of the measured figures (benchmarks/RESULTS.md): raise VERSION and measure again if they change.
    digests = {name: hashlib.sha256((tmp_path / "a" / f"{name}.csv").read_bytes()).hexdigest()[:16] for name in KNOWN}
    assert digests == KNOWN


def test_seeds_change_their_tables_alone(tmp_path):
    """Fault: a table that ignores the seed, or a fresh test set that changes the training data too."""
    assert run(tmp_path / "a") == run(tmp_path / "b", "--seed", 8) == run(tmp_path / "c", "--test_seed", 99) == 0
    before, after, fresh = (contents(tmp_path / name) for name in "abc")
    assert {name for name in before if before[name] == after[name]} <= {"tokenizer", "tokenizer/tokenizer_config.json"}
    assert {name for name in before if before[name] != fresh[name]} == {"test.csv", "demo.json"}


# -- the folder --------------------------------------------------------------------------------------------------


def test_finished_folder_is_reused(tmp_path, capsys):
    """Fault: every run of the demo makes its data again, so that token caches and finished trainings no longer fit."""
    folder = tmp_path / "deep" / "news"
    times = lambda: {path: path.stat().st_mtime_ns for path in folder.rglob("*")}  # noqa: E731
    assert run(folder) == 0
    assert f"{folder}/tokenizer/: 300 tokens" in capsys.readouterr().out
    before, old = times(), contents(folder)
    assert run(folder) == 0
    assert times() == before and "reused" in capsys.readouterr().out
    (folder / "teacher.csv").unlink()  # not complete: written again
    assert run(folder) == 0
    assert contents(folder) == old
    assert run(folder, "--test_seed", 8) == 0  # other settings
    assert {name for name, content in contents(folder).items() if content != old[name]} == {"demo.json", "test.csv"}


def test_folder_of_other_files_is_refused(tmp_path, capsys):
    """Fault: a table of somebody else's is replaced."""
    (tmp_path / "test.csv").write_text("mine")
    assert f"{tmp_path} holds other files: choose another --output_dir" in error_of(capsys, tmp_path, code=2)
    assert contents(tmp_path) == {"test.csv": b"mine"}


def test_wrong_arguments(tmp_path, capsys):
    """Fault: a wrong value ends in a traceback, passes, or leaves a folder; a file is replaced by a folder."""
    out = tmp_path / "news"
    assert "--seed: invalid int value: 'x'" in error_of(capsys, out, "--seed", "x", code=2)
    assert "--max_rows must be 1 or more, not 0" in error_of(capsys, out, "--max_rows", 0, code=2)
    assert not out.exists()
    out.write_text("mine")
    for folder in (out, out / "deeper"):
        assert str(out) in error_of(capsys, folder, code=1)
    assert out.read_text() == "mine"
