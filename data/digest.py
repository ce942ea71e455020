"""What tells whether a file is the one that was written."""

import hashlib
from os import PathLike

from untrusted.files import open_regular


def file_digest(path: str | PathLike) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits. Raises OSError as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
