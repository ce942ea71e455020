"""Ctrl-C, SIGTERM and a closed terminal: end at the next safe place with a checkpoint, and say how to go on."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = [each for each in (signal.SIGINT, signal.SIGTERM, HANGUP) if each is not None]
Handler = Callable | int  # SIG_DFL, SIG_IGN


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, number: int, step: int, how_to_go_on: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped at optimizer step {step} by {name}, checkpoint written; {how_to_go_on}")
        self.exit_code = 128 + number


class StopRequest:
    """While this context lasts, the first of SIGNALS is noted in `requested`; a second one kills as usual.

    A hangup is never the one that kills, nor the one before it: a session that ends sends SIGHUP beside SIGTERM, and
    in what order they are heard is chance.
    """

    def __init__(self, how_to_go_on: str = "the same command goes on from there"):
        self.how_to_go_on = how_to_go_on
        self.number: int | None = None
        self.before: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if number != HANGUP or handler != signal.SIG_IGN:  # nohup has it ignored
                self.before[number] = handler  # first: the signal may come as soon as it is heard
                signal.signal(number, self.note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        # It changes no handlers: of two signals that came together the other one has its turn after this.
        if number == HANGUP and self.requested:
            return
        if self.number in (None, HANGUP):
            self.number = number
            with suppress(RuntimeError, OSError):  # a handler may interrupt another print
                print(f"\n{signal.Signals(number).name}: stopping at the next step; once more to stop at once",
                      file=sys.stderr)
        else:
            stop_at_once(number, frame, self.before[number])

    def leave(self, step: int) -> None:
        """Raises Stopped."""
        raise Stopped(self.number or signal.SIGTERM, step, self.how_to_go_on)


def stop_at_once(number: int, frame, handler: Handler) -> None:
    """What a signal does where `handler` is in force."""
    if callable(handler):
        handler(number, frame)
    elif handler != signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        os._exit(128 + number)  # the first process of a container outlives its signals
