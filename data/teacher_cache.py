"""Teacher outputs of a token table on disk, a memory map an array: computed once, then read with the batch.

A cache folder holds one flat `.bin` file for each array, over all label positions of the table in row order, and
`checks.bin` with a CRC-32 of each row: 0 where the row is not there yet. So a row that a killed process left half
written, or that the disk changed, is found when it is read, and made again. The folder is named by a hash of all that
decides the values; it is made beside its place and renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.articles import DataError
from data.token_cache import TokenTable, digest

VERSION = 1  # raise it when the same key gives other files
CHECKS, MANIFEST = "checks.bin", "manifest.json"


class ArrayShape(NamedTuple):
    """width: values at each label position. dtype: NumPy's name of their type."""

    width: int
    dtype: str


class TeacherCache:
    """Arrays over the label positions of a table, written and read by rows."""

    def __init__(self, folder: Path, table: TokenTable, arrays: Mapping[str, ArrayShape]):
        self.folder = folder
        self.writable = all(os.access(path, os.W_OK) for path in folder.glob("*.bin"))
        mode = "r+" if self.writable else "r"
        self._offsets = np.cumsum([0, *table.label_counts])
        shapes = {name: (int(self._offsets[-1]), shape.width) for name, shape in arrays.items()}
        self._arrays = {name: np.memmap(folder / f"{name}.bin", arrays[name].dtype, mode, shape=shape)
                        for name, shape in shapes.items()}
        self._checks = np.memmap(folder / CHECKS, "uint32", mode, shape=(len(table),))

    def missing(self) -> int:
        """Rows that are not there yet."""
        return int((self._checks == 0).sum())

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray] | None:
        """Each array's values [N, width] at the label positions of `rows`, in that order; None where one row is
        missing or damaged (it then counts as missing)."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self._arrays}
        whole = True
        for row in rows:
            values = {name: np.array(array[self._part(row)]) for name, array in self._arrays.items()}
            if not self._checks[row] or self._checks[row] != checksum(values):
                whole = False
                if self.writable:
                    self._checks[row] = 0
            for name, value in values.items():
                parts[name].append(value)
        return {name: np.concatenate(values) for name, values in parts.items()} if whole else None

    def write(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the values of those of `rows` that are missing; arrays as `read` gives them.

        What is there stays: values computed in another batch may differ in the last bit, and a step that is done again
        after a stop must read what it read before.
        """
        ends = np.cumsum([self._offsets[row + 1] - self._offsets[row] for row in rows])[:-1]
        parts = {name: np.split(array, ends) for name, array in arrays.items()}
        for index, row in enumerate(rows):
            if self._checks[row]:
                continue
            values = {name: np.ascontiguousarray(part[index]) for name, part in parts.items()}
            for name, value in values.items():
                self._arrays[name][self._part(row)] = value
            self._checks[row] = checksum(values)

    def _part(self, row: int) -> slice:
        return slice(self._offsets[row], self._offsets[row + 1])


def checksum(values: Mapping[str, np.ndarray]) -> int:
    """CRC-32 over all arrays of a row; never 0, which means missing."""
    crc = 0
    for name in sorted(values):
        crc = zlib.crc32(values[name].tobytes(), crc)
    return crc or 1


def cache_folder(cache_dir: str | Path, table: TokenTable, key: list) -> Path:
    """The folder of a table's cache: named by the table and a hash of `key`, JSON values that decide the content."""
    text = json.dumps([VERSION, table.folder.name, *key], sort_keys=True)
    return Path(cache_dir) / f"{table.folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def cache_bytes(table: TokenTable, arrays: Mapping[str, ArrayShape]) -> int:
    """Size of a cache on disk, without what lies beside the arrays."""
    return sum(sizes(table, arrays).values())


def is_whole(folder: Path, table: TokenTable, arrays: Mapping[str, ArrayShape]) -> bool:
    """Whether a cache's files are all there, as long as they must be; rows may be missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest != manifest_of(folder, table, arrays, sorted(manifest["files"])):
            return False
        return all((folder / name).stat().st_size == size for name, size in sizes(table, arrays).items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sizes(table: TokenTable, arrays: Mapping[str, ArrayShape]) -> dict[str, int]:
    """Bytes of each file of a cache."""
    positions = int(table.label_counts.sum())
    of_arrays = {f"{name}.bin": positions * each.width * np.dtype(each.dtype).itemsize for name, each in arrays.items()}
    return {**of_arrays, CHECKS: 4 * len(table)}


def manifest_of(folder: Path, table: TokenTable, arrays: Mapping[str, ArrayShape], others: list[str]) -> dict:
    """What the manifest must say; files that are no arrays are told by their SHA-256."""
    digests = {name: digest(folder / name) for name in others}
    shapes = {name: list(each) for name, each in sorted(arrays.items())}
    return {"version": VERSION, "rows": len(table), "arrays": shapes, "files": digests}


def reserve(path: Path, size: int) -> None:
    """A file of zeros that has its room on the disk, so that writing into it cannot fail later."""
    with path.open("wb") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def make_cache(
    folder: Path, table: TokenTable, arrays: Mapping[str, ArrayShape],
    add_files: Callable[[Path], object] = lambda folder: None,
) -> None:
    """An empty cache at `folder`; add_files(folder) may put other files into it. A damaged one there is replaced.

    Raises:
        DataError: it cannot be written, or the disk has not enough room for all of it.
    """
    key = "distillation_kwargs.teacher_cache.dir"
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        size, free = cache_bytes(table, arrays), shutil.disk_usage(folder.parent).free
        if size > free:
            raise DataError(
                f"{key}: the cache of {table.folder.name} needs {size / 1e9:.2f} GB and {folder.parent} has "
                f'{free / 1e9:.2f} GB: name a folder on another disk, or take kind "top_k" with a smaller top_k'
            )
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        new = scratch / "cache"
        new.mkdir()
        for name, size in sizes(table, arrays).items():
            reserve(new / name, size)
        add_files(new)
        others = sorted(path.name for path in new.iterdir() if path.suffix != ".bin")
        manifest = manifest_of(new, table, arrays, others)
        (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        if not is_whole(folder, table, arrays):
            with contextlib.suppress(FileNotFoundError):
                folder.rename(scratch / "damaged")
        try:
            new.rename(folder)
        except OSError:
            if not is_whole(folder, table, arrays):  # else another process was as quick, and its cache is as good
                raise
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{key}: {folder} cannot be written ({reason}): make room for it, or name another") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
