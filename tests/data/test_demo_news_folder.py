"""The folder that data/demo_news.py writes."""

import hashlib
import os
import subprocess
import sys

import pytest

from data import demo_news
from tests.conftest import ROOT

SMALL = [f"--{split}_rows=24" for split in demo_news.SIZES] + ["--vocab_size=300"]
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
    """The one line that a failing run prints."""
    capsys.readouterr()
    try:
        actual = run(folder, *options)
    except SystemExit as exit:
        actual = exit.code
    err = capsys.readouterr().err
    assert actual == code and err.count("\n") == 1 and err.startswith("demo_news: "), (actual, err)
    return err.strip()


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
    assert run(folder, "--noisy_share", 0.5) == 0  # other settings
    assert {name for name, content in contents(folder).items() if content != old[name]} == {
        "demo.json", "student_noisy.csv", "student_short_noisy.csv",
    }


@pytest.mark.parametrize(("name", "text"), [
    ("notes.txt", "mine"), ("test.csv", "mine"), ("demo.json", '{"my": "settings"}'), ("demo.json", "not json"),
    ("demo.json", "[]"),
])
def test_folder_of_other_files_is_refused(tmp_path, capsys, name, text):
    """Fault: a table, or a demo.json, of somebody else's is replaced without being asked to."""
    (tmp_path / name).write_text(text)
    assert f"{tmp_path} holds other files: choose another --output_dir" in error_of(capsys, tmp_path, code=2)
    assert contents(tmp_path) == {name: text.encode()}
    assert run(tmp_path, "--overwrite") == 0
    assert name != "notes.txt" or contents(tmp_path)[name] == b"mine"


# -- the command -------------------------------------------------------------------------------------------------


def test_usage_errors(tmp_path, capsys):
    """Fault: a wrong value ends in a traceback, passes, leaves a folder, or its line does not say what is wrong."""
    out = tmp_path / "news"
    assert "--seed: invalid int value: 'x'" in error_of(capsys, out, "--seed", "x", code=2)
    assert "unrecognized arguments: --sed" in error_of(capsys, out, "--sed", 1, code=2)
    assert "test_rows must be 1 or more, not 0" in error_of(capsys, out, "--test_rows", 0, code=2)
    for share in (-0.1, 1.5, "nan"):
        error = error_of(capsys, out, "--noisy_share", share, code=2)
        assert f"noisy_share must be between 0 and 1, not {share}" in error
    assert "vocab_size must be 257 or more, not 256" in error_of(capsys, out, "--vocab_size", 256, code=2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/news"):
        assert f"cannot write {tmp_path / name}: " in error_of(capsys, tmp_path / name, code=1)
    assert (tmp_path / "file").read_text() == "mine"
