"""What the system refuses, told in one line, and a console that stops no run: data/os_errors.py, data/console.py."""

import errno
import io
import os
from pathlib import Path

import pytest

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
