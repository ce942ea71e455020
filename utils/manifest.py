"""The manifest of a checkpoint folder: sizes and SHA-256 of its files, checked before any of them is used."""

import json
import os
from pathlib import Path

from utils.errors import UserError
from utils.files import sha256_file, write_json

FORMAT_VERSION = 1
TRAINER_STATE = "trainer_state"
STATE = f"{TRAINER_STATE}/state.json"
MANIFEST = f"{TRAINER_STATE}/manifest.json"


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message is one line with folder and reason."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def write_manifest(folder: Path) -> None:
    """Describe every file of the folder in MANIFEST, which must not exist yet."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": files})


def verify(folder: Path, model_only: bool = False) -> None:
    """Compare a checkpoint folder, or what a link points to, with its manifest: all sizes first, then the hashes.

    model_only: skip the files in trainer_state/, which a model does not need.
    Raises CheckpointError naming the first file that is not as it was written.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    folder = folder.resolve()
    try:
        entries = read_json(folder / MANIFEST)["files"].items()
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries
                 if not (model_only and name.startswith(f"{TRAINER_STATE}/"))}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: changed since it was written, it has no list of files") from error
    try:
        for name, (size, _) in files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: missing")
            if (found := (folder / name).stat().st_size) != size:
                raise CheckpointError(f"{folder / name}: {'cut short' if found < size else 'changed'}, {found} bytes "
                                      f"instead of {size}")
        for name, (_, digest) in files.items():
            if sha256_file(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: changed since it was written (other SHA-256)")
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def read_json(path: Path) -> dict:
    """STATE or MANIFEST of a checkpoint. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so this is no complete checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: changed since it was written, not readable ({error})") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is {version!r:.80}, this program reads {FORMAT_VERSION}")
    return value


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all `step-N` in a folder of checkpoints, newest first."""
    found = [(path.name[5:], path) for path in root.glob("step-*") if path.is_dir()]
    return sorted(((int(step), path) for step, path in found if step.isdecimal()), reverse=True)


def check_model_folder(path: str | None, key: str) -> None:
    """If `path` is a checkpoint of a training, verify the files of its model; other folders have no manifest.

    key: the setting that names the folder. Raises CheckpointError.
    """
    if path is not None and os.path.lexists(Path(path, TRAINER_STATE)):
        try:
            verify(Path(path), model_only=True)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}; name another checkpoint") from error
