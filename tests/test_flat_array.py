"""Arrays in files: right values, errors instead of signals (data/flat_array.py, `reserve` of data/teacher_cache.py)."""

import errno
import os
import signal

import numpy as np
import pytest

from data import flat_array, teacher_cache
from data.flat_array import FlatArray
from data.teacher_cache import reserve


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(4 * 12))
    return path


def test_rows_are_read_as_they_were_written(path):
    """Rows shifted, mixed up, or in another type than they were written in."""
    array = FlatArray(path, "float32", 3, writable=True)
    expected = np.zeros((4, 3), "float32")
    for index, value in ((slice(1, 3), [[1, 2, 3], [4, 5, 6]]), (0, [7, 8, 9]), (slice(3, 4), np.float64(0.5))):
        array[index] = value
        expected[index] = value
        assert array[:].tolist() == expected.tolist()
    assert len(array) == 4 and array[2].tolist() == [4, 5, 6] and array[1:1].shape == (0, 3)
    assert np.memmap(path, "float32", "r", shape=(4, 3)).tolist() == expected.tolist()
    single = FlatArray(path, "uint32", writable=True)
    single[5] = np.uint32(4_000_000_000)
    assert single[5] == 4_000_000_000 and single[4:6].shape == (2,) and single[:].dtype == np.uint32


def test_a_short_file_is_an_error(path):
    """A file that is cut short while it is in use ends the process by SIGBUS, or gives rows of nothing."""
    array = FlatArray(path, "uint16", 2)
    assert array[11].tolist() == [0, 0]
    os.truncate(path, 41)
    for index in (11, 10, slice(9, 12), slice(0, 12)):
        with pytest.raises(OSError, match="cut short while it was in use") as caught:
            array[index]
        assert caught.value.filename == str(path)
    assert array[9].tolist() == [0, 0]


def test_pieces_are_put_together(path, monkeypatch):
    """A system that reads or writes fewer bytes than it was asked for loses the rest."""
    read, write = flat_array.read_at, flat_array.write_at
    monkeypatch.setattr(flat_array, "read_at", lambda file, size, place: read(file, min(size, 5), place))
    monkeypatch.setattr(flat_array, "write_at", lambda file, content, place: write(file, content[:7], place))
    array = FlatArray(path, "uint32", writable=True)
    array[1:11] = np.arange(1, 11)
    assert array[:].tolist() == [*range(11), 0]


def test_errors_come_through(path, monkeypatch):
    """A disk that refuses is not noticed, or a file that may only be read is written."""
    with pytest.raises(OSError, match=r"."):
        FlatArray(path, "uint32")[0] = 1
    assert path.read_bytes() == bytes(48)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        FlatArray(path, "uint32", writable=True)[0] = 1


def test_processes_that_are_forked_share_one(path):
    """Worker processes move each other's place in the file, and read other rows."""
    array = FlatArray(path, "uint32", writable=True)
    array[:] = np.arange(12)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            right = all(array[index] == index for _ in range(200) for index in range(12))
            os.kill(os.getpid(), signal.SIGKILL if right else signal.SIGTERM)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [signal.SIGKILL] * 3


def test_without_calls_at_a_place(path, monkeypatch):
    """On systems without pread and pwrite nothing can be read."""
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "pwrite")
    array = FlatArray(path, "uint32", writable=True)
    array[2:4] = [5, 6]
    assert array[1:5].tolist() == [0, 5, 6, 0]


# -- room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 3_000_000])
@pytest.mark.parametrize("reserving", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_room_is_there(tmp_path, monkeypatch, size, reserving):
    """A file full of holes: hours later there is no room for what is written into it."""
    def refuse(*arguments):
        raise OSError(reserving, "no")

    if reserving is not None:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    reserve(tmp_path / "a", size)
    found = (tmp_path / "a").stat()
    assert found.st_size == size and found.st_blocks * 512 >= size
    assert (tmp_path / "a").read_bytes() == bytes(size)


def test_no_room_is_an_error(tmp_path, monkeypatch):
    """A disk without room for the cache is noticed when it is full."""
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        reserve(tmp_path / "a", 4096)
