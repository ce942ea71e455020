"""Files that are either the old one or the whole new one, whatever interrupts the writing.

The order is the usual one (`man 2 rename`, `man 2 fsync`): write a temporary file in the same folder, flush it
to the disk, rename it over its place, flush the folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What file systems answer where flushing or locking does not exist for this kind of file.
_NOT_SUPPORTED = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EISDIR, errno.ENOTSUP}


def write_text(path: str | os.PathLike, text: str) -> None:
    """Put `text` (UTF-8, newlines as they are) at `path`; on any failure the earlier file stays and nothing is left.

    An earlier file keeps its permission mode, and a symbolic link stays a link (its target is replaced).
    Raises OSError naming `path`, and ValueError for text that UTF-8 cannot hold.
    """
    write_together(Path(path).parent, {Path(path).name: text})


def write_json(path: str | os.PathLike, value: object) -> None:
    """As `write_text`, with `json_text(value)`; ValueError names `path`."""
    try:
        text = json_text(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, text)


def json_text(value: object) -> str:
    """Strict JSON, indented, with a final newline; ValueError for NaN, infinities and what JSON has no type for."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=2) + "\n"
    except (ValueError, TypeError) as error:
        raise ValueError(f"not written, no JSON for it: {error}; use null, numbers, text, lists and objects") from error


def write_together(folder: str | os.PathLike, texts: Mapping[str, str]) -> None:
    """Write several files of one folder: all to temporaries first, then each renamed to its name in turn.

    Until every text is on the disk no file of the folder changes. Errors as in `write_text`.
    """
    folder = Path(folder)
    contents = {_place(folder, name): _utf8(folder / name, text) for name, text in texts.items()}
    for target in contents:
        if target.is_dir():
            raise OSError(errno.EISDIR, "is a folder (not written; choose another folder for it)", str(target))
    temporaries: dict[Path, Path] = {}
    try:
        for target, content in contents.items():
            temporaries[target] = target.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
            _write_new(temporaries[target], content, target)
        for target, temporary in temporaries.items():
            with _names(target):
                temporary.replace(target)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    for parent in {target.parent for target in contents}:
        sync_folder(parent)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: str | os.PathLike) -> None:
    """Flush every regular file and every folder below `folder`, and itself, to the disk (links are not followed)."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                with path.open("rb") as file:
                    _sync(file.fileno())
        sync_folder(parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to the disk, where the file system can do that."""
    with _opened_folder(folder) as descriptor:
        if descriptor is not None:
            _sync(descriptor)


def delete(path: str | os.PathLike) -> None:
    """Delete a file, a link (not what it points to) or a folder with all that is in it."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the folder against other writers; yields False if another holds it after `wait_seconds`.

    The system frees the lock of a process that dies. File systems without locks answer True: there two writers
    are not told apart.
    """
    with _opened_folder(folder) as descriptor:
        yield descriptor is None or _lock(descriptor, time.monotonic() + wait_seconds)


def _place(folder: Path, name: str) -> Path:
    if name != Path(name).name:
        raise ValueError(f"{name!r}: not a plain file name; give the folder apart ({folder})")
    return Path(os.path.realpath(folder / name))


def _utf8(path: Path, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: not written, text that UTF-8 cannot hold: {error}; remove that character") from error


@contextlib.contextmanager
def _names(target: Path) -> Iterator[None]:
    """Errors of a temporary file are told with the name of the file that it stands for."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} (not written; check the folder, its rights and free space)"
        raise OSError(error.errno or errno.EIO, reason, str(target)) from error


def _write_new(temporary: Path, content: bytes, target: Path) -> None:
    with _names(target):
        # os.open follows the umask; the tempfile module would make files that only their owner can read.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno())
        # Only where they differ: some file systems know one mode and refuse every chmod.
        if target.exists() and (mode := target.stat().st_mode) != temporary.stat().st_mode:
            temporary.chmod(stat.S_IMODE(mode))


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


@contextlib.contextmanager
def _opened_folder(folder: str | os.PathLike) -> Iterator[int | None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> bool:
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        except OSError:
            break
    return True
