"""What is in a folder and not of the run that begins there: moved to an `earlier-run-N` in it."""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from utils.files import finish_writing, sync_folder
from utils.runs.checkpoint import CheckpointError

_MOVING = ".tmp-earlier-run"


def archive_previous_run(folder: Path, names: Iterable[str]) -> Path | None:
    """Move those of `names` that are in `folder` to a new `earlier-run-N` in it; returns that or None.

    The names are moved in their order. A call that was cut off by a kill is gone on with: what it had moved and what is
    moved now come to one `earlier-run-N`. Raises CheckpointError; everything is then as before the call.
    """
    folder = Path(folder)
    moving = folder / _MOVING
    present = [name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]
    try:
        if any(os.path.lexists(moving / name) for name in present):
            _finish(moving)
        if present:
            _move(present, folder, moving)
        return _finish(moving)
    except OSError as error:
        reason = f"{folder}: the earlier run's files cannot be set aside there ({error}); choose another output_dir"
        raise CheckpointError(reason) from error


def _move(names: list[str], folder: Path, moving: Path) -> None:
    moving.mkdir(exist_ok=True)
    moved = []
    try:
        for name in names:
            if (folder / name).is_dir():
                finish_writing(folder / name)  # nobody will write there again
            (folder / name).rename(moving / name)
            moved.append(name)
        sync_folder(moving)
    except OSError:
        with contextlib.suppress(OSError):
            for name in reversed(moved):
                (moving / name).rename(folder / name)
            moving.rmdir()
        raise


def _finish(moving: Path) -> Path | None:
    """`moving` under its last name; None where it is not there or was empty."""
    if not moving.is_dir():
        return None
    if not any(moving.iterdir()):
        moving.rmdir()
        return None
    numbers = [re.fullmatch(r"earlier-run-([0-9]+)", path.name) for path in moving.parent.iterdir()]
    place = moving.parent / f"earlier-run-{1 + max((int(match[1]) for match in numbers if match), default=0)}"
    moving.rename(place)
    sync_folder(moving.parent)
    return place
