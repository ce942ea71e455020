"""What fetching a training batch costs: tokenised on the spot, from an Arrow table, from our flat memory map.

    python -m benchmarks.token_cache --csv train.csv --tokenizer FOLDER

Without --csv it takes the demo's made-up news, with a tokenizer trained on it. The three ways give equal batches, which
is checked before any timing, and share one collation: only the way to the ids differs. They take turns (A B C A B C
...) over the same batches, and the first round is dropped. Files are in the system's page cache.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars, load_from_disk
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.rouge_speed import interleaved
from data.articles import DataError, read_articles
from data.batches import collate, plan_epoch
from data.demo_news import SIZES, generate, teacher_texts, train_tokenizer
from data.prompts import PromptFormat, RowTooLong
from data.tokenized import CHUNK, open_token_table
from utils.cli import OneLineParser

BATCHES = 100  # fetched in each round
LONGEST = 1024  # tokens of a row, where the tokenizer does not say less
NAMES = ("tokenising", "Arrow", "memory map")

Batch = dict[str, Tensor]
Fetch = Callable[[np.ndarray], Batch]
Texts = list[tuple[str, str]]  # article and highlights of each row


@dataclass(frozen=True, slots=True)
class FewRows:
    """The rows of one batch, in the form that `collate` takes a token table. boundaries: int64 [rows]."""

    rows: list  # token ids of each row
    boundaries: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.rows])

    def ids(self, row: int) -> np.ndarray:
        return np.asarray(self.rows[row])


def load_rows(path: Path | None, folder: Path | None, most: int) -> tuple[Texts, PreTrainedTokenizerFast]:
    """The first `most` rows of the CSV with the folder's tokenizer, or made-up news with one trained on it.

    Raises DataError for a CSV that cannot be read or a folder without a tokenizer.
    """
    if path is None:
        tables = generate(sizes=dict.fromkeys(SIZES, 1) | {"teacher": most})
        texts = [(row["article"], row["highlights"]) for row in tables["teacher"]]
    else:
        texts = [(row.article, row.highlights) for row in read_articles(path, on_bad_row="skip")[0][:most]]
    if folder is None:
        return texts, train_tokenizer(teacher_texts(tables))
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer is {folder}: no tokenizer.json in it: give a folder of save_pretrained")
    return texts, AutoTokenizer.from_pretrained(folder)


def write_csv(path: Path, texts: Texts) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "article", "highlights"))
        writer.writerows((number, *row) for number, row in enumerate(texts, start=1))


def build_arrow(folder: Path, texts: Texts, prompt_format: PromptFormat, dtype: str) -> Dataset:
    """Tokenises the rows, saves them as an Arrow table and opens it, memory-mapped, for NumPy."""
    rows = []
    for start in range(0, len(texts), CHUNK):
        articles, highlights = zip(*texts[start : start + CHUNK], strict=True)
        rows += [row for row in prompt_format.training_rows(articles, highlights) if not isinstance(row, RowTooLong)]
    columns = {"ids": [ids for ids, _ in rows], "boundary": [boundary for _, boundary in rows]}
    features = Features({"ids": List(Value(dtype)), "boundary": Value("int64")})
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    dataset = load_from_disk(folder)
    dataset.set_format("numpy")
    return dataset


def tokenised_batch(texts: Texts, prompt_format: PromptFormat, rows: np.ndarray, pad_id: int) -> Batch:
    articles, highlights = zip(*(texts[row] for row in rows), strict=True)
    ids, boundaries = zip(*prompt_format.training_rows(articles, highlights), strict=True)
    return collate(FewRows(ids, np.array(boundaries)), np.arange(len(rows)), pad_id)


def arrow_batch(dataset: Dataset, rows: np.ndarray, pad_id: int) -> Batch:
    found = dataset[rows]
    return collate(FewRows(found["ids"], found["boundary"]), np.arange(len(rows)), pad_id)


def first_difference(fetches: list[Fetch], batches: list[np.ndarray]) -> str | None:
    """One line about the first batch that the ways do not agree on; None where all are equal."""
    for rows in batches:
        expected, *others = [fetch(rows) for fetch in fetches]
        for name, batch in zip(NAMES[1:], others, strict=True):
            if any(not torch.equal(expected[key], batch[key]) for key in expected):
                return f"rows {rows.tolist()}: the batch of {name} is not that of {NAMES[0]}"
    return None


def timed(function: Callable, *arguments, **options) -> tuple[object, float]:
    """(result, seconds)"""
    start = time.perf_counter()
    return function(*arguments, **options), time.perf_counter() - start


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, texts: Texts, tokenizer: PreTrainedTokenizerFast, batch_size: int, rounds: int) -> None:
    """Builds both stores in the folder, checks that all batches are equal, prints the figures.

    Raises DataError where batches differ or no row can be used.
    """
    prompt_format = PromptFormat(tokenizer, max_length=min(tokenizer.model_max_length, LONGEST))
    write_csv(folder / "rows.csv", texts)
    prompt_format.training_rows(*zip(*texts[:CHUNK], strict=True))  # starts the tokenizer's threads
    table, map_seconds = timed(open_token_table, folder / "rows.csv", prompt_format, folder / "map", on_bad_row="skip")
    dtype = table.ids(0).dtype.name
    dataset, arrow_seconds = timed(build_arrow, folder / "arrow", texts, prompt_format, dtype)
    good = [texts[number - 1] for number in table.numbers]
    pad_id = tokenizer.eos_token_id
    plan = plan_epoch(table.lengths, batch_size, 1, seed=0, epoch=0, max_micro_batches=BATCHES)
    batches = [rows for step in plan for rows in step]
    fetches: list[Fetch] = [
        lambda rows: tokenised_batch(good, prompt_format, rows, pad_id),
        lambda rows: arrow_batch(dataset, rows, pad_id),
        lambda rows: collate(table, rows, pad_id),
    ]
    if difference := first_difference(fetches, batches):
        raise DataError(difference)
    tokens = int(table.lengths.sum())
    print(f"{len(table)} rows, {tokens} tokens as {dtype}; {len(batches)} batches of {batch_size}, all equal")
    megabytes = [folder_size(folder / name) / 1e6 for name in ("arrow", "map")]
    print(f"Arrow       built in {arrow_seconds:6.2f} s, {megabytes[0]:8.2f} MB on disk")
    print(f"memory map  built in {map_seconds:6.2f} s, {megabytes[1]:8.2f} MB on disk (CSV read, files hashed)")
    print(f"microseconds a batch, {rounds - 1} rounds; tokenising may use {os.cpu_count()} cores, the others one")
    rounds_of = [lambda fetch=fetch: [fetch(rows) for rows in batches] for fetch in fetches]
    print_timings(interleaved(rounds_of, rounds), len(batches))


def print_timings(timings: list[list[float]], batches: int) -> None:
    """timings: seconds of each round, for each of NAMES."""
    for name, column in zip(NAMES, timings, strict=True):
        middle, low, high = (1e6 * value / batches for value in (statistics.median(column), min(column), max(column)))
        print(f"{name:<11} median {middle:9.1f}   min {low:9.1f}   max {high:9.1f}")
    *others, ours = timings
    for name, column in zip(NAMES, others, strict=False):
        ratios = [theirs / our for theirs, our in zip(column, ours, strict=True)]
        ratio = statistics.median(column) / statistics.median(ours)
        print(f"{name} takes {ratio:.1f} times the memory map's time (by round {min(ratios):.1f} to {max(ratios):.1f})")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line. Exits with 2 and one line for a usage error."""
    parser = OneLineParser("token_cache", description="What fetching a training batch costs, three ways.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with id, article, highlights; default: made-up news")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: one trained on the made-up news")
    parser.add_argument("--rows", type=int, default=3000, help="at most so many; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="the first is dropped; default: %(default)s")
    options = parser.parse_args(arguments)
    for name, least in (("rows", 1), ("batch_size", 1), ("rounds", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}: expected {least} or more")
    if options.csv and not options.tokenizer:
        parser.error("--csv needs --tokenizer: give the folder of a tokenizer")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns 0, or 2 with one line for what cannot be read or differs."""
    options = parse_arguments(arguments)
    disable_progress_bars()
    try:
        texts, tokenizer = load_rows(options.csv, options.tokenizer, options.rows)
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), texts, tokenizer, options.batch_size, options.rounds)
    except DataError as error:
        print(f"token_cache: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
