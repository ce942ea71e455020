"""Errors that end a command with one line, and the remedy for what the operating system refuses."""

import errno
from os import PathLike, fsdecode

REMEDIES = {
    errno.ENOSPC: "free space on that disk, or choose a folder on another one",
    errno.EDQUOT: "free space within your quota, or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written, or mount that disk for writing",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.ENOENT: "the file, or a folder on the way to it, does not exist: check the path",
}


class UserError(ValueError):
    """Something the user can fix: input, settings, files. The message is one line with the remedy."""

    exit_code = 2


class TrainingError(RuntimeError):
    """The run failed after it had started. The message is one line with the remedy."""

    exit_code = 1


def describe(error: OSError, path: str | PathLike | None = None) -> str:
    """`path: cause: remedy`. path: default the one that the error names."""
    path = error.filename if path is None else path
    parts = [fsdecode(path) if isinstance(path, str | bytes | PathLike) else None,
             " ".join(str(error.strerror or error).split()), REMEDIES.get(error.errno)]
    return ": ".join(part for part in parts if part)
