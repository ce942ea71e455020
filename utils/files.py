"""Files that are either the old one or the whole new one, whatever interrupts the writing.

The order is the usual one (`man 2 rename`, `man 2 fsync`): write a temporary file in the same folder, flush it
to the disk, rename it over its place, flush the folder. Several files that belong together are made in a folder
`.tmp-together-...` and count from the moment when that is renamed to `.tmp-whole-...`: where a kill keeps them from
coming to their places, the next writer or reader brings them there (`finish_writing`).
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.scratch import WHOLE, dead, finish_move, is_at, lock, move_out, scratch_folder, whole_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TOGETHER = ".tmp-together-"
_TEMPORARY = re.compile(r"\.tmp-([0-9]+-[0-9a-f]{8}|(together|whole)-[a-z0-9_]{8})")
_INVISIBLE = re.compile(  # but for the joiners, which some scripts are written with
    "[\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
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
    """Strict JSON, indented, with a final newline; ValueError for NaN, infinities and what JSON has no type for.

    Control characters, and those that have no width or turn the direction of text, are escapes in it: it can be shown.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=2) + "\n"
        return _INVISIBLE.sub(lambda sign: json.dumps(sign[0])[1:-1], text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"not written, no JSON for it: {error}; use null, numbers, text, lists and objects") from error


def write_together(folder: str | os.PathLike, texts: Mapping[str, str]) -> None:
    """Write several files of one folder: all of them or none.

    Until every text is on the disk no file of the folder changes. Errors as in `write_text`. Files that are links to
    other folders are replaced one after the other. The caller sees to it that no other process writes them.
    """
    folder = Path(folder)
    contents = {_place(folder, name): _utf8(folder / name, text) for name, text in texts.items()}
    for target in contents:
        if target.is_dir():
            raise OSError(errno.EISDIR, "not written (is a folder)", str(target))
    parents = {target.parent for target in contents}
    if len(contents) > 1 and len(parents) == 1:
        _write_whole(parents.pop(), contents)
        return
    temporaries: dict[Path, Path] = {}
    with contextlib.ExitStack() as held:
        try:
            for target, content in contents.items():
                temporaries[target], descriptor = _locked_temporary(target)
                held.callback(os.close, descriptor)
                _fill(temporaries[target], descriptor, content, target)
            for target, temporary in temporaries.items():
                finish_writing(target.parent)
                with _names(target):
                    temporary.replace(target)
        finally:
            for temporary in temporaries.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
    for parent in parents:
        sync_folder(parent)


def finish_writing(folder: str | os.PathLike) -> None:
    """Mend what killed writers left in `folder`: files that were all written come to their places, others are deleted.

    What a living process is writing is left alone. Raises OSError where files cannot be brought to their places.
    """
    for path in dead(Path(folder), _TEMPORARY):
        if path.name.startswith(WHOLE):
            finish_move(path)
            sync_folder(folder)
        else:
            with contextlib.suppress(OSError):
                delete(path)


def sync_tree(folder: str | os.PathLike) -> None:
    """Flush every regular file and every folder below `folder`, and itself, to the disk (links are not followed)."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                with path.open("rb") as file:
                    sync_file(file.fileno(), path)
        sync_folder(parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to the disk, where the file system can do that."""
    with _opened_folder(folder) as descriptor:
        if descriptor is not None:
            sync_file(descriptor, folder)


def sync_file(descriptor: int, path: str | os.PathLike) -> None:
    """Flush an open file or folder to the disk, where the file system can do that. Raises OSError naming `path`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise OSError(error.errno, error.strerror, str(path)) from error


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
        held = descriptor is None or _lock(descriptor, time.monotonic() + wait_seconds)
        try:
            yield held
        finally:
            if held and descriptor is not None and fcntl is not None:
                with contextlib.suppress(OSError):  # closing alone would leave it to worker processes that still run
                    fcntl.flock(descriptor, fcntl.LOCK_UN)


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
        raise OSError(error.errno or errno.EIO, f"not written ({error.strerror or error})", str(target)) from error


def _write_whole(folder: Path, contents: Mapping[Path, bytes]) -> None:
    with contextlib.ExitStack() as held:
        with _names(next(iter(contents))):
            scratch = held.enter_context(scratch_folder(folder, _TOGETHER))
        for target, content in contents.items():
            with _names(target):
                descriptor = _new_file(scratch / target.name)
            held.callback(os.close, descriptor)
            _fill(scratch / target.name, descriptor, content, target)
        sync_folder(scratch)
        finish_writing(folder)
        with _names(folder):
            whole = scratch.rename(whole_name(scratch))
            sync_folder(folder)
            move_out(whole)
            sync_folder(folder)


def _locked_temporary(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, and a descriptor that holds its lock until it is closed."""
    with _names(target):
        while True:
            path = target.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
            descriptor = _new_file(path)
            lock(descriptor)
            if is_at(descriptor, path):
                return path, descriptor
            os.close(descriptor)  # another writer took it for a dead one's


def _new_file(path: Path) -> int:
    # os.open follows the umask; the tempfile module would make files that only their owner can read.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _fill(temporary: Path, descriptor: int, content: bytes, target: Path) -> None:
    """Write and flush the new file `temporary`, open as `descriptor` (which stays open), for the place `target`."""
    with _names(target):
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
            file.flush()
            sync_file(file.fileno(), target)
        # Only where they differ: some file systems know one mode and refuse every chmod.
        if target.exists() and (mode := target.stat().st_mode) != temporary.stat().st_mode:
            temporary.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def _opened_folder(folder: str | os.PathLike) -> Iterator[int | None]:
    try:
        # A pipe in a folder's place would make the opening wait for ever.
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NONBLOCK", 0))
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
