"""What the system refuses, told in one line, and a console that stops no run: data/os_errors.py, data/console.py."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from data.console import CONSOLE, put, settle_output, show
from data.os_errors import REMEDIES, describe, refusal


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
def test_path_cause_and_remedy(number):
    """A bare "No space left on device", or "[Errno 28]", of which the user knows neither where nor what to do."""
    for error in (OSError(number, os.strerror(number), "/a/b"), OSError(number, os.strerror(number), b"/a/b")):
        assert describe(error) == f"/a/b: {os.strerror(number)}: {REMEDIES[number]}"
    assert describe(OSError(number, os.strerror(number)), Path("c")) == f"c: {os.strerror(number)}: {REMEDIES[number]}"


def test_other_errors_are_told_as_they_are():
    """Errors without number or path in a traceback, or over several lines."""
    assert describe(OSError("lost\n  the  way")) == "lost the way"
    assert describe(OSError(errno.EPIPE, "Broken pipe")) == "Broken pipe"
    assert describe(OSError(errno.EPIPE, "Broken pipe", 7)) == "Broken pipe"


def test_refusals_of_libraries_in_rust_are_recognised():
    """The tokenizers library tells of a full disk in a bare Exception, which ends in a traceback."""
    found = refusal(Exception("File too large (os error 27)"))
    assert (found.errno, found.strerror) == (27, "File too large")
    found = refusal(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert describe(found, "x").startswith("x: Error while serializing: I/O error: No space left on device: free space")
    same = OSError(5, "x")
    assert refusal(same) is same
    assert refusal(ValueError("no such thing")) is None and refusal(KeyError("(os error 5) or so")) is None


class Broken(io.StringIO):
    """A stream that refuses everything."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error"),
    ValueError("I/O operation on closed file"), RuntimeError("reentrant call inside <_io.BufferedWriter>"),
])
def test_a_console_that_refuses_stops_nothing(monkeypatch, error):
    """A closed terminal, a full disk behind `2> log` or a signal in the middle of a line end hours of training."""
    monkeypatch.setattr(sys, "stderr", Broken(error))
    assert CONSOLE.write("text") == 4
    CONSOLE.flush()
    print("more", file=CONSOLE)


def test_the_console_is_where_standard_error_is_now(monkeypatch):
    """Lines go to a stream that was replaced, and are lost."""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    print("here", file=CONSOLE, flush=True)
    assert stream.getvalue() == "here\n" and CONSOLE.isatty() is False


def test_results_that_cannot_be_printed_are_an_error(monkeypatch, capsys):
    """A table that was not printed counts as printed."""
    assert show("program", ["a", "b"]) == 0
    assert capsys.readouterr().out == "a\nb\n"
    monkeypatch.setattr(sys, "stdout", Broken(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as caught:
        put("text")
    assert caught.value.filename == "standard output"
    assert show("program", ["a"]) == 1
    assert capsys.readouterr().err.startswith("program: error: standard output: No space left on device: free space")


def test_closed_streams_are_told_and_stop_nothing(monkeypatch, capsys):
    """With `>&-` every script ended in a traceback, and a result that nobody got counted as printed."""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        put("text")
    assert caught.value.filename == "standard output"
    assert show("program", ["a"]) == 1
    assert capsys.readouterr().err == (
        "program: error: standard output: Bad file descriptor: it is closed: redirect it to a file or /dev/null\n"
    )
    monkeypatch.setattr(sys, "stderr", None)
    print("more", file=CONSOLE, flush=True)
    settle_output()
