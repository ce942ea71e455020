"""Arguments, exit codes and one-line errors of the scripts: utils/cli.py."""

import signal

import pytest

from data.articles import DataError
from utils.cli import INTERRUPTED, run_command, training_parser
from utils.config.load import ConfigError
from utils.training.signals import Stopped


def run(error: BaseException, debug: bool = False) -> int:
    def command() -> int:
        raise error

    return run_command("train.py", command, debug)


@pytest.mark.parametrize(("error", "code", "lines"), [
    (ConfigError("one\ntwo \x1b[31m"), 2, ["train.py: error: one", r"train.py: error: two \x1b[31m"]),
    (FileNotFoundError(2, "No such file", "a/b"), 1, ["train.py: error: a/b: No such file"]),
    (KeyError("a"), 1, ["train.py: error: unexpected KeyError: 'a'"]),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1,
     ["train.py: error: DataLoader worker (pid 7) is killed by signal: Killed: the system may be out of memory: lower "
      "dataset_kwargs.num_workers"]),
    (DataError("Caught DataError in worker 0.\nOriginal Traceback (most recent call last):\n x\nDataError: a: b"),
     2, ["train.py: error: a: b"]),
    (Stopped(signal.SIGTERM, 3, "go on"), 143, ["train.py: stopped at optimizer step 3 by SIGTERM"]),
    (KeyboardInterrupt(), INTERRUPTED, ["train.py: interrupted"]),
])
def test_errors_and_exit_codes(capsys, error, code, lines):
    """Fault: a traceback, control characters in the terminal, or an exit code that scheduling scripts misread."""
    assert run(error) == code
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == len(lines)
    assert all(line.startswith(start) and line.isprintable() for line, start in zip(shown, lines, strict=True))


def test_debug_shows_the_traceback(capsys):
    """Fault: a fault of the program cannot be found."""
    assert run(KeyError("a"), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err
    assert run_command("train.py", lambda: 0) == 0


@pytest.mark.parametrize(("flags", "words"), [
    (["--confg", "x.json"], "unrecognized arguments: --confg x.json (see --help)"),
    (["a\x1b[31m\nb"], "unrecognized arguments: a\\x1b[31m\\nb"),
])
def test_unknown_arguments(capsys, flags, words):
    """Fault: a misspelt flag passes, fills the terminal with usage, or its control characters reach it."""
    with pytest.raises(SystemExit) as stop:
        training_parser("train.py", "", "", "config.json").parse_args(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith(f"train.py: error: {words}") and len(message) < 300
    assert message.removesuffix("\n").isprintable()
