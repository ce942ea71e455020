"""Atomic writes: a file is either the old one or the complete new one, whatever interrupts the writing."""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

# What file systems answer that cannot flush a folder; Windows does not even open one.
_NOT_SUPPORTED = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EISDIR, errno.ENOTSUP}


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace `path` by `text` (UTF-8, newlines as they are). If this fails, the earlier file stays.

    A symbolic link stays a link: the file it points to is replaced. One writer at a time.
    Raises OSError naming `path`, and ValueError for text that UTF-8 cannot encode.
    """
    target = Path(os.path.realpath(path))
    # One name per target, so that the next write clears away what a killed process left.
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(target.parent)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"not written ({error.strerror or error})", str(path)) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: not written, text that UTF-8 cannot encode: {error}") from error


def write_json(path: str | os.PathLike, value: object) -> None:
    """`write_text` of `json_text`."""
    try:
        text = json_text(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not written, not JSON: {error}") from error
    write_text(path, text)


def json_text(value: object) -> str:
    """Strict JSON, indented, with a final newline. Raises ValueError or TypeError (NaN, infinities, other types)."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=2) + "\n"


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Flush a file or the entries of a folder to the disk, if the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from error


def sync_tree(folder: str | os.PathLike) -> None:
    """Flush every file and folder below `folder`, and itself."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(parent)
