"""Progress bars."""

import sys

from tqdm import tqdm

from utils.text import one_line


def progress_bar(description: str, total: int | None, unit: str, initial: int = 0, is_main: bool = True) -> tqdm:
    """The one bar of a phase, with rate and time left, on stderr."""
    return tqdm(
        desc=one_line(description), total=total, unit=unit, initial=initial, disable=not is_main, dynamic_ncols=True,
        mininterval=0.5, smoothing=0.1, file=sys.stderr,
    )
