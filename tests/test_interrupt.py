"""Ctrl-C in a program's first and in its later seconds: data/interrupt.py."""

import os
import signal
import subprocess
import sys

import pytest

from data import cnn_dailymail, interrupt
from tests.conftest import ROOT
from utils import compare

# A library that is interrupted while it is imported, and does not let that through.
INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture(autouse=True)
def handler():
    """The handler of before, whatever a test does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("program", "name"), [
    (["train.py"], "train.py"), (["train_kd.py"], "train_kd.py"), (["validate_model.py"], "validate_model.py"),
    (["-m", "data.demo_news"], "demo_news"), (["-m", "data.cnn_dailymail"], "cnn_dailymail"),
    (["-m", "utils.compare"], "utils.compare"),
], ids=str)
def test_ctrl_c_during_the_imports(tmp_path, program, name):
    """Fault: a traceback through the libraries, an error of theirs, or a program that goes on."""
    (tmp_path / "tempfile.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, f"{name}: interrupted\n", "")


def test_later_it_raises():
    """Fault: Ctrl-C ends a program at once that has something to clean up."""
    interrupt.end_on_interrupt("program")
    interrupt.raise_on_interrupt()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_ignored_stays_ignored():
    """Fault: a program in the background of a shell hears the Ctrl-C of another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt.end_on_interrupt("program")
    interrupt.raise_on_interrupt()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def stopped(*arguments, **options):
    raise KeyboardInterrupt


def test_tools_tell_it_in_one_line(tmp_path, monkeypatch, capsys):
    """Fault: a traceback from a tool that was at work."""
    monkeypatch.setattr(cnn_dailymail, "make_tables", stopped)
    monkeypatch.setattr(compare, "read_evaluation", stopped)
    assert cnn_dailymail.main(["--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "cnn_dailymail: interrupted\n"
    assert compare.main([f"a={tmp_path}"]) == 130
    assert capsys.readouterr().err == "utils.compare: interrupted\n"
