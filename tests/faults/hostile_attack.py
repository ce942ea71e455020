"""A hostile file, what is done with it, and what came of it."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "ran"  # made in the attack's folder by code that was run


@dataclass(frozen=True)
class Attack:
    """name: what the file is. run(folder): writes it into the folder and hands it to the program as a user would.

    words: of the one line that refuses it, a regular expression; None where it is taken as what it seems to be, or
    left alone, and does no harm. slow: it takes more than a second.
    """

    name: str
    run: Callable[[Path], object]
    words: str | None = None
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """kind: "refused" (text: the line), "harmless", or "FAILED" (text: how)."""

    kind: str
    text: str = ""
    megabytes: int = 0  # of memory, where that was bounded


class Bomb:
    """Unpickled without care, it creates a file in the folder."""

    def __init__(self, folder: Path):
        self.path = str(folder / MARK)

    def __reduce__(self):
        return open, (self.path, "w")


def refusals() -> tuple[type[Exception], ...]:
    """The program's own errors that are imported by now: whatever may name a file to the user."""
    import sys

    places = {"data.articles": ("DataError",), "model.language_model": ("ModelError",),
              "utils.strict_json": ("ConfigError",), "utils.checkpoint": ("CheckpointError",),
              "utils.comparison": ("CompareError",), "data.cnn_dailymail": ("UsageError", "HubError")}
    return tuple(getattr(sys.modules[module], name) for module, names in places.items() if module in sys.modules
                 for name in names)


def carry_out(attack: Attack, folder: Path) -> Outcome:
    """What came of an attack, judged."""
    try:
        attack.run(folder)
        outcome = Outcome("harmless")
    except Exception as error:
        refused = isinstance(error, refusals())
        outcome = Outcome("refused", str(error)) if refused else Outcome("FAILED", f"{type(error).__name__}: {error}")
    if outcome.kind == "FAILED":
        return outcome
    if os.path.lexists(folder / MARK):
        return Outcome("FAILED", "code was run")
    if outcome.kind == "harmless" and attack.words is not None:
        return Outcome("FAILED", "it was taken")
    if outcome.kind == "refused" and attack.words is None:
        return Outcome("FAILED", f"it was refused: {outcome.text}")
    if outcome.kind == "refused" and not re.search(attack.words, outcome.text):
        return Outcome("FAILED", f"the refusal does not say {attack.words!r}: {outcome.text}")
    # Of a config each wrong value has a line.
    lines = outcome.text.split("\n")
    if len(lines) > (30 if ".json: " in lines[-1] else 1) or max(map(len, lines)) > 2000:
        return Outcome("FAILED", f"{len(lines)} lines, the longest of {max(map(len, lines))} characters")
    return outcome
