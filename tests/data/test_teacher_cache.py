"""Teacher outputs on disk: what is written is read, what is stale or incomplete is not: data/teacher_cache.py."""

from pathlib import Path

import numpy as np
import pytest

from data.articles import DataError
from data.prompts import PromptFormat
from data.teacher_cache import ArrayShape, TeacherCache
from data.tokenized import TokenizedDataset, open_token_table
from tests.conftest import byte_tokenizer, write_rows

ARRAYS = {"ids": ArrayShape(3, "uint16"), "log_probs": ArrayShape(2, "float32")}
HIGHLIGHTS = ["ab", "abcdef", "a", "abcd", "abc"]
COUNTS = [4, 8, 3, 6, 5]  # labels: a space, the bytes, the end-of-text


def make_table(folder: Path, highlights: list[str] = HIGHLIGHTS) -> TokenizedDataset:
    folder.mkdir(exist_ok=True)
    rows = [{"id": str(number), "article": "news", "highlights": text} for number, text in enumerate(highlights)]
    return open_token_table(write_rows(folder / "rows.csv", rows), PromptFormat(byte_tokenizer()), folder / "tokens")


@pytest.fixture
def table(tmp_path) -> TokenizedDataset:
    return make_table(tmp_path)


def cache_of(tmp_path: Path, table: TokenizedDataset, key: tuple = ("teacher",), arrays: dict = ARRAYS) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", table, list(key), arrays)


def values_of(rows: list[int]) -> dict[str, np.ndarray]:
    """Values of these rows, which do not depend on what other rows there are."""
    rngs = [(np.random.default_rng(row), COUNTS[row]) for row in rows]
    return {"ids": np.concatenate([rng.integers(0, 1 << 16, (count, 3)).astype("uint16") for rng, count in rngs]),
            "log_probs": np.concatenate([rng.normal(size=(count, 2)).astype("float32") for rng, count in rngs])}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def filled(tmp_path: Path, table: TokenizedDataset) -> TeacherCache:
    cache = cache_of(tmp_path, table)
    cache.create()
    cache.open(writable=True)
    cache.write(np.array([3, 1]), values_of([3, 1]))
    cache.write(np.array([0, 4, 2]), values_of([0, 4, 2]))
    cache.flush()
    cache.save_progress(5)
    return cache


def test_rows_come_back(tmp_path, table):
    """Fault: values in another order, of another row, or rounded on their way to disk."""
    assert table.label_counts.tolist() == COUNTS
    written, again = filled(tmp_path, table), cache_of(tmp_path, table)
    assert again.rows_done == 5
    again.open()
    for cache in (written, again):
        for rows in ([0], [1, 0, 2], [4, 3, 2, 1, 0], [2, 2]):
            assert_same(cache.read(np.array(rows)), values_of(rows))
    found = again.read(np.array([1]))
    found["ids"][:] = 0  # a copy: the file stays
    assert_same(again.read(np.array([1])), values_of([1]))


@pytest.mark.parametrize(("name", "damage"), [
    ("ids.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])), ("log_probs.bin", Path.unlink),
    ("progress.json", Path.unlink), ("progress.json", lambda path: path.write_bytes(b"\xff")),
], ids=["cut", "gone", "no progress", "damaged progress"])
def test_missing_and_truncated_files_are_filled_again(tmp_path, table, name, damage):
    """Fault: a file that is cut off or gone is read, or ends every run with a traceback."""
    cache = filled(tmp_path, table)
    damage(cache.folder / name)
    assert cache_of(tmp_path, table).rows_done == 0
    assert filled(tmp_path, table).rows_done == 5


def test_the_key_decides_the_folder(tmp_path, table):
    """Fault: another teacher, precision, k, temperature or other rows read what was stored for the first."""
    key = ("abc", "top_k", "float32", 257, 8, 1.0)
    others = [("abd", *key[1:]), (*key[:2], "bfloat16", *key[3:]), (*key[:4], 9, 1.0), (*key[:5], 2.0), key[:5]]
    folders = {cache_of(tmp_path, table, other).folder for other in (key, *others)}
    assert len(folders) == 6 and cache_of(tmp_path, table, key).folder in folders
    other_rows = make_table(tmp_path / "other", [*HIGHLIGHTS[:4], "xyz"])
    assert cache_of(tmp_path, other_rows, key).folder not in folders


def test_too_little_room(tmp_path, table):
    """Fault: the disk fills up after hours, without a word before."""
    with pytest.raises(DataError) as caught:
        cache_of(tmp_path, table, arrays={"hidden": ArrayShape(10**13, "float32")}).create()
    message = str(caught.value)
    assert message.startswith(f"distillation_kwargs.teacher_cache.dir: the cache of {table.name} needs 1040000.00 GB ")
    assert "top_k" in message and len(message.splitlines()) == 1
