"""Files that strangers wrote, read without waiting for ever and without filling the memory."""

import errno
import json
import os
import re
import stat
from os import PathLike
from pathlib import Path
from typing import BinaryIO

SMALL = 10_000_000  # bytes of a config, a manifest or a state
LARGE = 1_000_000_000  # bytes of predictions
HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # where JSON writes a surrogate, and most often a pair
VALUES = 20_000_000  # commas and opening brackets of a JSON file: each value in it costs up to 72 bytes of memory


def open_regular(path: str | PathLike) -> BinaryIO:
    """The file, open for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file: reading from a pipe or a device may never end.
    """
    check_regular(path, Path(path).stat().st_mode)
    # The second look, at what was opened, is for what took its place in between; not waiting, for a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | PathLike, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))


def read_limited(path: str | PathLike, largest: int = SMALL) -> bytes:
    """The file's content. Raises OSError as `open_regular`, and where it is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > largest else file.read(size + 1)  # not more: a buffer of that size is made first
        if len(content) > size:  # it has grown meanwhile
            content += file.read(largest + 1 - len(content))
        if max(size, len(content)) > largest:
            raise OSError(errno.EINVAL, f"larger than {largest // 1_000_000} MB", str(path))
    return content


def load_json(path: str | PathLike, largest: int = SMALL):
    """The JSON value in a file (UTF-8).

    Raises:
        OSError: as `read_limited`.
        ValueError: not JSON, nested too deep, more than `VALUES` values, or text that is none.
    """
    content = read_limited(path, largest)
    check_json_size(content)
    check_json_text(content)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def check_json_size(content: bytes, most: int = VALUES) -> None:
    """ValueError for JSON of more values, before they take gigabytes: `[[],[],...` grows twentyfold in memory."""
    if sum(map(content.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"more than {most:,} values")


def check_json_text(content: bytes) -> None:
    """ValueError for JSON with half of a surrogate pair: it could be read, but not saved, shown or hashed."""
    if not HALF_A_PAIR.search(content):
        return
    try:
        json.dumps(json.loads(content), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        sign = error.object[error.start]
        raise ValueError(f"it holds the character \\u{ord(sign):04x}, which no text can: remove it") from error
    except (ValueError, RecursionError):  # what reads it will say so
        return
