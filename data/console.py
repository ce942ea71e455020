"""The console: what cannot be shown there (a full disk behind `2> log`, a closed terminal) stops no run."""

import contextlib
import errno
import os
import sys

from data.os_errors import describe
from untrusted.text import printable

# RuntimeError: a signal's handler writes in the middle of a writing.
# AttributeError: there is none, the shell closed it (`2>&-`).
REFUSED = (OSError, ValueError, RuntimeError, AttributeError)


class Console:
    """Standard error, wherever it points to now; text that it cannot take is left out."""

    def write(self, text: str) -> int:
        with contextlib.suppress(*REFUSED):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*REFUSED):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


CONSOLE = Console()


def put(text: str, end: str = "\n") -> None:
    """Print a result. Raises OSError that names standard output, where that cannot be written."""
    if sys.stdout is None:  # closed by the shell (`>&-`): print would drop the text without a word
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def show(program: str, lines: list[str]) -> int:
    """Print what a program has done; its exit code."""
    try:
        put("\n".join(map(printable, lines)))
    except OSError as error:
        print(f"{program}: error: {describe(error)}", file=CONSOLE)
        return 1
    finally:
        settle_output()
    return 0


def settle_output() -> None:
    """Before the program ends: a stream that refuses its last words is led into nothing, since the interpreter would
    try again, complain in several lines and spoil the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: the shell closed it
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
