"""CSVs and JSON files that are too large, too deep, endless, or no files at all. Nothing here needs torch."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from data.articles import read_articles
from data.cnn_dailymail import main as make_tables
from tests.faults.hostile_attack import Attack
from utils.comparison import read_evaluation, read_scored_rows
from utils.config_files import apply_override, load_config
from utils.rouge import lead_sentences, score_rows

GIGABYTE = 1 << 30
HEADER = b"id,article,highlights\n"


def sparse(path: Path, start: bytes, size: int, end: bytes = b"") -> Path:
    """A file of that size that takes no room on the disk: NUL characters between start and end."""
    with path.open("wb") as file:
        file.write(start)
        file.seek(size - len(end))
        file.write(end)
        file.truncate(size)
    return path


# -- CSVs ------------------------------------------------------------------------------------------------------


def table(write: Callable[[Path], object], read: Callable = read_articles):
    """An attack by a CSV; write(path): writes it."""

    def run(folder: Path) -> None:
        write(folder / "rows.csv")
        read(folder / "rows.csv")

    return run


def content(text: bytes):
    return lambda path: path.write_bytes(text)


def skipping(path: Path) -> None:
    """The bad rows are left out: a file of nothing else is refused all the same."""
    read_articles(path, on_bad_row="skip")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unclosed(path: Path) -> None:
    """2 GB after a quote, in lines."""
    with path.open("wb") as file:
        file.write(HEADER + b'1,"' + b"word word word\n" * 1_500_000)
        file.truncate(2 * GIGABYTE)


def packed(path: Path) -> None:
    path.write_bytes(gzip.compress(HEADER + b"1,a,h\n" + bytes(30_000_000)))


def tables_of(path: Path) -> None:
    """As the command that converts data sets reads it."""
    from data.articles import DataError

    if code := make_tables(["--from_csv", str(path), "--output_dir", str(path.parent / "out"), "--fraction", "1"]):
        raise DataError(f"exit code {code}")


CSVS = [
    Attack("a cell of 1 GB", table(lambda path: sparse(path, HEADER + b'1,"', GIGABYTE, b'",h\n')),
           "rows.csv: row 1 .line 2.: longer than 20,000,000 characters"),
    Attack("a cell of 21 million characters", table(content(HEADER + b"1," + b"word " * 4_200_000 + b",h\n")),
           "row 1 .line 2.: longer than"),
    Attack("an endless line", table(lambda path: sparse(path, b"", 2 * GIGABYTE)), "header .line 1.: longer than"),
    Attack("a quote that is never closed over 2 GB", table(unclosed), "row 1 .line 2.: longer than .*: close its qu"),
    Attack("a header of a million columns", table(content(b",".join(b"c%d" % number for number in range(10**6)))),
           "1,000,000 columns: expected at most 5,000"),
    Attack("a header of a million equal columns", table(content(b"a," * 10**6 + b"\n1,2\n")), "1,000,001 columns"),
    Attack("a row of a million columns", table(content(HEADER + b"1," + b"a," * 10**6 + b"\n"), skipping),
           "1000002 fields where the header has 3"),
    Attack("a row of seven million columns", table(content(HEADER + b"ab," * 6_600_000 + b"\n"), skipping),
           "6600001 fields where the header has 3", slow=True),
    Attack("highlights of a million characters", table(content(HEADER + b"1,a," + b"h " * 500_000 + b"\n"), skipping),
           "highlights of 1,000,000 characters .at most 300,000"),
    Attack("an id of a million characters", table(content(HEADER + b"1" * 10**6 + b",a,h\n"), skipping),
           "id of 1,000,000 characters"),
    Attack("a million blank lines", table(content(HEADER + b"\n" * 10**6)), "a header but no rows", slow=True),
    Attack("a hundred thousand empty rows", table(content(HEADER + b",,\n" * 10**5), skipping), "100000 of 100000 r"),
    Attack("a gzip file of 30 MB in 30 kB", table(packed), "which is not UTF-8"),
    Attack("a named pipe", table(pipe), "rows.csv: cannot be read .a pipe or a device, not a file"),
    Attack("a named pipe, to be converted", table(pipe, tables_of), "exit code 1"),
    Attack("a device", table(device), "a pipe or a device, not a file"),
]


# -- JSON ------------------------------------------------------------------------------------------------------


def config(write: Callable[[Path], object]):
    def run(folder: Path) -> None:
        write(folder / "config.json")
        load_config(folder / "config.json")

    return run


def override(text: str):
    return lambda folder: apply_override({}, text)


DEEP = b"[" * 5_000_000 + b"]" * 5_000_000
MANY_KEYS = b"{" + b",".join(b'"k%d":1' % number for number in range(10**6)) + b"}"
CONFIGS = [
    Attack("a config of 1 GB", config(lambda path: sparse(path, b'{"a": "', GIGABYTE, b'"}')), "larger than 10 MB"),
    Attack("a config of 5 million lists within lists", config(content(DEEP[:9_999_999])), "more than 100,000 values"),
    Attack("a config of fifty thousand lists within lists", config(content(b"[" * 50_000)), "nested deeper than 50"),
    Attack("a config of 51 levels", config(content(b'{"a":' * 51 + b"1" + b"}" * 51)), "nested deeper than 50 levels"),
    Attack("a number of a million digits", config(content(b'{"a": ' + b"9" * 10**6 + b"}")), "of 1000000 digits"),
    Attack("a number of a million digits and a point", config(content(b'{"a": ' + b"9" * 10**6 + b".5}")), "unknown"),
    Attack("a config of sixty thousand keys", config(content(MANY_KEYS[: 9 * 10**5] + b'":1}')), "unknown", slow=True),
    Attack("a key that stands a million times",
           config(content(b"{" + b'"a":1,' * 10**6 + b'"b":1}')), "more than 100,000 values"),
    Attack("a key that stands ninety thousand times",
           config(content(b"{" + b'"a":1,' * 90_000 + b'"b":1}')), "the key .a. stands twice"),
    Attack("three million empty lists", config(content(b'{"a":[' + b"[]," * 3_000_000 + b"1]}")), "more than 100,000"),
    Attack("a value of 4 million characters", config(content(b'{"a": "' + b"\xc2\x9b" * 4_000_000 + b'"}')), "unknown"),
    Attack("a config that is a named pipe", config(pipe), "cannot be read: a pipe or a device"),
    Attack("a config that is a device", config(device), "cannot be read: a pipe or a device"),
    Attack("--set with lists within lists", override("a.b=" + "[" * 10**6), "nested deeper"),
    Attack("--set with a number of a million digits", override("a.b=" + "9" * 10**6), "of 1000000 digits"),
]


# -- results of other runs -------------------------------------------------------------------------------------

SCORES = {**dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.5), "rows": 1, "settings": {},
          "confidence_intervals": {key: [0.1, 0.9] for key in ("rouge1", "rouge2", "rougeL", "rougeLsum")}}


def scores(write: Callable[[Path], object]):
    def run(folder: Path) -> None:
        write(folder / "scores.json")
        read_evaluation("a", folder)

    return run


def predictions(write: Callable[[Path], object]):
    def run(folder: Path) -> None:
        (folder / "scores.json").write_text(json.dumps(SCORES))
        write(folder / "predictions.json")
        read_scored_rows(read_evaluation("a", folder), "rougeL")

    return run


def curves(write: Callable[[Path], object]):
    from utils.comparison import training_speed

    def run(folder: Path) -> None:
        write(folder / "metrics.jsonl")
        training_speed(folder / "metrics.jsonl")

    return run


RESULTS = [
    Attack("scores.json of 1 GB", scores(lambda path: sparse(path, b"{", GIGABYTE)), "larger than 10 MB"),
    Attack("scores.json of lists within lists", scores(content(DEEP[:9_000_000])), "is not a scores.json"),
    Attack("scores.json that is a named pipe", scores(pipe), "cannot be read .a pipe or a device"),
    Attack("scores.json with a number of 300 digits",
           scores(content(json.dumps(SCORES | {"rows": 10**300}).encode())), "is not a scores.json"),
    Attack("predictions.json of 2 GB", predictions(lambda path: sparse(path, b"[", 2 * GIGABYTE)),
           "cannot be read .larger than 1000 MB"),
    Attack("predictions.json of 11 million empty lists", predictions(content(b"[" + b"[]," * 11_000_000 + b"[]]")),
           "more than 20,000,000 values"),
    Attack("predictions.json of lists within lists", predictions(content(DEEP)), "is not whole JSON"),
    Attack("predictions.json that is a device", predictions(device), "cannot be read .a pipe or a device"),
    Attack("metrics.jsonl of 2 GB", curves(lambda path: sparse(path, b"{", 2 * GIGABYTE)), "larger than 1000 MB"),
    Attack("metrics.jsonl with deep, long and odd lines", curves(content(
        DEEP + b"\n5\n" + b'{"step": 1e999, "split": "train"}\n{"step": 1, "split": []}\n' + b"9" * 10**6 + b"\n")),
           "cannot be read .line 1 is damaged"),
]


# -- scores of hostile texts -----------------------------------------------------------------------------------


def endless_sentence(folder: Path) -> None:
    lead = lead_sentences("word " * 2_000_000)
    assert len(lead) == 100_000
    score_rows([lead], ["other " * 50_000])


def stops_without_spaces(folder: Path) -> None:
    """Each stop once looked for the next word's end in all of the rest."""
    assert lead_sentences("。a" * 1_000_000).startswith("。a")


TEXTS = [
    Attack("an article of one sentence of 10 million characters", endless_sentence, slow=True),
    Attack("a million full stops without a space", stops_without_spaces, slow=True),
]
ATTACKS = [*CSVS, *CONFIGS, *RESULTS, *TEXTS]
