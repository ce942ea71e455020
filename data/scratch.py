"""Files and folders in the making, locked by their maker: whoever comes next can tell what a dead one left behind.

The system frees the lock of a process that dies. Where a file system has no locks, nothing tells the dead from the
living, and what they left stays.
"""

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BUILDING = ".building-"
WHOLE = ".tmp-whole-"  # complete, and on the way to the places of its files
_RANDOM = r"[a-z0-9_]{8}"  # mkdtemp's names


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """The folder, with its parents; where what is done in it fails, those of them that it has made and that are empty
    go again. Raises OSError where it cannot be made."""
    absent = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    made: list[tuple[Path, os.stat_result]] = []
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        finally:
            made += [(path, os.lstat(path)) for path in absent if os.path.lexists(path)]
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path, own in made:
                if os.path.samestat(os.lstat(path), own):  # and not one that somebody has put in its place
                    path.rmdir()
        raise


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str = BUILDING) -> Iterator[Path]:
    """An empty folder in `parent`, deleted at the end. What dead processes left there of this prefix goes first."""
    clear_dead(parent, prefix)
    path, descriptor = _locked_folder(parent, prefix)
    try:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def clear_dead(parent: Path, prefix: str = BUILDING) -> None:
    """Delete the scratch folders of dead processes in `parent`; what cannot be deleted stays."""
    with contextlib.suppress(OSError):
        for path in dead(parent, re.compile(re.escape(prefix) + _RANDOM)):
            shutil.rmtree(path, ignore_errors=True)


def place_together(scratch: Path) -> None:
    """The files of a scratch folder to the folder that it is in: all of them, by `finish_moves` if this is cut off."""
    move_out(scratch.rename(whole_name(scratch)))


def whole_name(scratch: Path) -> Path:
    return scratch.with_name(WHOLE + scratch.name[-8:])


def finish_moves(folder: Path) -> None:
    """What dead processes were cut off from moving to its places. Raises OSError."""
    for path in dead(folder, re.compile(re.escape(WHOLE) + _RANDOM)):
        finish_move(path)


def finish_move(whole: Path) -> None:
    """The same for one path of such a name. Where it is no folder, none of these programs made it: it is deleted."""
    if not whole.is_dir() or whole.is_symlink():
        with contextlib.suppress(OSError):
            whole.unlink()
        return
    try:
        move_out(whole)
    except OSError as error:
        cause = f"{error.strerror or error} (of what an earlier program left in {whole.name})"
        raise OSError(error.errno, cause, str(whole)) from error


def move_out(whole: Path) -> None:
    """The files of a folder to the one that it is in, in the order of their names; then it is deleted."""
    for path in sorted(whole.iterdir()):
        if path.is_file() and not path.is_symlink():
            path.replace(whole.parent / path.name)
    shutil.rmtree(whole)


def dead(parent: Path, names: re.Pattern) -> Iterator[Path]:
    """Each file and folder of such a name in `parent` that no living process holds; held until the next is taken."""
    for path in sorted(path for path in Path(parent).iterdir() if names.fullmatch(path.name)):
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:  # gone meanwhile, a link, or another user's
            continue
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR) and lock(descriptor, wait=False) and is_at(descriptor, path):
                yield path
        finally:
            os.close(descriptor)


def lock(descriptor: int, wait: bool = True) -> bool:
    """Whether the lock is held now: not where another holds it, or where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is (still) what is at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # Windows opens no folders
            return path, None
        except FileNotFoundError:
            continue
        lock(descriptor)
        if is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # taken for a dead one's between the making and the locking
