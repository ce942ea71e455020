"""Ctrl-C, SIGTERM and a closed terminal: stop at the next optimizer step with a checkpoint."""

import signal
import sys
from contextlib import suppress

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
KILLING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal asked to stop during an evaluation."""


class Stopped(Exception):
    """A signal stopped the run after a checkpoint was written."""

    def __init__(self, number: int, step: int, resume_hint: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped at optimizer step {step} by {name}, checkpoint written; {resume_hint}")
        self.exit_code = 128 + number


class StopRequest:
    """Context in which the first signal sets `requested`, and a second SIGINT or SIGTERM acts as usual.

    A hangup never kills: a session that ends sends SIGHUP beside SIGTERM, in any order.
    """

    def __init__(self, resume_hint: str = "run the same command to resume"):
        self.resume_hint = resume_hint
        self.number: int | None = None
        self.previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopRequest":
        for number in (*KILLING, HANGUP):
            if number is not None and not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                self.previous[number] = signal.signal(number, self.request)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        if number == HANGUP and self.requested:
            return
        if self.number in KILLING:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
            return
        self.number = number
        with suppress(RuntimeError, OSError):  # a handler may interrupt another print
            print(f"\n{signal.Signals(number).name}: stopping at the next step; once more to stop at once",
                  file=sys.stderr)

    def raise_stopped(self, step: int) -> None:
        """Raises Stopped."""
        raise Stopped(self.number or signal.SIGTERM, step, self.resume_hint)
