"""Signals stop a run in order; nohup keeps it going: signals.py. (In a process of its own: test_resume.py.)"""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.small_runs import assert_equal_weights, make_project, run, weights
from utils.training.signals import StopRequest
from utils.training.trainer import Trainer


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before, whatever a test does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore it, as nohup does
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_terminal_that_closes_is_heard_once(handlers, capsys):
    """Fault: a closed terminal kills the run, at once or with the second of the signals that it sends."""
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(3):
            hang_up()
        assert stop.requested and stop.number == signal.SIGHUP
    assert {number: signal.getsignal(number) for number in handlers} == handlers | {signal.SIGHUP: signal.SIG_DFL}
    assert capsys.readouterr().err.count("SIGHUP: stopping at the next step") == 1


TOGETHER = """
import os, signal, sys
from utils.training.signals import StopRequest
numbers = [signal.Signals[name] for name in sys.argv[1].split("+")]
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
with StopRequest() as stop:
    for number in numbers:
        os.kill(os.getpid(), number)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [])
    except KeyboardInterrupt:
        print("KeyboardInterrupt")
    print(stop.number)
"""


@pytest.mark.parametrize(("names", "code", "heard", "out"), [
    ("SIGHUP+SIGTERM", 0, ["SIGHUP", "SIGTERM"], "15"), ("SIGHUP+SIGINT", 0, ["SIGHUP", "SIGINT"], "2"),
    ("SIGINT+SIGTERM", -signal.SIGTERM, ["SIGINT"], ""),
    ("SIGHUP+SIGINT+SIGTERM", -signal.SIGTERM, ["SIGHUP", "SIGINT"], ""),
])
def test_signals_that_come_together(names, code, heard, out):
    """"Signal 15 ignored due to race condition", with a traceback, or work lost as a session ends."""
    done = subprocess.run([sys.executable, "-c", TOGETHER, names], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          preexec_fn=default_handlers)
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [f"{name}: stopping at the next step; once more to stop at once" for name in heard]
    assert (done.returncode, done.stdout.strip()) == (code, out)


def default_handlers() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_the_second_does_what_it_does_elsewhere(handlers):
    """Fault: a second Ctrl-C is only noted too, so that nothing ends a step that hangs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGTERM


def test_nohup_is_respected():
    """Fault: a run under nohup ends when its user logs out."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        hang_up()
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_is_resumed(tmp_path, monkeypatch, capsys, one_thread, number):
    """Fault: the work since the last checkpoint is lost with Ctrl-C or with the connection to the machine."""
    config = make_project(tmp_path, rows=8, dropout=0.1)
    assert run(tmp_path, config) == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    train_step = Trainer.train_step

    def closing(trainer, *arguments):
        if trainer.state.step == 2:
            signal.raise_signal(number)
        return train_step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", closing)
        assert run(tmp_path, config) == 128 + number
    printed = capsys.readouterr().err
    assert f"stopped at optimizer step 3 by {number.name}, checkpoint written; run the same command to" in printed
    assert "Traceback" not in printed
    assert run(tmp_path, config) == 0
    assert_equal_weights(weights(tmp_path / "whole/model_checkpoints/last"),
                         weights(tmp_path / "run/model_checkpoints/last"))
