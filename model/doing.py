"""What was being done when an error came: noted on the error as it passes, so that a message can tell it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# Kinds of work, in words for the user.
LOADING, TRAINING, MEASURING, DECODING = "loading", "training step", "measuring", "decoding"
TEACHER, ROLLOUTS, LOGITS, UPDATE = "the teacher", "drawing rollouts", "logits", "the optimizer's update"


class Doing(NamedTuple):
    """kind: one of the above. detail: which one. rows, longest: of the batch, and tokens of its longest row."""

    kind: str
    detail: str = ""
    rows: int | None = None
    longest: int | None = None


@contextmanager
def doing(kind: str, detail: str = "", rows: int | None = None, longest: int | None = None) -> Iterator[None]:
    """An error that leaves this context has what was done in its attribute `doing`, a list, the innermost first."""
    try:
        yield
    except Exception as error:
        error.doing = [*getattr(error, "doing", ()), Doing(kind, detail, rows, longest)]
        raise
