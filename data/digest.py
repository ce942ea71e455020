"""What tells whether a file is the one that was written."""

import hashlib
from os import PathLike


def file_digest(path: str | PathLike) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:  # noqa: PTH123 (also of a file descriptor)
        return hashlib.file_digest(file, "sha256").hexdigest()
