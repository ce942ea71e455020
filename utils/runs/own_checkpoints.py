"""Checkpoints of this program that are named as a model: compared with their manifest before anything is read."""

import os
from pathlib import Path

from model.language_model import ModelError
from utils.runs.checkpoint import OTHER, CheckpointError, verify


def check_model_folder(path: str | None, key: str | None = None) -> None:
    """Raises ModelError where `path` is a checkpoint of a run and a file of its model is not as it was written.

    key: where the user named it, None where the caller tells that. Other folders, hub ids and files have no manifest:
    nothing is said of them.
    """
    if path is None or not os.path.lexists(Path(path, "trainer_state")):
        return
    try:
        verify(Path(path), model_only=True)
    except CheckpointError as error:
        where = "" if key is None else f"{key}: "
        remedy = f"name another checkpoint{others(Path(path))}"
        raise ModelError(f"{where}{str(error).removesuffix(OTHER)}{remedy}") from error


def others(folder: Path) -> str:
    """`, such as ...`: the newest step beside a damaged one that is whole; nothing where there is none."""
    folder = folder.resolve()
    steps = {int(path.name[5:]): path for path in folder.parent.glob("step-*") if path.name[5:].isdecimal()}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            if path != folder:
                verify(path)
                return f", such as {path}, which is whole"
        except CheckpointError:
            continue
    return ""
