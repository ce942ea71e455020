"""What the operating system refused, in one line: path, cause and remedy."""

import errno
import re
from os import PathLike, fsdecode

REMEDIES = {
    errno.ENOSPC: "free space on that disk, or choose a folder on another one",
    errno.EDQUOT: "free space within your quota, or choose a folder on another disk",
    errno.EFBIG: "lift the file size limit (ulimit -f unlimited)",
    errno.EROFS: "choose a folder that can be written, or mount that disk for writing",
    errno.EACCES: "change its rights, or choose another folder",
    errno.EPERM: "change its rights, or choose another folder",
    errno.EIO: "the disk, or the way to it, fails: choose a folder on another one and save what is on this one",
    errno.ENOENT: "it, or a folder that it is in, is not there or was removed: check the path",
    errno.ENOTDIR: "a part of that path is a file: check the path",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.EEXIST: "something else has that name: move it away",
    errno.ENOTEMPTY: "something else has that name: move it away",
    errno.EBADF: "it is closed: redirect it to a file or /dev/null",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "a link is where a file or folder should be: remove it",
    errno.ESTALE: "the network folder was replaced: mount it again",
}

OF_DISK = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # what nothing but another disk, or room, helps against
# How libraries in Rust (tokenizers, safetensors) tell it, in classes of their own or in none.
OF_RUST = re.compile(r"(.*)\(os error ([0-9]+)\)", re.DOTALL)


def refusal(error: Exception) -> OSError | None:
    """What the system refused, as an OSError; None where the error is of another kind."""
    if isinstance(error, OSError):
        return error
    found = OF_RUST.fullmatch(str(error).strip())
    return OSError(int(found[2]), found[1].strip()) if found else None


def describe(error: OSError, path: str | PathLike | None = None) -> str:
    """`path: cause: remedy`; the path of the error where none is given."""
    place = path if path is not None else error.filename
    cause = " ".join(str(error.strerror or error).split())
    where = f"{fsdecode(place)}: " if isinstance(place, str | bytes | PathLike) else ""
    remedy = remedy_of(error)
    return f"{where}{cause}: {remedy}" if remedy else f"{where}{cause}"


def remedy_of(error: OSError) -> str | None:
    return REMEDIES.get(error.errno)
