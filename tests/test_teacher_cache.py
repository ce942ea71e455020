"""Teacher outputs on disk: what is written is read, what is damaged or stale is made again: data/teacher_cache.py."""

import errno
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data import teacher_cache
from data.articles import DataError
from data.prompts import PromptFormat
from data.teacher_cache import (
    ArrayShape,
    TeacherCache,
    cache_bytes,
    cache_folder,
    checksum,
    is_whole,
    make_cache,
)
from data.tokenized import TokenizedDataset, open_token_table
from tests.conftest import byte_tokenizer, write_rows

ARRAYS = {"ids": ArrayShape(3, "uint16"), "log_probs": ArrayShape(2, "float32")}
HIGHLIGHTS = ["ab", "abcdef", "a", "abcd", "abc"]
COUNTS = [4, 8, 3, 6, 5]  # labels: a space, the bytes, the end-of-text
BINARIES = ["ids.bin", "log_probs.bin", "checks.bin"]
KEY = "distillation_kwargs.teacher_cache.dir"


def make_table(folder: Path, highlights: list[str] = HIGHLIGHTS) -> TokenizedDataset:
    rows = [{"id": str(number), "article": "news", "highlights": text} for number, text in enumerate(highlights)]
    return open_token_table(write_rows(folder / "rows.csv", rows), PromptFormat(byte_tokenizer()), folder / "tokens")


@pytest.fixture
def table(tmp_path) -> TokenizedDataset:
    return make_table(tmp_path)


@pytest.fixture
def folder(tmp_path, table) -> Path:
    """An empty cache with one file beside its arrays."""
    folder = cache_folder(tmp_path / "cache", table, ["teacher"])
    make_cache(folder, table, ARRAYS, lambda new: (new / "head").write_bytes(b"the head"))
    return folder


def values_of(rows: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Values of these rows, which do not depend on what other rows there are."""
    each = [(np.random.default_rng([seed, row]), COUNTS[row]) for row in rows]
    return {"ids": np.concatenate([rng.integers(0, 1 << 16, (count, 3)).astype("uint16") for rng, count in each]),
            "log_probs": np.concatenate([rng.normal(size=(count, 2)).astype("float32") for rng, count in each])}


def assert_same(found: dict | None, expected: dict) -> None:
    assert found is not None and found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def filled(folder: Path, table: TokenizedDataset) -> TeacherCache:
    cache = TeacherCache(folder, table, ARRAYS)
    cache.write(np.arange(5), values_of([0, 1, 2, 3, 4]))
    return cache


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(bytes(content))


def refusal(*arguments) -> str:
    with pytest.raises(DataError) as caught:
        make_cache(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -- rows --------------------------------------------------------------------------------------------------------


def test_rows_come_back(folder, table):
    """Fault: values in another order, of another row, or rounded on their way to disk."""
    assert table.label_counts.tolist() == COUNTS
    cache = TeacherCache(folder, table, ARRAYS)
    cache.write(np.array([3, 1]), values_of([3, 1]))
    cache.write(np.array([0, 4, 2]), values_of([0, 4, 2]))
    for opened in (cache, TeacherCache(folder, table, ARRAYS)):
        for rows in ([0], [1, 0, 2], [4, 3, 2, 1, 0], [2, 2]):
            assert_same(opened.read(np.array(rows)), values_of(rows))
    found = cache.read(np.array([1]))
    found["ids"][:] = 0  # a copy: the file stays
    assert_same(cache.read(np.array([1])), values_of([1]))


def test_rows_that_are_not_there(folder, table):
    """Fault: zeros of a new file, or half a batch, are taken for the teacher's outputs."""
    cache = TeacherCache(folder, table, ARRAYS)
    assert cache.missing() == 5 and cache.read(np.array([0])) is None
    cache.write(np.array([1, 4]), values_of([1, 4]))
    assert cache.missing() == 3
    assert cache.read(np.array([1, 0])) is cache.read(np.array([0, 1])) is None
    assert_same(cache.read(np.array([4, 1])), values_of([4, 1]))
    assert TeacherCache(folder, table, ARRAYS).missing() == 3


def test_rows_that_are_there_stay(folder, table):
    """Fault: a step that is done again after a stop reads other last bits, because a later batch wrote the row anew."""
    cache = TeacherCache(folder, table, ARRAYS)
    cache.write(np.array([1]), values_of([1]))
    cache.write(np.array([1, 3]), values_of([1, 3], seed=9))
    assert_same(cache.read(np.array([1])), values_of([1]))
    assert_same(cache.read(np.array([3])), values_of([3], seed=9))
    flip(folder / "ids.bin", 0)  # row 0 is missing, but row 1 must be looked at all the same
    assert cache.read(np.array([0, 1])) is None and cache.missing() == 3


def test_zeros_are_values_like_others(folder, table):
    """Fault: a row whose CRC-32 is 0, or whose values are, counts as missing for ever."""
    cache = TeacherCache(folder, table, ARRAYS)
    zeros = {name: np.zeros_like(value) for name, value in values_of([2]).items()}
    cache.write(np.array([2]), zeros)
    assert_same(cache.read(np.array([2])), zeros)
    nothing = bytes([0x9D, 0x0A, 0xD9, 0x6D])
    assert zlib.crc32(nothing) == 0
    assert checksum({"x": np.frombuffer(nothing, "uint8")}) == 1


@pytest.mark.parametrize(("name", "place"), [
    ("ids.bin", 2 * 3 * (4 + 8)), ("ids.bin", 2 * 3 * (4 + 8 + 3) - 1), ("log_probs.bin", 4 * 2 * (4 + 8) + 5),
    ("checks.bin", 4 * 2), ("checks.bin", 4 * 2 + 3),
])
def test_a_flipped_bit_is_noticed(folder, table, name, place):
    """Fault: what a bad disk changed in row 2 is learnt from."""
    filled(folder, table)
    flip(folder / name, place)
    cache = TeacherCache(folder, table, ARRAYS)
    assert is_whole(folder, table, ARRAYS)
    for row in (0, 1, 3, 4):
        assert_same(cache.read(np.array([row])), values_of([row]))
    assert cache.read(np.array([0, 2, 3])) is None
    assert cache.missing() == 1  # row 2 alone, also for the next run
    assert TeacherCache(folder, table, ARRAYS).missing() == 1
    cache.write(np.array([2]), values_of([2]))
    assert cache.missing() == 0
    assert_same(cache.read(np.array([0, 2, 3])), values_of([0, 2, 3]))


def test_a_row_half_written(folder, table):
    """Fault: killed between two arrays of a row, one of them old: the mixture is learnt from."""
    filled(folder, table)
    part = np.memmap(folder / "ids.bin", "uint16", "r+", shape=(26, 3))
    part[4:12] = values_of([1], seed=7)["ids"]
    part.flush()
    cache = TeacherCache(folder, table, ARRAYS)
    assert cache.read(np.array([1])) is None
    assert_same(cache.read(np.array([0, 2])), values_of([0, 2]))


# -- the folder --------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(("damage", "name"), [
    *((damage, name) for damage in (cut, lengthen, Path.unlink) for name in BINARIES),
    *((damage, name) for damage in (cut, lengthen, Path.unlink) for name in ("head", "manifest.json")),
    (lambda path: flip(path, 0), "head"), (lambda path: path.write_text("{}"), "manifest.json"),
    (lambda path: path.write_bytes(b"\xff"), "manifest.json"),
])
def test_a_damaged_folder_is_made_again(folder, table, damage, name):
    """Fault: a file that is cut off, gone or another one is mapped and read (cases A21)."""
    filled(folder, table)
    assert is_whole(folder, table, ARRAYS)
    damage(folder / name)
    assert not is_whole(folder, table, ARRAYS)
    make_cache(folder, table, ARRAYS, lambda new: (new / "head").write_bytes(b"the head"))
    assert is_whole(folder, table, ARRAYS)
    assert TeacherCache(folder, table, ARRAYS).missing() == 5
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_stray_file_is_no_damage(folder, table):
    """Fault: hours of teacher outputs thrown away because a file manager left something beside them."""
    filled(folder, table)
    (folder / ".DS_Store").write_bytes(b"x")
    assert is_whole(folder, table, ARRAYS)


def test_a_folder_of_something_else_is_not_whole(tmp_path, folder, table):
    """Fault: a cache of other shapes, another number of rows, or none at all is taken for this one."""
    assert is_whole(folder, table, ARRAYS)
    for other in ({**ARRAYS, "ids": ArrayShape(4, "uint16")}, {**ARRAYS, "ids": ArrayShape(3, "int16")},
                  {"ids": ARRAYS["ids"]}, {**ARRAYS, "log_rest": ArrayShape(1, "float32")}):
        assert not is_whole(folder, table, other)
    (tmp_path / "other").mkdir()
    # As many label positions, in fewer rows.
    assert not is_whole(folder, make_table(tmp_path / "other", ["abcdefghijkl", "abcdef", "ab"]), ARRAYS)
    assert not is_whole(tmp_path / "none", table, ARRAYS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    assert not is_whole(folder, table, ARRAYS)


def test_the_key_decides_the_folder(tmp_path, table):
    """Fault: another teacher, precision, k, temperature or other rows read what was stored for the first."""
    key = ["abc", "top_k", "float32", 257, 8, 1.0]
    others = [["abd", *key[1:]], [*key[:2], "bfloat16", *key[3:]], [*key[:4], 9, 1.0], [*key[:5], 2.0], key[:5]]
    folders = {cache_folder(tmp_path, table, each) for each in (key, *others)}
    assert len(folders) == 6
    assert cache_folder(tmp_path, table, list(key)) in folders
    (tmp_path / "other").mkdir()
    other_rows = cache_folder(tmp_path, make_table(tmp_path / "other", [*HIGHLIGHTS[:4], "xyz"]), key)
    assert other_rows not in folders and {path.parent for path in folders} == {tmp_path}


def test_size_by_hand(folder, table):
    """Fault: the check for room knows another size than that of the files."""
    assert cache_bytes(table, ARRAYS) == 26 * (3 * 2 + 2 * 4) + 5 * 4
    assert sum((folder / name).stat().st_size for name in BINARIES) == cache_bytes(table, ARRAYS)


def test_too_little_room(tmp_path, table, monkeypatch):
    """Fault: the disk fills up after hours, in the middle of an epoch, without a word before."""
    class Usage:
        free = 3 * 10**9

    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: Usage)
    big = {"hidden": ArrayShape(10**8, "float32")}
    message = refusal(tmp_path / "cache/x", table, big)
    assert message.startswith(f"{KEY}: ")
    for part in (table.folder.name, "needs 10.40 GB", "has 3.00 GB", str(tmp_path / "cache"), "top_k"):
        assert part in message
    assert not (tmp_path / "cache").exists()
    make_cache(tmp_path / "cache/x", table, ARRAYS)
    assert is_whole(tmp_path / "cache/x", table, ARRAYS)


def test_a_folder_that_cannot_be_written(tmp_path, folder, table, monkeypatch):
    """Fault: a traceback for a read-only folder, or an old cache that is lost when a new one cannot be made."""
    (tmp_path / "file").write_text("x")
    message = refusal(tmp_path / "file/cache", table, ARRAYS)
    assert message.startswith(f"{KEY}: {tmp_path / 'file/cache'}: ") and "name another folder" in message

    def read_only(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    filled(folder, table)
    cut(folder / "ids.bin")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkdtemp", read_only)
        assert refusal(folder, table, ARRAYS) == (
            f"{KEY}: {folder}: Permission denied: change its rights, or choose another folder; or name another folder")
    assert "Permission denied" in refusal(folder, table, ARRAYS, read_only)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
