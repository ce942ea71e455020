"""Teacher outputs of a token table on disk, a flat file an array: computed once, then read with the batch.

A cache folder holds one flat `.bin` file for each array, over all label positions of the table in row order, and
`checks.bin` with a CRC-32 of each row: 0 where the row is not there yet. So a row that a killed process left half
written, or that the disk changed, is found when it is read, and made again. The folder is named by a hash of all that
decides the values; it is made beside its place and renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.articles import DataError
from data.digest import file_digest
from data.flat_array import FlatArray
from data.os_errors import describe
from data.scratch import made_folder, scratch_folder
from data.tokenized import TokenizedDataset

VERSION = 1  # raise it when the same key gives other files
CHECKS, MANIFEST = "checks.bin", "manifest.json"
ZEROS = bytes(1 << 20)
NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}  # by file systems that cannot reserve


class ArrayShape(NamedTuple):
    """width: values at each label position. dtype: NumPy's name of their type."""

    width: int
    dtype: str


class TeacherCache:
    """Arrays over the label positions of a table, written and read by rows."""

    def __init__(self, folder: Path, table: TokenizedDataset, arrays: Mapping[str, ArrayShape]):
        self.folder = folder
        self.writable = all(os.access(path, os.W_OK) for path in folder.glob("*.bin"))
        self._offsets = np.cumsum([0, *table.label_counts])
        self._arrays = {name: FlatArray(folder / f"{name}.bin", shape.dtype, shape.width, self.writable)
                        for name, shape in arrays.items()}
        self._checks = FlatArray(folder / CHECKS, "uint32", writable=self.writable)

    def missing(self) -> int:
        """Rows that are not there yet."""
        return int((self._checks[:] == 0).sum())

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray] | None:
        """Each array's values [N, width] at the label positions of `rows`, in that order; None where one row is
        missing, damaged or cannot be read (it then counts as missing)."""
        found = [self._row(row) for row in rows]
        for row, values in zip(rows, found, strict=True):
            if values is None and self.writable:
                with contextlib.suppress(OSError):
                    self._checks[row] = 0
        if any(values is None for values in found):
            return None
        return {name: np.concatenate([values[name] for values in found]) for name in self._arrays}

    def _row(self, row: int) -> dict[str, np.ndarray] | None:
        try:
            values = {name: array[self._part(row)] for name, array in self._arrays.items()}
            return values if self._checks[row] == checksum(values) else None
        except OSError:
            return None

    def write(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the values of those of `rows` that are missing; arrays as `read` gives them.

        What is there stays: values computed in another batch may differ in the last bit, and a step that is done again
        after a stop must read what it read before. Raises OSError.
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


def cache_folder(cache_dir: str | Path, table: TokenizedDataset, key: list) -> Path:
    """The folder of a table's cache: named by the table and a hash of `key`, JSON values that decide the content."""
    text = json.dumps([VERSION, table.folder.name, *key], sort_keys=True)
    return Path(cache_dir) / f"{table.folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def cache_bytes(table: TokenizedDataset, arrays: Mapping[str, ArrayShape]) -> int:
    """Size of a cache on disk, without what lies beside the arrays."""
    return sum(sizes(table, arrays).values())


def is_whole(folder: Path, table: TokenizedDataset, arrays: Mapping[str, ArrayShape]) -> bool:
    """Whether a cache's files are all there, as long as they must be; rows may be missing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        others, own = sorted(manifest["files"]), sizes(table, arrays)
        # They are written to: a link would lead that to a file elsewhere.
        if any(name != Path(name).name or (folder / name).is_symlink() for name in (*others, *own)):
            return False
        if manifest != manifest_of(folder, table, arrays, others):
            return False
        return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in own.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sizes(table: TokenizedDataset, arrays: Mapping[str, ArrayShape]) -> dict[str, int]:
    """Bytes of each file of a cache."""
    positions = int(table.label_counts.sum())
    of_arrays = {f"{name}.bin": positions * each.width * np.dtype(each.dtype).itemsize for name, each in arrays.items()}
    return {**of_arrays, CHECKS: 4 * len(table)}


def manifest_of(folder: Path, table: TokenizedDataset, arrays: Mapping[str, ArrayShape], others: list[str]) -> dict:
    """What the manifest must say; files that are no arrays are told by their SHA-256."""
    digests = {name: file_digest(folder / name) for name in others}
    shapes = {name: list(each) for name, each in sorted(arrays.items())}
    return {"version": VERSION, "rows": len(table), "arrays": shapes, "files": digests}


def reserve(path: Path, size: int) -> None:
    """A file of zeros that has its room on the disk, so that hours later there is no writing into it that fails."""
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
        for start in range(0, size, len(ZEROS)):
            file.write(ZEROS[: size - start])


def make_cache(
    folder: Path, table: TokenizedDataset, arrays: Mapping[str, ArrayShape],
    add_files: Callable[[Path], object] = lambda folder: None,
) -> None:
    """An empty cache at `folder`; add_files(folder) may put other files into it. A damaged one there is replaced.

    Raises:
        DataError: it cannot be written, or the disk has not enough room for all of it.
    """
    key = "distillation_kwargs.teacher_cache.dir"
    try:
        damaged = os.path.lexists(folder)  # one that comes from now on is another process's, and whole
        with made_folder(folder.parent), scratch_folder(folder.parent) as scratch:
            size, free = cache_bytes(table, arrays), shutil.disk_usage(folder.parent).free
            if size > free:
                raise DataError(
                    f"{key}: the cache of {table.folder.name} needs {size / 1e9:.2f} GB and {folder.parent} has "
                    f'{free / 1e9:.2f} GB: name a folder on another disk, or take kind "top_k" with a smaller top_k'
                )
            new = scratch / "cache"
            new.mkdir()
            for name, size in sizes(table, arrays).items():
                reserve(new / name, size)
            add_files(new)
            others = sorted(path.name for path in new.iterdir() if path.suffix != ".bin")
            manifest = manifest_of(new, table, arrays, others)
            (new / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            if damaged and not is_whole(folder, table, arrays):
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(scratch / "damaged")
            try:
                new.rename(folder)
            except OSError:
                if not is_whole(folder, table, arrays):  # else another process was as quick, and its cache is as good
                    raise
    except OSError as error:
        raise DataError(f"{key}: {describe(error, folder)}; or name another folder") from error
