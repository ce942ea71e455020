"""What fetching a training batch costs: tokenised on the spot, or read from the tokenised rows on disk.

    python -m benchmarks.token_cache --csv train.csv --tokenizer FOLDER

Without --csv it takes the demo's made-up news, with a tokenizer trained on it. Both ways give equal batches, which is
checked before any timing, and share one collation: only the way to the ids differs. They take turns over the same
batches, and the first round is dropped. Files are in the system's page cache.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.rouge_speed import interleaved
from data.articles import DataError, read_articles
from data.batches import collate, plan_epoch
from data.demo_news import SIZES, generate, train_tokenizer
from data.prompts import PromptFormat
from data.tokenized import CHUNK, open_token_table
from utils.cli import OneLineParser

BATCHES = 100  # fetched in each round
LONGEST = 1024  # tokens of a row, unless the tokenizer says less
NAMES = ("tokenising", "from disk")

Batch = dict[str, Tensor]
Texts = list[tuple[str, str]]  # article and highlights of each row


@dataclass(frozen=True, slots=True)
class FewRows:
    """The rows of one batch, as `collate` takes them. rows: token ids of each. prompt_lengths: int64 [rows]."""

    rows: list
    prompt_lengths: np.ndarray

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
        return texts, train_tokenizer(tables)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer is {folder}: no tokenizer.json in it: give a folder of save_pretrained")
    return texts, AutoTokenizer.from_pretrained(folder)


def write_csv(path: Path, texts: Texts) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "article", "highlights"))
        writer.writerows((number, *row) for number, row in enumerate(texts, start=1))


def tokenised_batch(texts: Texts, prompt_format: PromptFormat, rows: np.ndarray, pad_id: int) -> Batch:
    articles, highlights = zip(*(texts[row] for row in rows), strict=True)
    ids, lengths = zip(*prompt_format.training_rows(articles, highlights), strict=True)
    return collate(FewRows(ids, np.array(lengths)), np.arange(len(rows)), pad_id)


def measure(folder: Path, texts: Texts, tokenizer: PreTrainedTokenizerFast, batch_size: int, rounds: int) -> None:
    """Writes the rows into the folder, checks that all batches are equal, prints the figures.

    Raises DataError if batches differ or no row can be used.
    """
    prompt_format = PromptFormat(tokenizer, max_length=min(tokenizer.model_max_length, LONGEST))
    write_csv(folder / "rows.csv", texts)
    prompt_format.training_rows(*zip(*texts[:CHUNK], strict=True))  # starts the tokenizer's threads
    start = time.perf_counter()
    table = open_token_table(folder / "rows.csv", prompt_format, folder, on_bad_row="skip")
    seconds, pad_id = time.perf_counter() - start, tokenizer.eos_token_id
    good = [texts[number - 1] for number in table.numbers]
    plan = plan_epoch(table.lengths, batch_size, 1, seed=0, epoch=0, max_micro_batches=BATCHES)
    batches = [rows for step in plan for rows in step]
    fetches = [lambda rows: tokenised_batch(good, prompt_format, rows, pad_id),
               lambda rows: collate(table, rows, pad_id)]
    for rows in batches:
        expected, found = (fetch(rows) for fetch in fetches)
        if any(not torch.equal(expected[key], found[key]) for key in expected):
            raise DataError(f"rows {rows.tolist()}: the batch from disk is not that of tokenising")
    tokens, dtype = int(table.lengths.sum()), table.ids(0).dtype.name
    print(f"{len(table)} rows, {tokens} tokens as {dtype}; {len(batches)} batches of {batch_size}, all equal")
    print(f"built in {seconds:.2f} s, {table.path.stat().st_size / 1e6:.2f} MB on disk")
    print(f"microseconds a batch, {rounds - 1} rounds; tokenising may use {os.cpu_count()} cores, reading one")
    timings = interleaved([lambda fetch=fetch: [fetch(rows) for rows in batches] for fetch in fetches], rounds)
    for name, column in zip(NAMES, timings, strict=True):
        numbers = (1e6 * value / len(batches) for value in (statistics.median(column), min(column), max(column)))
        print(f"{name:<10} median {{:9.1f}}   min {{:9.1f}}   max {{:9.1f}}".format(*numbers))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line. Exits with 2 and one line for a usage error."""
    parser = OneLineParser("token_cache", description="What fetching a training batch costs, two ways.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with id, article, highlights; default: made-up news")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: one trained on the made-up news")
    parser.add_argument("--rows", type=int, default=3000, help="maximum; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
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
