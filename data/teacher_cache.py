"""A teacher's outputs for tokenised rows, on disk: filled once in row order, then read with each batch.

A cache folder holds one flat `.bin` file for each array, over the label positions of all rows in row order, and
`progress.json` with the number of rows stored so far. Its name holds a hash of everything that decides the values.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.articles import DataError
from data.tokenized import TokenizedDataset

VERSION = 2  # increase it when the same key gives other files
KEY = "distillation_kwargs.teacher_cache.dir"
ZEROS = bytes(1 << 20)


class ArrayShape(NamedTuple):
    """width: values at each label position. dtype: NumPy's name of their type."""

    width: int
    dtype: str


class TeacherCache:
    """Arrays over the label positions of a table, written and read by rows.

    key: JSON values that decide the content. rows: of the table. nbytes: size of the arrays.
    """

    def __init__(self, cache_dir: str | Path, table: TokenizedDataset, key: list, arrays: Mapping[str, ArrayShape]):
        text = json.dumps([VERSION, table.name, *key], sort_keys=True)
        self.folder = Path(cache_dir) / f"{table.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.name, self.rows = table.name, len(table)
        self._offsets = np.cumsum([0, *table.label_counts])
        self._shapes = arrays
        self._sizes = {name: int(self._offsets[-1]) * shape.width * np.dtype(shape.dtype).itemsize
                       for name, shape in arrays.items()}
        self.nbytes = sum(self._sizes.values())
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def rows_done(self) -> int:
        """Rows stored so far, the first ones of the table; 0 if a file is missing or has another size."""
        try:
            fit = all(self._path(name).stat().st_size == size for name, size in self._sizes.items())
            return json.loads((self.folder / "progress.json").read_text())["rows_done"] if fit else 0
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    def create(self) -> None:
        """Reserve space for all rows: a full disk shows now, and not after hours. Raises DataError, OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "progress.json").unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.nbytes > free:
            raise DataError(
                f"{KEY}: the cache of {self.name} needs {self.nbytes / 1e9:.2f} GB and {self.folder.parent} has "
                f'{free / 1e9:.2f} GB: name a folder on another disk, or use kind "top_k" with a smaller top_k'
            )
        for name, size in self._sizes.items():
            reserve(self._path(name), size)

    def open(self, writable: bool = False) -> None:
        """Map the arrays. Raises OSError."""
        for name, (width, dtype) in self._shapes.items():
            shape = int(self._offsets[-1]), width
            self._arrays[name] = np.memmap(self._path(name), dtype, "r+" if writable else "r", shape=shape)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Each array's values [N, width] at the label positions of `rows`, in that order; copies."""
        positions = self._positions(rows)
        return {name: np.asarray(array)[positions] for name, array in self._arrays.items()}

    def write(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Store values in the form that `read` returns."""
        positions = self._positions(rows)
        for name, array in self._arrays.items():
            array[positions] = values[name]

    def flush(self) -> None:
        """Wait until what was written is on disk. Raises OSError."""
        for array in self._arrays.values():
            array.flush()

    def save_progress(self, rows_done: int) -> None:
        """Note that all rows before `rows_done` are stored and flushed. Raises OSError."""
        temporary = self.folder / ".tmp-progress.json"
        temporary.write_text(json.dumps({"rows_done": rows_done}))
        temporary.replace(self.folder / "progress.json")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.arange(self._offsets[row], self._offsets[row + 1]) for row in rows])


def reserve(path: Path, size: int) -> None:
    """A file of zeros with its blocks on disk: writing to a map of a sparse file kills the process on a full disk."""
    with path.open("wb") as file:
        with contextlib.suppress(OSError, AttributeError):  # not every system and file system can
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, len(ZEROS)):
            file.write(ZEROS[: size - start])
