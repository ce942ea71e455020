"""Tokenised rows: right rows, used again only if nothing changed, complete or rebuilt: data/tokenized.py."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.articles import DataError
from data.prompts import PromptFormat
from data.tokenized import CHUNK, open_token_table
from tests.conftest import END, byte_tokenizer, write_rows

FORMAT = PromptFormat(byte_tokenizer(), max_length=64)
SUFFIX = b"\nTL;DR:"
fork = multiprocessing.get_context("fork")


def news(count=30):
    """Rows of very different lengths, ids that are not their numbers."""
    return [{"id": f"n{index:03}", "article": "news é " * (1 + index % 11), "highlights": f"cat {index}"}
            for index in range(count)]


@pytest.fixture
def csv_path(tmp_path):
    return write_rows(tmp_path / "news.csv", news())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def expected_row(row, window=64):
    """(ids, prompt length) by hand: a token is a byte."""
    labels = b" " + row["highlights"].encode()
    room = window - len(SUFFIX) - len(labels) - 1
    prompt = row["article"].encode()[:room] + SUFFIX
    return [*prompt, *labels, END], len(prompt)


EXPECTED = [expected_row(row) for row in news()]


def rows_of(table):
    return [(table.ids(row).tolist(), int(table.prompt_lengths[row])) for row in range(len(table))]


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


@pytest.mark.parametrize("count", [30, 2 * CHUNK + 3])
def test_rows_are_the_tokenised_ones(tmp_path, cache_dir, count):
    """Fault: rows shifted, cut, glued together, or lost where one chunk of tokenising ends and the next begins."""
    counts = []
    path = write_rows(tmp_path / "news.csv", news(count))
    table = open_token_table(path, FORMAT, cache_dir, progress=counts.append)
    expected = [expected_row(row) for row in news(count)]
    assert rows_of(table) == expected and len(table) == sum(counts) == count
    assert table.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert table.label_counts.tolist() == [len(ids) - length for ids, length in expected]
    assert table.skipped == [] and table.names([0, 29]) == ["n000 (row 1)", "n029 (row 30)"]
    assert {array.dtype for array in (table.lengths, table.label_counts, table.prompt_lengths)} == {np.dtype("int64")}


@pytest.mark.parametrize(("last", "dtype"), [(65535, np.uint16), (65536, np.uint32), (200_000, np.uint32)])
def test_ids_over_65535_survive(csv_path, cache_dir, last, dtype):
    """Fault: ids of a big vocabulary, or of a small one with gaps, that wrap around in 16 bits."""
    vocabulary = {**byte_tokenizer().get_vocab(), "n": last}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    big = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)
    table = open_token_table(csv_path, PromptFormat(big, max_length=64), cache_dir)
    assert table.ids(0).dtype == dtype
    assert table.ids(0).tolist()[:4] == [last, ord("e"), ord("w"), ord("s")]


# -- when it is used again --------------------------------------------------------------------------------------


def test_an_unchanged_file_is_not_tokenised_again(csv_path, cache_dir, monkeypatch):
    """Fault: minutes of tokenising before each run; a checkpoint of an earlier version, which holds the name of its
    rows, cannot be resumed."""
    first = open_token_table(csv_path, FORMAT, cache_dir)
    forbid_building(monkeypatch)
    again = open_token_table(csv_path, PromptFormat(byte_tokenizer(), max_length=64), cache_dir)
    assert again.name == first.name == "news-904374f70bbb1099" and rows_of(again) == EXPECTED


def test_another_setting_is_another_file(csv_path, cache_dir):
    """Fault: rows of an earlier template, length, tokenizer or column used in silence."""
    bigger = byte_tokenizer()
    bigger.add_tokens(["news"])
    tables = [open_token_table(**{"csv_path": csv_path, "prompt_format": FORMAT, "cache_dir": cache_dir, **change})
              for change in ({}, {"prompt_format": PromptFormat(byte_tokenizer(), "{article} TL;DR: ", 64)},
                             {"prompt_format": PromptFormat(byte_tokenizer(), max_length=63)},
                             {"prompt_format": PromptFormat(bigger, max_length=64)},
                             {"columns": {"id": None}}, {"on_bad_row": "skip"})]
    assert len({table.name for table in tables}) == len({table.path for table in tables}) == len(tables)
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED


def test_another_content_of_the_same_size_and_time_is_another_file(csv_path, cache_dir):
    """Fault: a changed CSV is taken for the old one because its name, size and time are the same."""
    open_token_table(csv_path, FORMAT, cache_dir)
    before = csv_path.stat()
    csv_path.write_bytes(csv_path.read_bytes().replace(b"cat 7\n", b"dog 7\n"))
    os.utime(csv_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    table = open_token_table(csv_path, FORMAT, cache_dir)
    assert bytes(table.ids(7)[table.prompt_lengths[7] : -1].astype(np.uint8)) == b" dog 7"


# -- bad rows and errors ----------------------------------------------------------------------------------------


@pytest.fixture
def bad_csv(tmp_path):
    """Row 2 has highlights that do not fit, row 4 no article, row 5 the id of row 1."""
    rows = news(6)
    rows[1]["highlights"] = "x" * 100
    rows[3]["article"] = "  "
    rows[4]["id"] = rows[0]["id"]
    return write_rows(tmp_path / "bad.csv", rows)



def test_bad_rows_are_an_error_or_listed_also_from_the_cache(bad_csv, cache_dir, monkeypatch):
    """Fault: bad rows skipped without a word; a message without the row or the remedy; a half-written file stays; rows
    skipped but not counted, or listed only on the first run; rows after them shifted."""
    message = error_of(bad_csv, FORMAT, cache_dir)
    assert message.startswith(f"{bad_csv}: 3 of 6 rows are bad: row 2 (line 3, id 'n001'): highlights of 101 tokens")
    assert "row 4 (line 5, id 'n003'): empty article" in message
    assert "row 5 (line 6, id 'n000'): the id is that of row 1" in message
    assert 'on_bad_row "skip"' in message
    assert not list(cache_dir.glob("*arrow"))
    open_token_table(bad_csv, FORMAT, cache_dir, on_bad_row="skip")
    forbid_building(monkeypatch)
    table = open_token_table(bad_csv, FORMAT, cache_dir, on_bad_row="skip")
    assert [(row.number, row.line, row.id) for row in table.skipped] == [(2, 3, "n001"), (4, 5, "n003"), (5, 6, "n000")]
    assert "101 tokens" in table.skipped[0].reason
    assert rows_of(table) == [EXPECTED[index] for index in (0, 2, 5)]
    assert table.names([0, 1, 2]) == ["n000 (row 1)", "n002 (row 3)", "n005 (row 6)"]


# -- kills, damage, full disks ----------------------------------------------------------------------------------


def in_another_process(function, *arguments):
    def target():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizer do not outlive a fork
        function(*arguments)

    process = fork.Process(target=target)
    process.start()
    return process


def open_and_die(csv_path, cache_dir):
    """Kills its own process after the second chunk."""
    counts = []

    def die(rows):
        counts.append(rows)
        if len(counts) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    open_token_table(csv_path, FORMAT, cache_dir, progress=die)


def test_a_kill_while_building_leaves_nothing_that_is_used(tmp_path, cache_dir, monkeypatch):
    """Fault: half of the rows are taken for all of them after a kill, or its lock keeps the next run out."""
    rows = news(3 * CHUNK)
    path = write_rows(tmp_path / "long.csv", rows)
    process = in_another_process(open_and_die, path, cache_dir)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not list(cache_dir.glob("long*"))
    assert rows_of(open_token_table(path, FORMAT, cache_dir)) == [expected_row(row) for row in rows]
    assert not list(cache_dir.glob(".tmp*"))
    forbid_building(monkeypatch)
    open_token_table(path, FORMAT, cache_dir)


def test_two_processes_build_one_file(csv_path, cache_dir):
    """Fault: two runs started together write the same file at once, or one of them fails."""
    results = fork.Queue()
    started = fork.Barrier(2)

    def open_together():
        started.wait(60)
        built = []
        table = open_token_table(csv_path, FORMAT, cache_dir, progress=built.append)
        results.put((rows_of(table), len(built)))

    processes = [in_another_process(open_together) for _ in range(2)]
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [rows for rows, _ in found] == [EXPECTED] * 2 and sum(built for _, built in found) == 1


def test_a_truncated_file_is_built_again(csv_path, cache_dir):
    """Fault: a copy that was cut off is read as a shorter table, or every run ends with a traceback."""
    for size in (0, 5, 1000, -1, -8):
        path = open_token_table(csv_path, FORMAT, cache_dir).path
        path.write_bytes(path.read_bytes()[:size])
        assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED
