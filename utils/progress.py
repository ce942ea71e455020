"""The one progress bar of a phase."""

import sys

from tqdm import tqdm

from utils.text import one_line


def progress_bar(description: str, total: int | None, unit: str, initial: int = 0, is_main: bool = True) -> tqdm:
    """A bar on stderr with rate and time left; only the main process shows it."""
    return tqdm(
        desc=one_line(description), total=total, unit=unit, initial=initial, disable=not is_main, dynamic_ncols=True,
        mininterval=0.5, smoothing=0.1, file=sys.stderr,
    )
