import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import demo_news
from tests.conftest import ROOT

SMALL = [f"--{split}_rows=24" for split in demo_news.SIZES] + ["--vocab_size=300"]


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
    out, err = capsys.readouterr()
    assert actual == code and out == "" and err.count("\n") == 1 and err.startswith("demo_news: "), (actual, out, err)
    return err.strip()


# -- seeds -------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path):
    """Other rows or another tokenizer in another process (hash order, threads), or with a locale of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TOKENIZERS_PARALLELISM": "false", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-m", "data.demo_news", "--output_dir", tmp_path / "a"], cwd=ROOT,
                   env=environment, check=True, stdout=subprocess.DEVNULL)
    assert demo_news.main(["--output_dir", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert b"\r" not in (tmp_path / "a" / "test.csv").read_bytes()


def test_seed_changes_every_table(tmp_path):
    """A table that ignores the seed: "several seeds" would be the same data."""
    assert run(tmp_path / "a") == run(tmp_path / "b", "--seed", 8) == 0
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in before if before[name] == after[name]} <= {"tokenizer", "tokenizer/tokenizer_config.json"}


def test_test_seed_changes_the_test_table_alone(tmp_path):
    """A fresh test set that changes the training data too, or test rows that its seed does not change."""
    assert run(tmp_path / "a") == run(tmp_path / "b", "--test_seed", 99) == run(tmp_path / "c", "--test_seed", 7) == 0
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name for name in before if before[name] != after[name]} == {"test.csv", "demo.json"}
    assert contents(tmp_path / "c") == before  # 7 is --seed


# -- the folder --------------------------------------------------------------------------------------------------


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finished_folder_is_reused(tmp_path, capsys):
    """Every run of the demo makes its data again, so that token caches and finished training no longer fit."""
    folder = tmp_path / "deep" / "news"
    assert run(folder) == 0
    assert f"{folder}/tokenizer/: 300 tokens" in capsys.readouterr().out
    before = times(folder)
    assert run(folder) == 0
    assert times(folder) == before and "reused" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["news"]
    old = contents(folder)
    assert run(folder, "--noisy_share", 0.5) == 0  # other settings: made anew
    assert {name for name, content in contents(folder).items() if content != old[name]} == {
        "demo.json", "student_noisy.csv", "student_short_noisy.csv",
    }


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "no tokenizer", "later version"])
def test_damaged_folder_is_made_again(tmp_path, harm):
    """A file half copied, edited or lost is used as it is, or stops the demo for good."""
    folder = tmp_path / "news"
    assert run(folder) == 0
    before = contents(folder)
    if harm == "changed":
        (folder / "test.csv").write_bytes((folder / "test.csv").read_bytes().replace(b"test-00003", b"test-00004"))
    elif harm == "cut":
        os.truncate(folder / "teacher.csv", 100)
    elif harm == "missing":
        (folder / "validation.csv").unlink()
    elif harm == "no tokenizer":
        for path in (folder / "tokenizer").iterdir():
            path.unlink()
        (folder / "tokenizer").rmdir()
    else:
        record = json.loads((folder / "demo.json").read_text())
        record["settings"]["version"] += 1
        (folder / "demo.json").write_text(json.dumps(record))
    assert contents(folder) != before
    assert run(folder) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("foreign", [
    "notes.txt", "tokenizer/mine.json", "mine/", "mine/a.csv", ".hidden", "link", "dead", "test.csv",
])
def test_foreign_files_are_never_deleted(tmp_path, capsys, foreign):
    """Making the demo again deletes a file, an empty folder or a link that its user put there."""
    folder = tmp_path / "news"
    assert run(folder) == 0
    (tmp_path / "elsewhere").mkdir()
    place = folder / foreign
    if foreign in ("link", "dead", "test.csv"):  # also in the place of one of the demo's own files
        place.unlink(missing_ok=True)
        place.symlink_to(tmp_path / ("elsewhere" if foreign == "link" else "nowhere"))
    elif foreign.endswith("/"):
        place.mkdir()
    else:
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
    error = error_of(capsys, folder, "--seed", 8, code=2)
    shown = foreign.split("/")[0] if foreign.startswith("mine") else foreign
    assert f"{folder} holds {shown}, which is not part of the demo: move it away or choose another" in error
    assert place.is_symlink() or place.exists()


@pytest.mark.parametrize("record", [
    '{"my": "settings"}', "[]", "not json", '{"settings": {}, "sha256": 1}', '{"settings": 1, "sha256": {}}',
])
def test_foreign_demo_json(tmp_path, capsys, record):
    """A demo.json of somebody else's is deleted, or one that is damaged ends in a traceback."""
    (tmp_path / "demo.json").write_text(record)
    assert "holds demo.json, which is not part of the demo" in error_of(capsys, tmp_path, code=2)
    assert (tmp_path / "demo.json").read_text() == record


def test_refusal_reads_no_file(tmp_path, capsys, monkeypatch):
    """--output_dir ~ reads and hashes all that lies in somebody's home before it is refused."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"1")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    assert "holds a, which" in error_of(capsys, tmp_path, code=2)


def test_empty_folder_and_link(tmp_path):
    """An empty folder made beforehand is refused, or a link to a folder on a larger disk is replaced by a folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run(tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "test.csv").is_file()


# -- interruptions -----------------------------------------------------------------------------------------------


def break_call(monkeypatch, owner, name, number, error):
    """The `number`-th call of owner.name raises the error before it does anything."""
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize(("owner", "name", "number"), [
    (demo_news, "write_table", 1), (demo_news, "write_table", 5), (demo_news, "train_tokenizer", 1),
    (Path, "write_text", 1), (Path, "rename", 1), (Path, "rename", 2),
])
def test_interrupted_writing_leaves_the_old_folder(tmp_path, capsys, monkeypatch, owner, name, number, error, code):
    """A full disk or Ctrl-C leaves half a folder, none, or scratch files beside it."""
    folder = tmp_path / "news"
    assert run(folder) == 0
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        break_call(patch, owner, name, number, error)
        line = error_of(capsys, folder, "--seed", 8, code=code)
    if code == 1:
        assert line == f"demo_news: error: cannot write {folder}: No space left on device: " \
            "free space on that disk, or choose a folder on another one"
    assert contents(tmp_path) == before
    assert run(folder, "--seed", 8) == 0
    assert contents(tmp_path) != before


def test_killed_run_leaves_the_old_folder(tmp_path):
    """A run killed while it writes leaves half a folder that the next one takes for whole, or cannot replace."""
    folder = tmp_path / "news"
    assert run(folder) == 0
    before = contents(folder)
    code = "import os, sys; from data import demo_news; demo_news.train_tokenizer = lambda *_: os.kill(os.getpid(), " \
        "9); demo_news.main(sys.argv[1:])"
    killed = subprocess.run([sys.executable, "-c", code, "--output_dir", folder, *SMALL, "--seed", "8"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert contents(folder) == before
    assert run(folder, "--seed", 8) == 0


# -- the command -------------------------------------------------------------------------------------------------


def test_usage_errors(tmp_path, capsys):
    """A wrong value ends in a traceback, passes, leaves a folder, or its line does not say what is wrong."""
    out = tmp_path / "news"
    assert "--seed: invalid int value: 'x'" in error_of(capsys, out, "--seed", "x", code=2)
    assert "unrecognized arguments: --sed" in error_of(capsys, out, "--sed", 1, code=2)
    assert "test_rows must be 1 or more, not 0" in error_of(capsys, out, "--test_rows", 0, code=2)
    for share in (-0.1, 1.5, "nan"):
        error = error_of(capsys, out, "--noisy_share", share, code=2)
        assert f"noisy_share must be between 0 and 1, not {share}" in error
    assert "vocab_size must be 257 or more, not 256" in error_of(capsys, out, "--vocab_size", 256, code=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="unknown split 'dev': expected one of teacher_short, teacher, "):
        demo_news.generate({"dev": 3})


def test_places_that_are_no_folder(tmp_path, capsys):
    """A file or a circle of links in the folder's place is deleted, or ends in a traceback."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        assert f"{tmp_path / name} is not a folder: choose another" in error_of(capsys, tmp_path / name, code=2)
    assert f"cannot write {tmp_path / 'file' / 'news'}: " in error_of(capsys, tmp_path / "file" / "news", code=1)
    assert (tmp_path / "file").read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_help(capsys):
    """Help that fails on a percent sign, or hides an option or its default."""
    with pytest.raises(SystemExit) as caught:
        demo_news.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("--output_dir", "--seed", "--test_seed", "--noisy_share", "--vocab_size", "--teacher_short_rows"):
        assert option in text
    assert "data/demo" in text and "1536" in text
