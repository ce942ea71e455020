"""The log of a run: console lines, `metrics.jsonl`, and the same numbers as TensorBoard curves."""

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from utils.errors import describe
from utils.files import write_text
from utils.metrics_file import read_metrics
from utils.text import one_line

EVALUATION_SPLITS = ("validation", "test", "train_epoch")


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/` in output_dir. Processes other than the main one write nothing.

    When a file cannot be written, a full disk for example, the user is warned once and no step is lost: `flush`
    returns the reason at the next checkpoint. The curves are a second copy, without which a run simply continues.
    """

    def __init__(self, output_dir: Path, is_main: bool = True):
        self.path, self.is_main = Path(output_dir) / "metrics.jsonl", is_main
        self._file = self._curves = self._failure = None
        self._excepthook = threading.excepthook

    def open(self, step: int = 0, evaluation_pending: bool = False) -> None:
        """Start, or resume after optimizer step `step`.

        Lines of later steps, left by a killed process, are dropped, so no step appears twice; so are damaged lines.
        evaluation_pending: the evaluation at `step` will be repeated, so its lines are dropped too.

        Raises:
            OSError: `metrics.jsonl` cannot be read or written.
        """
        if not self.is_main:
            return
        if self.path.exists():
            lines, damaged = read_metrics(self.path)
            if damaged:
                self.info(f"{self.path}: dropped damaged lines {', '.join(map(str, damaged))}")
            kept = [line for line in lines if line["step"] < step or (
                line["step"] == step and not (evaluation_pending and line["split"] in EVALUATION_SPLITS))]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file, self._failure = self.path.open("a", encoding="utf-8"), None
        with self._second_copy():
            from torch.utils.tensorboard import SummaryWriter  # here, because the import takes seconds

            self._curves = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1, flush_secs=10)
            threading.excepthook = self._thread_failed

    def record(self, split: str, step: int, **values: float | int | None) -> None:
        """One line of `metrics.jsonl` (non-finite numbers become null) and one point on each curve."""
        if self._file is None:
            return
        values = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        if self._failure is None:
            try:
                self._file.write(json.dumps({"split": split, "step": step, **values}, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                self._failure = describe(error, self.path)
                self.info(f"{self._failure}; training continues to the next checkpoint")
        if self._curves is not None:
            with self._second_copy():
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._curves.add_scalar(f"{split}/{name}", value, step)

    def info(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(one_line(text), file=sys.stderr)

    def flush(self) -> str | None:
        """Flush everything to the disk. Returns the reason if lines of `metrics.jsonl` could not be written."""
        if self._file is not None and self._failure is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._failure = describe(error, self.path)
        if self._curves is not None:
            with self._second_copy():
                self._curves.flush()
        return self._failure

    def _thread_failed(self, args) -> None:
        """TensorBoard's writer thread would print a traceback for a full disk; the next flush reports it in a line."""
        if not isinstance(args.exc_value, OSError):
            self._excepthook(args)

    def close(self) -> None:
        threading.excepthook = self._excepthook
        files, self._file, self._curves = (self._curves, self._file), None, None
        for file in files:
            with contextlib.suppress(OSError, ValueError):  # `flush` has reported what matters
                if file is not None:
                    file.close()

    @contextlib.contextmanager
    def _second_copy(self) -> Iterator[None]:
        """If the curves cannot be written, the run continues without them."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._curves = None
            self.info(f"{self.path.parent / 'tensorboard'}: {error}; the run continues without curves, metrics.jsonl "
                      "has the same numbers")
