"""The token cache: right rows, used again only when nothing changed, errors that name file, row and reason."""

import json
import os
import pickle
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data import token_cache
from data.articles import DataError
from data.prompts import PromptFormat
from data.token_cache import CHUNK, open_token_table
from tests.conftest import END, ROOT, byte_tokenizer, write_rows

FILES = ["boundaries.npy", "ids.json", "manifest.json", "numbers.npy", "offsets.npy", "skipped.json", "tokens.bin"]
FORMAT = PromptFormat(byte_tokenizer(), max_length=64)
SUFFIX = b"\nTL;DR:"


def news(count=30):
    """Rows of very different lengths, ids that are not their numbers."""
    return [
        {"id": f"n{index:03}", "article": "news é " * (1 + index % 11), "highlights": f"cat {index}"}
        for index in range(count)
    ]


@pytest.fixture
def csv_path(tmp_path):
    return write_rows(tmp_path / "news.csv", news())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def expected_row(row, window=64):
    """(ids, boundary) by hand: a token is a byte."""
    labels = b" " + row["highlights"].encode()
    room = window - len(SUFFIX) - len(labels) - 1
    prompt = row["article"].encode()[:room] + SUFFIX
    return [*prompt, *labels, END], len(prompt)


def rows_of(table):
    return [(table.ids(row).tolist(), int(table.boundaries[row])) for row in range(len(table))]


def error_of(*arguments, **options):
    """The one-line message of the DataError that opening raises."""
    with pytest.raises(DataError) as caught:
        open_token_table(*arguments, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def forbid_building(monkeypatch):
    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PromptFormat, "training_rows", fail)


# -- rows -------------------------------------------------------------------------------------------------------


def test_rows_are_the_tokenised_ones(csv_path, cache_dir):
    """Rows shifted, cut or glued together on their way to disk."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    expected = [expected_row(row) for row in news()]
    assert rows_of(table) == expected
    assert len(table) == 30
    assert table.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert table.label_counts.tolist() == [len(ids) - boundary for ids, boundary in expected]
    assert table.skipped == []
    assert table.names([0, 29]) == ["n000 (row 1)", "n029 (row 30)"]


def test_rows_of_several_chunks(tmp_path, cache_dir):
    """Rows lost or repeated where one chunk of tokenising ends and the next begins."""
    rows = news(2 * CHUNK + 3)
    counts = []
    table = open_token_table(write_rows(tmp_path / "long.csv", rows), FORMAT, cache_dir, progress=counts.append)
    assert rows_of(table) == [expected_row(row) for row in rows]
    assert counts == [CHUNK, CHUNK, 3]


def test_small_vocabularies_take_two_bytes_a_token(csv_path, cache_dir):
    """A cache twice as big as it need be."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    assert table.ids(0).dtype == np.uint16
    assert (table.folder / "tokens.bin").stat().st_size == 2 * table.lengths.sum()


@pytest.mark.parametrize(("last", "dtype"), [(65535, np.uint16), (65536, np.uint32), (200_000, np.uint32)])
def test_ids_over_65535_survive(csv_path, cache_dir, last, dtype):
    """Ids of a big vocabulary, or of a small one with gaps, that wrap around in 16 bits."""
    vocabulary = {**byte_tokenizer().get_vocab(), "n": last}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    big = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)
    table = open_token_table(csv_path, PromptFormat(big, max_length=64), cache_dir)
    assert table.ids(0).dtype == dtype
    assert table.ids(0).tolist()[:4] == [last, ord("e"), ord("w"), ord("s")]


def test_a_pickled_table_does_not_carry_its_tokens(tmp_path, cache_dir):
    """A copy of the whole cache sent to each worker process that is not forked."""
    table = open_token_table(write_rows(tmp_path / "long.csv", news(600)), FORMAT, cache_dir)
    sent = pickle.dumps(table)
    assert len(sent) < 1000 < table.lengths.sum()
    assert rows_of(pickle.loads(sent)) == rows_of(table)


# -- when it is used again --------------------------------------------------------------------------------------


def test_an_unchanged_file_is_not_tokenised_again(csv_path, cache_dir, monkeypatch):
    """Minutes of tokenising before each run."""
    first = open_token_table(csv_path, FORMAT, cache_dir)
    forbid_building(monkeypatch)
    again = open_token_table(csv_path, PromptFormat(byte_tokenizer(), max_length=64), cache_dir)
    assert again.folder == first.folder
    assert rows_of(again) == [expected_row(row) for row in news()]


def add_a_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["news"])
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_format": PromptFormat(byte_tokenizer(), "{article} TL;DR: ", 64)},
        {"prompt_format": PromptFormat(byte_tokenizer(), max_length=63)},
        {"prompt_format": PromptFormat(add_a_token(), max_length=64)},
        {"columns": {"id": None}},
        {"on_bad_row": "skip"},
    ],
    ids=["template", "max_length", "tokenizer", "columns", "on_bad_row"],
)
def test_another_setting_is_another_cache(csv_path, cache_dir, change):
    """Rows of an earlier template, length, tokenizer or column used in silence."""
    first = open_token_table(csv_path, FORMAT, cache_dir)
    other = open_token_table(**{"csv_path": csv_path, "prompt_format": FORMAT, "cache_dir": cache_dir, **change})
    assert other.folder != first.folder
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == [expected_row(row) for row in news()]


def test_another_content_of_the_same_size_and_time_is_another_cache(csv_path, cache_dir):
    """A changed CSV taken for the old one because its name, size and time are the same."""
    open_token_table(csv_path, FORMAT, cache_dir)
    before = csv_path.stat()
    csv_path.write_bytes(csv_path.read_bytes().replace(b"cat 7\n", b"dog 7\n"))
    os.utime(csv_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    table = open_token_table(csv_path, FORMAT, cache_dir)
    assert bytes(table.ids(7)[table.boundaries[7] : -1].astype(np.uint8)) == b" dog 7"


# -- bad rows and errors ----------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_refused_file(csv_path, cache_dir):
    """A folder of rubbish for each attempt at a bad CSV."""
    write_rows(csv_path, [*news(3), {"id": "n9", "article": "", "highlights": "x"}])
    error_of(csv_path, FORMAT, cache_dir)
    assert not cache_dir.exists()


@pytest.fixture
def bad_csv(tmp_path):
    """Row 2 has highlights that do not fit, row 4 no article, row 5 the id of row 1."""
    rows = news(6)
    rows[1]["highlights"] = "x" * 100
    rows[3]["article"] = "  "
    rows[4]["id"] = rows[0]["id"]
    return write_rows(tmp_path / "bad.csv", rows)


def test_bad_rows_are_an_error_with_row_id_and_reason(bad_csv, cache_dir):
    """Rows that cannot be used left out without a word; a message without the row or the way out."""
    message = error_of(bad_csv, FORMAT, cache_dir)
    assert message.startswith(f"{bad_csv}: 3 of 6 rows are bad: row 2 (line 3, id 'n001'): highlights of 101 tokens")
    assert "row 4 (line 5, id 'n003'): empty article" in message
    assert "row 5 (line 6, id 'n000'): the id is that of row 1" in message
    assert 'on_bad_row "skip"' in message


def test_skipped_rows_are_all_listed_also_from_the_cache(bad_csv, cache_dir, monkeypatch):
    """Rows skipped but not counted, or listed only on the first run; rows after them shifted."""
    open_token_table(bad_csv, FORMAT, cache_dir, on_bad_row="skip")
    forbid_building(monkeypatch)
    table = open_token_table(bad_csv, FORMAT, cache_dir, on_bad_row="skip")
    assert [(row.number, row.line, row.id) for row in table.skipped] == [(2, 3, "n001"), (4, 5, "n003"), (5, 6, "n000")]
    assert "101 tokens" in table.skipped[0].reason
    assert rows_of(table) == [expected_row(news()[index]) for index in (0, 2, 5)]
    assert table.names([0, 1, 2]) == ["n000 (row 1)", "n002 (row 3)", "n005 (row 6)"]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_without_a_usable_row_is_refused(tmp_path, cache_dir, on_bad_row):
    """Training on nothing."""
    rows = [{**row, "highlights": "x" * 100} for row in news(2)]
    message = error_of(write_rows(tmp_path / "bad.csv", rows), FORMAT, cache_dir, on_bad_row=on_bad_row)
    assert "2 of 2 rows are bad" in message
    assert "no usable row is left" in message


def test_an_unknown_on_bad_row_is_refused(csv_path, cache_dir):
    """A misspelt "error" that skips rows in silence."""
    assert "on_bad_row is 'eror'" in error_of(csv_path, FORMAT, cache_dir, on_bad_row="eror")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_csv_that_cannot_be_read_is_named(tmp_path, cache_dir, kind):
    """A traceback for a wrong path."""
    path = tmp_path if kind == "folder" else tmp_path / "none.csv"
    message = error_of(path, FORMAT, cache_dir)
    assert message.startswith(f"{path}: cannot be read")
    assert "check the path" in message


def test_a_cache_folder_that_is_a_file_is_an_error(csv_path, tmp_path):
    """A traceback where the cache cannot be written."""
    target = tmp_path / "taken"
    target.write_text("mine", encoding="utf-8")
    message = error_of(csv_path, FORMAT, target)
    assert message.startswith(f"dataset_kwargs.cache_dir: {target}")
    assert "name another folder" in message
    assert target.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("call", ["mkdtemp", "write_table", "install"])
def test_a_full_or_forbidden_disk_is_an_error(csv_path, cache_dir, monkeypatch, call):
    """A traceback, or half a cache left behind, where the disk refuses."""

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile if call == "mkdtemp" else token_cache, call, refuse)
    message = error_of(csv_path, FORMAT, cache_dir)
    assert message.startswith(f"dataset_kwargs.cache_dir: {cache_dir}")
    assert "No space left on device" in message
    assert not cache_dir.exists()


def test_a_cache_has_no_code_in_it(csv_path, cache_dir):
    """Arrays of objects, which are unpickled when they are loaded."""
    folder = open_token_table(csv_path, FORMAT, cache_dir).folder
    for name in ("offsets", "boundaries", "numbers"):
        assert np.load(folder / f"{name}.npy", allow_pickle=False).dtype == np.int64
    assert set(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]) == set(FILES) - {
        "manifest.json"
    }


def test_an_array_that_cannot_be_written_is_an_error(tmp_path):
    """np.save loses the last bytes without a word where the disk is full, and the checksum is of what was left."""
    script = (
        "import resource, sys; import numpy as np; from pathlib import Path; from data import token_cache\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))\n"
        "try:\n    token_cache.save_array(Path(sys.argv[1]), np.arange(20))\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.npy")], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    assert done.stdout == "File too large\n"
    token_cache.save_array(tmp_path / "b.npy", np.arange(20))
    assert np.load(tmp_path / "b.npy", allow_pickle=False).tolist() == list(range(20))


def test_a_csv_that_changes_while_it_is_read_is_refused(csv_path, cache_dir):
    """The rows of another text were kept under the name of the first one, and every later run trained on them."""
    before = csv_path.read_bytes()

    def overwrite(rows: int) -> None:
        csv_path.write_bytes(before.replace(b"cat", b"dog"))

    message = error_of(csv_path, FORMAT, cache_dir, progress=overwrite)
    assert message == f"{csv_path}: was changed while it was read: run again once it is whole"
    assert not cache_dir.exists()
    csv_path.write_bytes(before)
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == [expected_row(row) for row in news()]
