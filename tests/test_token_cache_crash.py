"""The token cache after damage, kills and two runs at once: whole or not at all."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from data import token_cache
from data.token_cache import TokenizedDataset, open_token_table
from tests.conftest import write_rows
from tests.test_token_cache import FILES, FORMAT, expected_row, forbid_building, news, rows_of

EXPECTED = [expected_row(row) for row in news()]
fork = multiprocessing.get_context("fork")


@pytest.fixture
def csv_path(tmp_path):
    return write_rows(tmp_path / "news.csv", news())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x04
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_made_again(csv_path, cache_dir, name, damage):
    """Training on a cache that a full disk, a crash or a copy left damaged."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    assert sorted(path.name for path in table.folder.iterdir()) == FILES
    before = {path.name: path.read_bytes() for path in table.folder.iterdir()}
    damage(table.folder / name)
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED
    if (name, damage) != ("manifest.json", truncate):  # its last byte is a line end: nothing is lost with it
        assert {path.name: path.read_bytes() for path in table.folder.iterdir()} == before


@pytest.mark.parametrize("content", [b"null", b"[]", b"{}", b"\0\0\0", b'{"files": {}, "dtype": "uint16"}', b"\xff"])
def test_a_manifest_that_says_nothing_is_damage(csv_path, cache_dir, content):
    """A manifest that lists no files and so finds all of them right; a traceback from one that is no manifest."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    (table.folder / "manifest.json").write_bytes(content)
    flip(table.folder / "tokens.bin")
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED


def test_no_single_wrong_byte_of_the_manifest_does_harm(csv_path, cache_dir):
    """Tokens read with another number of bytes each, because the manifest itself is not checked."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    manifest = table.folder / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if token_cache.is_whole(table.folder):
            assert rows_of(TokenizedDataset(table.folder)) == rows_of(table)


def without_threads(function, *arguments):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizer do not outlive a fork
    function(*arguments)


def in_another_process(function, *arguments):
    process = fork.Process(target=without_threads, args=(function, *arguments))
    process.start()
    return process


def open_and_die(csv_path, cache_dir, moment):
    """Opens the table and kills its own process while it is being made."""

    file_digest = token_cache.file_digest

    def die(*arguments, **options):
        if moment == "file_digest" and Path(arguments[0]).parent.name != "table":  # the CSV's, or the damaged one's
            return file_digest(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if moment != "tokenising":
        setattr(token_cache, moment, die)
    open_token_table(csv_path, FORMAT, cache_dir, progress=die if moment == "tokenising" else lambda rows: None)


@pytest.mark.parametrize("moment", ["tokenising", "dump", "file_digest"])
@pytest.mark.parametrize("damaged", [False, True])
def test_a_crash_while_building_leaves_nothing_that_is_used(csv_path, cache_dir, monkeypatch, moment, damaged):
    """Half of the rows taken for all of them after a kill."""
    if damaged:
        flip(open_token_table(csv_path, FORMAT, cache_dir).folder / "tokens.bin")
    process = in_another_process(open_and_die, csv_path, cache_dir, moment)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED
    forbid_building(monkeypatch)
    open_token_table(csv_path, FORMAT, cache_dir)


def test_a_crash_while_damaged_files_are_replaced_leaves_nothing_that_is_used(csv_path, cache_dir, monkeypatch):
    """New and damaged files taken for one table after a kill between them."""
    table = open_token_table(csv_path, FORMAT, cache_dir)
    for name in FILES:
        flip(table.folder / name)
    replace, replaced = Path.replace, []

    def replace_three(path, target):
        if len(replaced) == 3:
            raise KeyboardInterrupt
        replaced.append(target)
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_three)
        with pytest.raises(KeyboardInterrupt):
            open_token_table(csv_path, FORMAT, cache_dir)
    assert rows_of(open_token_table(csv_path, FORMAT, cache_dir)) == EXPECTED
    assert [path.name for path in cache_dir.iterdir()] == [table.folder.name]


def open_together(csv_path, cache_dir, barrier, results):
    table = open_token_table(csv_path, FORMAT, cache_dir, progress=lambda rows: barrier.wait(60))
    results.put(rows_of(table))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_may_build_at_once(csv_path, cache_dir, damaged):
    """Two runs started together, of which one fails or reads what the other is writing."""
    if damaged:
        flip(open_token_table(csv_path, FORMAT, cache_dir).folder / "tokens.bin")
    barrier, results = fork.Barrier(2), fork.Queue()
    processes = [in_another_process(open_together, csv_path, cache_dir, barrier, results) for _ in range(2)]
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert found == [EXPECTED] * 2
    assert len(list(cache_dir.iterdir())) == 1
