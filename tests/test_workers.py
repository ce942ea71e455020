"""Worker processes that the system has no room for: data/workers.py."""

import errno
import multiprocessing
import os
import resource

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.articles import DataError
from data.workers import as_many_as_asked, start_workers


def loader(workers: int) -> DataLoader:
    return DataLoader(np.arange(8), batch_size=None, num_workers=workers, generator=torch.Generator())


@pytest.fixture
def unheard(monkeypatch):
    """Errors of objects that are freed, which Python would print with a traceback."""
    heard = []
    monkeypatch.setattr("sys.unraisablehook", heard.append)
    return heard


def test_the_limit_of_open_files(unheard):
    """Fault: "Too many open files" without the key, then a traceback of "Exception ignored"; or a run that ends in its
    middle."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 24, limits[1]))
        with pytest.raises(DataError, match=r"^dataset_kwargs.num_workers is 8: that takes up to 80 open files more, "
                                            r"and the system gives \d+: lower it, or raise the limit of open files"):
            start_workers(loader(8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not unheard and not multiprocessing.active_children()


def test_a_limit_of_processes(unheard, monkeypatch):
    """Fault: the same where the system gives no more processes; or those that were started stay."""
    fork, forks = os.fork, []

    def few():
        forks.append(1)
        if len(forks) > 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", few)
    with pytest.raises(DataError, match=r"^dataset_kwargs.num_workers is 4: they cannot be started: Resource "
                                        r"temporarily unavailable: lower it, or end other programs$"):
        start_workers(loader(4))
    assert not unheard and len(forks) == 3 and not multiprocessing.active_children()


def test_workers_that_fit():
    """Fault: batches missing, or in another order."""
    assert [int(each) for each in start_workers(loader(2))] == list(range(8))


def test_more_workers_than_cores(recwarn):
    """Fault: a library's warning of three lines is shown for a number that the user has chosen."""
    with as_many_as_asked():
        made = loader((os.cpu_count() or 1) + 1)
    assert [int(each) for each in start_workers(made)] == list(range(8))
    assert not [each for each in recwarn if "DataLoader" in str(each.message)]
