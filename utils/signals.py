"""Ctrl-C and SIGTERM: end at the next safe place with a checkpoint, and say how to go on."""

import signal
import sys


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, number: int, step: int, how_to_go_on: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped at optimizer step {step} by {name}, checkpoint written; {how_to_go_on}")
        self.exit_code = 128 + number


class StopRequest:
    """While this context lasts, the first SIGINT or SIGTERM is noted in `requested`; a second one kills as usual."""

    def __init__(self, how_to_go_on: str = "the same command goes on from there"):
        self.how_to_go_on = how_to_go_on
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.number = number
        for each, handler in self.before.items():
            signal.signal(each, handler)
        print(f"\n{signal.Signals(number).name}: stopping at the next step; once more to stop at once", file=sys.stderr)

    def leave(self, step: int) -> None:
        """Raises Stopped."""
        raise Stopped(self.number or signal.SIGTERM, step, self.how_to_go_on)
