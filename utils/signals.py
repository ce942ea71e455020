"""Ctrl-C, SIGTERM and a closed terminal: end at the next safe place with a checkpoint, and say how to go on."""

import signal

from data.console import CONSOLE

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = [each for each in (signal.SIGINT, signal.SIGTERM, HANGUP) if each is not None]


class Stopped(Exception):
    """A signal ended the run after a checkpoint was written."""

    def __init__(self, number: int, step: int, how_to_go_on: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped at optimizer step {step} by {name}, checkpoint written; {how_to_go_on}")
        self.exit_code = 128 + number


class StopRequest:
    """While this context lasts, the first of SIGNALS is noted in `requested`; a second one kills as usual."""

    def __init__(self, how_to_go_on: str = "the same command goes on from there"):
        self.how_to_go_on = how_to_go_on
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __enter__(self) -> "StopRequest":
        # nohup has it ignored.
        heard = [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.number = number
        for each, handler in self.before.items():
            # A terminal that closes may tell it twice, and does not mean to be quicker the second time.
            signal.signal(each, signal.SIG_IGN if each == HANGUP else handler)
        print(f"\n{signal.Signals(number).name}: stopping at the next step; once more to stop at once", file=CONSOLE)

    def leave(self, step: int) -> None:
        """Raises Stopped."""
        raise Stopped(self.number or signal.SIGTERM, step, self.how_to_go_on)
