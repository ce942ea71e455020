"""Processes that prepare batches: as many as the system has room for, or one line."""

import errno
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import DataLoader

from data.articles import DataError
from data.os_errors import describe

KEY = "dataset_kwargs.num_workers"
OPEN_FILES = 10  # of a worker, in the process that it works for: four pipes, and three tensors of each batch ahead


@contextmanager
def as_many_as_asked() -> Iterator[None]:
    """Without the library's warning that they are more than the cores: the user has chosen the number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def start_workers(loader: DataLoader):
    """The loader's iterator. Raises DataError where its workers cannot be started."""
    check_open_files(loader.num_workers)
    try:
        with as_many_as_asked():
            return iter(loader)
    except OSError as error:
        end_started(error)
        raise DataError(f"{KEY} is {loader.num_workers}: they cannot be started: {describe(error)}: lower it, or end "
                        "other programs") from error


def check_open_files(workers: int) -> None:
    """Raises DataError where so many workers would run into the limit of open files, perhaps only later on."""
    opened = []
    try:
        for _ in range(OPEN_FILES * workers):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise DataError(f"{KEY} is {workers}: that takes up to {OPEN_FILES * workers} open files more, and the system "
                        f"gives {len(opened)}: lower it, or raise the limit of open files (ulimit -n)") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def end_started(error: OSError) -> None:
    """Ends the workers of an iterator whose making failed: its own way to end them expects it to be whole."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if hasattr(made, "_shutdown_workers"):
            made._shutdown = True
            for worker in getattr(made, "_workers", ()):
                worker.kill()
                worker.join()
