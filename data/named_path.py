"""Paths as users write them: in JSON and in `--flag=~/x` no shell replaces a `~` in front, so it is done here."""

import os
from pathlib import Path


def at_home(name: str) -> str:
    """`~` and `~user` in front are that user's home, as in the shell; of a user that there is not, as they are."""
    return os.path.expanduser(name)  # noqa: PTH111 (that of Path fails where there is no such user)


def named_path(name: str) -> Path:
    """A path of the command line."""
    return Path(at_home(name))
