"""Where validate_model.py puts its results: looked at before hours of decoding, which end in files even so."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.os_errors import describe
from utils.config_files import ConfigError
from utils.files import finish_writing, write_together


def make_folder(output_dir: Path) -> None:
    """Raises ConfigError."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {describe(error, output_dir)}") from error


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
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="validate_model-"))
            write_together(elsewhere, texts)
        except OSError:
            raise error from None
        raise OSError(f"{describe(error)}; the results are in {elsewhere} instead") from error
