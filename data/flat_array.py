"""An array in a file, read and written by system calls.

A memory map would end the process by a signal (SIGBUS) where the disk fails, is full, or the file was cut short by
somebody else. Here that is an OSError. Processes that are forked may share one.
"""

import errno
import os
from pathlib import Path

import numpy as np


class FlatArray:
    """Rows of numbers, in the machine's byte order, without a header.

    dtype: NumPy's name of their type. width: numbers in a row; None where a row is one number. Every access by number
    or slice is one read or write; raises OSError.
    """

    def __init__(self, path: Path, dtype: str, width: int | None = None, writable: bool = False):
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self.row_bytes = self.dtype.itemsize * (1 if width is None else width)
        self._file = path.open("r+b" if writable else "rb", buffering=0)

    def __len__(self) -> int:
        return os.fstat(self._file.fileno()).st_size // self.row_bytes

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """A number or row, or rows of a slice without a step: [N] or [N, width]. Not to be written into."""
        start, stop = self._bounds(index)
        content = self._read((stop - start) * self.row_bytes, start * self.row_bytes)
        values = np.frombuffer(content, self.dtype)
        values = values if self.width is None else values.reshape(-1, self.width)
        return values if isinstance(index, slice) else values[0]

    def __setitem__(self, index: int | slice, values) -> None:
        start, stop = self._bounds(index)
        shape = (stop - start, *(() if self.width is None else (self.width,)))
        rest = memoryview(np.broadcast_to(values, shape).astype(self.dtype).tobytes())
        place = start * self.row_bytes
        while rest:
            written = write_at(self._file, rest, place)
            rest, place = rest[written:], place + written

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _bounds(self, index: int | slice) -> tuple[int, int]:
        if not isinstance(index, slice):
            return int(index), int(index) + 1
        return int(index.start or 0), len(self) if index.stop is None else int(index.stop)

    def _read(self, size: int, place: int) -> bytes:
        parts = []
        while size:
            part = read_at(self._file, size, place)
            if not part:
                raise OSError(errno.EIO, "cut short while it was in use", str(self.path))
            parts.append(part)
            size, place = size - len(part), place + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def read_at(file, size: int, place: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, place)
    file.seek(place)  # Windows, where no process is forked
    return file.read(size)


def write_at(file, content: memoryview, place: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), content, place)
    file.seek(place)
    return file.write(content)
