"""Folders that scripts write into: looked at before hours of work, the results of which end in files even so."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.os_errors import describe
from data.scratch import made_folder
from utils.config.load import ConfigError
from utils.files import finish_writing, write_together
from utils.runs.run_lock import hold

CHECKPOINTS = "model_checkpoints"  # in the folder of a training
STATE = "trainer_state"  # in a checkpoint
OF_CHECKPOINT = re.compile(r"step-[0-9]+|last|best")


@contextmanager
def output_folder(output_dir: Path, key: str) -> Iterator[None]:
    """The folder, made with its parents; where what is done in it fails, those made go again that are empty.

    key: where the user named it. Raises ConfigError: it cannot be made, or a training keeps its checkpoints there.
    """
    with ExitStack() as stack:
        try:
            check_no_checkpoints(output_dir, key)
            stack.enter_context(made_folder(output_dir))
        except OSError as error:
            raise ConfigError(f"{key}: {describe(error, output_dir)}") from error
        yield


@contextmanager
def result_folder(output_dir: Path, names: tuple[str, ...]) -> Iterator[list[str]]:
    """Where validate_model.py puts files of these names: made, and held against other runs; yields notices.

    Raises:
        ConfigError: they cannot be written there, or the folder is a training's or in use.
    """
    key = "--output_dir"
    if is_of_training(output_dir):
        raise ConfigError(f"{key}: {output_dir} is the folder of a training, which has scores of its own: name another "
                          f"folder, such as {output_dir / 'evaluation'}")
    with output_folder(output_dir, key), hold(output_dir, key) as notices:
        check_writable(output_dir, names)
        yield notices


def check_no_checkpoints(output_dir: Path, key: str) -> None:
    """Raises ConfigError for a folder of checkpoints, a checkpoint, and a folder in one: a training replaces and
    deletes what is there, and cannot save while another run holds it."""
    folder = Path(os.path.realpath(output_dir))
    is_one = folder.parent.name == CHECKPOINTS and OF_CHECKPOINT.fullmatch(folder.name)
    is_in_one = any((each / STATE).is_dir() for each in (folder, *folder.parents))
    holds_some = any(OF_CHECKPOINT.fullmatch(path.parent.name) for path in folder.glob(f"*/{STATE}"))
    if folder.name == CHECKPOINTS or is_one or is_in_one or holds_some:
        raise ConfigError(f"{key}: {output_dir} is a place for the checkpoints of a training: name another folder")


def is_of_training(folder: Path) -> bool:
    if os.path.lexists(folder / CHECKPOINTS):
        return True
    with suppress(OSError, ValueError, TypeError):
        return "_description_environment" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return False


def check_links(output_dir: Path, names: Iterable[str], key: str) -> None:
    """Raises ConfigError where one of these is a link to a file elsewhere, which would be written. key: in the message.

    A folder may be a link, to another disk: in there nothing is written but files of these names.
    """
    inside = output_dir.resolve()
    for path in (output_dir / name for name in names):
        if path.is_symlink() and not path.is_dir() and not path.resolve().is_relative_to(inside):
            raise ConfigError(f"{key}: {path} is a link to {path.resolve()}, outside of the folder: remove the link")


def check_writable(output_dir: Path, names: tuple[str, ...]) -> None:
    """Whether files of these names can be put there; what a killed run was writing there is finished first. Raises
    ConfigError."""
    check_links(output_dir, names, "--output_dir")
    try:
        finish_writing(output_dir)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ConfigError(f"--output_dir {describe(error, output_dir)}") from error
    for name in names:
        if (output_dir / name).is_dir():
            raise ConfigError(f"--output_dir {output_dir}: {name} is a folder there: name another folder")


def write_results(output_dir: Path, texts: Mapping[str, str]) -> None:
    """All files or none. Raises OSError, which says where they are instead if the system's temporary folder takes
    them."""
    try:
        write_together(output_dir, texts)
    except OSError as error:
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="validate_model-"))
            write_together(elsewhere, texts)
        except OSError:
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
            raise error from None
        raise OSError(f"{describe(error)}; the results are in {elsewhere} instead") from error
