"""A closed terminal stops a run in order; nohup keeps it going: signals.py. (SIGINT, SIGTERM: test_resume.py.)"""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.training.signals import StopRequest


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


def test_nohup_is_respected():
    """A run under nohup ends when its user logs out."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        hang_up()
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
