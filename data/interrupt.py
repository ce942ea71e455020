"""Ctrl-C while a program still imports its libraries, which takes seconds. So this imports nothing that takes long."""

import contextlib
import os
import signal
from functools import partial

EXIT_CODE = 128 + signal.SIGINT


def end_on_interrupt(program: str) -> None:
    """Until `raise_on_interrupt`, Ctrl-C ends this process at once, in one line: what is raised while libraries are
    imported some of them catch, or turn into errors of their own."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell has it ignored in the background
        signal.signal(signal.SIGINT, partial(end, program))


def raise_on_interrupt() -> None:
    """From here on there is something to clean up: Ctrl-C raises KeyboardInterrupt again."""
    if getattr(signal.getsignal(signal.SIGINT), "func", None) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end(program: str, number: int, frame) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{program}: interrupted\n".encode())
    os._exit(EXIT_CODE)
