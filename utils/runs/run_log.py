"""What a run tells: the console, `metrics.jsonl` and TensorBoard curves."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from data.os_errors import describe
from data.scratch import is_at
from utils.files import sync_file, write_text
from utils.runs.curves import Curves
from utils.text import one_line

LONGEST_LINE = 100_000  # bytes of metrics.jsonl


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/` in output_dir. A process that is not the main one writes nothing.

    A disk that refuses a line stops no step: lines wait and are tried again with the next one, and `settle` says at
    the next checkpoint whether they are there. The curves are a second copy, which a run does without.
    """

    def __init__(self, output_dir: Path, is_main: bool = True):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.is_main = is_main
        self._file = None
        self._curves: Curves | None = None
        self._waiting = b""
        self._refusal: str | None = None

    def open(self, step: int = 0, evaluation_pending: bool = False) -> None:
        """Start, or go on after optimizer step `step`, in a folder that is there.

        Lines of later steps, left by the process that was killed, are dropped: no step appears twice. A file with
        damaged lines is kept beside, and told.
        evaluation_pending: the validation at `step` will be done again, so its line is dropped too.

        Raises:
            OSError: `metrics.jsonl` cannot be read or written.
        """
        if not self.is_main:
            return
        if self.path.exists():
            lines, damaged = split_lines(self.path.read_bytes())
            if damaged:
                copy = keep_copy(self.path)
                self.info(f"{self.path}: line {', '.join(map(str, damaged[:8]))}{' ...' * (len(damaged) > 8)} cannot "
                         f"be read and is left out; the file as it was is kept as {copy.name}")
            kept = [line for line in lines if belongs_before(line, step, evaluation_pending)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._folder = identity(self.path.parent)
        self._file = self.path.open("ab", buffering=0)
        try:
            self._curves = Curves(self.path.parent / "tensorboard", purge_step=step + 1)
        except OSError as error:
            self._without_curves(error)

    def record(self, split: str, step: int, **values: float | int | None) -> None:
        """One line of `metrics.jsonl` (a number that is not finite becomes null) and its curves."""
        if self._file is None:
            return
        line = {"split": split, "step": step, **{key: finite(value) for key, value in values.items()}}
        self._waiting += (json.dumps(line, allow_nan=False) + "\n").encode()
        self._write()
        if self._curves is not None:
            points = {f"{split}/{key}": value for key, value in line.items()
                      if key not in ("split", "step") and isinstance(value, (int, float))}
            try:
                self._curves.add(step, points)
            except OSError as error:
                self._without_curves(error)

    def info(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(one_line(text), file=sys.stderr)

    def settle(self) -> str | None:
        """Puts all lines on the disk; why that cannot be, in one line, or None.

        Raises:
            OSError: another folder is in the place of the run folder, so nothing more may be written there.
        """
        if self._file is None:
            return None
        now = identity(self.path.parent)
        if now is None:
            return f"{self.path.parent} was removed or moved while the run wrote to it"
        if now != self._folder:
            raise OSError(f"{self.path.parent} was replaced by another folder while the run wrote to it: the newest "
                          "checkpoint is where that folder was moved to")
        try:
            if not is_at(self._file.fileno(), self.path):
                before, self._file = self._file, self.path.open("ab", buffering=0)
                before.close()
                self.info(f"{self.path} was removed or replaced while the run wrote to it: its earlier lines are gone")
            self._write()
            sync_file(self._file.fileno(), self.path)
        except OSError as error:
            return describe(error, self.path)
        return self._refusal

    def flush(self) -> None:
        """Raises OSError if lines cannot be written."""
        if refusal := self.settle():
            raise OSError(refusal)

    def close(self) -> None:
        if self._file is not None:
            self._write()
            self._file.close()
            self._file = None
        if self._curves is not None:
            with contextlib.suppress(OSError):
                self._curves.close()
            self._curves = None

    def _write(self) -> None:
        """Append what waits, or none of it: no reader finds half a line."""
        rest, length = self._waiting, -1
        try:
            length = self._file.seek(0, os.SEEK_END)
            while rest:
                rest = rest[self._file.write(rest):]
            self._waiting, self._refusal = b"", None
        except OSError as error:
            with contextlib.suppress(OSError):  # -1: not even asked for
                self._file.truncate(length)
            if self._refusal is None:
                self.info(f"{describe(error, self.path)}; its lines wait and are tried again")
            self._refusal = describe(error, self.path)

    def _without_curves(self, error: OSError) -> None:
        """The curves end here; `metrics.jsonl` has the same numbers."""
        self.info(f"{describe(error, self.path.parent / 'tensorboard')}; the run goes on without curves, metrics.jsonl "
                 "has the same numbers")
        curves, self._curves = self._curves, None
        if curves is not None:
            with contextlib.suppress(OSError):
                curves.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl` that can be read. Raises OSError."""
    return split_lines(path.read_bytes())[0]


def split_lines(content: bytes) -> tuple[list[dict], list[int]]:
    """(the lines of a `metrics.jsonl`, numbers from 1 of the damaged ones).

    A last line without an end is one that a killed process left unfinished: it is left out, and not damaged.
    """
    lines, damaged = [], []
    *texts, _ = content.split(b"\n")
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text) if len(text) <= LONGEST_LINE else None
            if type(line) is not dict or type(line["step"]) is not int or type(line["split"]) is not str:
                raise ValueError("no line of a run")
            lines.append(line)
        except (ValueError, KeyError, RecursionError):
            damaged.append(number)
    return lines, damaged


def keep_copy(path: Path) -> Path:
    """A copy of the file beside it, under a name that is free."""
    copies = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in range(1, 10**6))
    copy = next(each for each in copies if not os.path.lexists(each))
    copy.write_bytes(path.read_bytes())
    return copy


def belongs_before(line: dict, step: int, evaluation_pending: bool) -> bool:
    if evaluation_pending and line["split"] in ("validation", "test", "train_epoch"):
        return line["step"] < step
    return line["step"] <= step


def identity(folder: Path) -> tuple[int, int] | None:
    """What makes a folder itself, whatever its name; None where there is none to be reached."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
