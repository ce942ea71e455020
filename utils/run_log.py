"""What a run tells: the console, `metrics.jsonl` and TensorBoard curves."""

import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from utils.files import write_text


class RunLog:
    """Writes `metrics.jsonl` and `tensorboard/` in output_dir. A process that is not the main one writes nothing."""

    def __init__(self, output_dir: Path, is_main: bool = True):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.is_main = is_main
        self._file = None
        self._board = None

    def open(self, step: int = 0, evaluation_pending: bool = False) -> None:
        """Start, or go on after optimizer step `step`.

        Lines of later steps, left by the process that was killed, are dropped: no step appears twice.
        evaluation_pending: the validation at `step` will be done again, so its line is dropped too.
        """
        if not self.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if belongs_before(line, step, evaluation_pending)]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second

        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def record(self, split: str, step: int, **values: float | int | None) -> None:
        """One line of `metrics.jsonl` (a number that is not finite becomes null) and its curves."""
        if self._file is None:
            return
        line = {"split": split, "step": step, **{key: finite(value) for key, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in line.items():
            if key not in ("split", "step") and isinstance(value, (int, float)):
                self._board.add_scalar(f"{split}/{key}", value, step)

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = self._board = None


def progress_bar(description: str, total: int | None, unit: str, initial: int = 0, is_main: bool = True) -> tqdm:
    """The one bar of a phase, with rate and time left."""
    return tqdm(
        desc=description, total=total, unit=unit, initial=initial, disable=not is_main, dynamic_ncols=True,
        mininterval=0.5, smoothing=0.1, file=sys.stderr,
    )


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a line that a killed process left unfinished is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def belongs_before(line: dict, step: int, evaluation_pending: bool) -> bool:
    if evaluation_pending and line.get("split") in ("validation", "test", "train_epoch"):
        return line.get("step", 0) < step
    return line.get("step", 0) <= step


def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
