"""The folder that data/demo_news.py writes."""

from data import demo_news
from tests.data.test_demo_news import contents

SMALL = ["--max_rows=24", "--vocab_size=300"]


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



def test_wrong_arguments(tmp_path, capsys):
    """Fault: a wrong value ends in a traceback, passes, or leaves a folder; files of somebody else are replaced."""
    (tmp_path / "test.csv").write_text("mine")
    assert f"{tmp_path} holds other files: choose another --output_dir" in error_of(capsys, tmp_path, code=2)
    assert contents(tmp_path) == {"test.csv": b"mine"}
    out = tmp_path / "news"
    assert "--seed: invalid int value: 'x'" in error_of(capsys, out, "--seed", "x", code=2)
    assert "--max_rows must be 1 or more, not 0" in error_of(capsys, out, "--max_rows", 0, code=2)
    assert not out.exists()
    out.write_text("mine")
    for folder in (out, out / "deeper"):
        assert str(out) in error_of(capsys, folder, code=1)
    assert out.read_text() == "mine"
