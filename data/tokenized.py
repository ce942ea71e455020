"""Tokenised rows on disk: an Arrow file, written once by `datasets` and memory-mapped from then on.

Its name holds a hash of the CSV's bytes, the tokenizer, the template and the options, so a stale file is never used.
It is written under a temporary name and renamed, so a half-written file is never used either.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.articles import Article, BadRow, DataError, check_bad_rows, iterate_articles
from data.prompts import PromptFormat, RowTooLong

VERSION = 2  # increase it when the same input gives other rows
CHUNK = 512  # rows tokenised at a time, on all cores
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow reads a file that lacks it as a shorter table


class TokenizedDataset:
    """Rows of token ids, read from disk on demand.

    len(table): rows. name: identifies the rows in checkpoints and caches. lengths, prompt_lengths, label_counts:
    int64 [rows]; row i is prompt_lengths[i] tokens of prompt, then its labels. numbers: int64 [rows], of the data
    rows in the CSV, from 1. skipped: the bad rows, which are not among the rows.

    Raises:
        DataError: the file is damaged.
    """

    def __init__(self, path: Path):
        import pyarrow.compute
        from datasets import Dataset

        self.path, self.name = path, path.stem[:-16]  # checkpoints hold 16 digits of the hash
        try:
            table = Dataset.from_file(str(path)).data.table
        except (OSError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise DataError(f"{path} is damaged ({cause}): delete it, and it is built again") from error
        rows = pyarrow.compute.sum(pyarrow.compute.equal(table["reason"], "")).as_py()
        good, bad = table.slice(0, rows), table.slice(rows).select(["number", "line", "id", "reason"])
        self.skipped = sorted((BadRow(**row) for row in bad.to_pylist()), key=lambda row: row.number)
        self._ids, self._input_ids = good["id"], good["input_ids"]
        self.lengths = pyarrow.compute.list_value_length(self._input_ids).to_numpy().astype(np.int64)
        self.prompt_lengths, self.numbers = good["prompt_length"].to_numpy(), good["number"].to_numpy()
        self.label_counts = self.lengths - self.prompt_lengths

    def __reduce__(self):
        return TokenizedDataset, (self.path,)  # a worker process maps the file itself

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row, read-only."""
        return self._input_ids[int(row)].values.to_numpy()

    def names(self, rows) -> list[str]:
        """`id (row number)` of each row, for messages."""
        return [f"{self._ids[int(row)]} (row {self.numbers[row]})" for row in rows]


def open_token_table(
    csv_path: str | Path,
    prompt_format: PromptFormat,
    cache_dir: str | Path,
    columns: dict | None = None,
    on_bad_row: str = "error",
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenizedDataset:
    """The tokenised rows of a CSV; tokenised now unless `cache_dir` holds them.

    on_bad_row: "error" refuses the file after reading all of it, "skip" leaves bad rows out and lists them. A row whose
    highlights do not fit is a bad row. progress is called with the number of rows just tokenised.

    Raises:
        DataError: the CSV has bad rows ("error"), or has no good row; cache_dir cannot be written.
        OSError: the CSV cannot be read.
    """
    path = Path(cache_dir) / f"{cache_key(csv_path, prompt_format, columns, on_bad_row)}.arrow"
    try:
        if not is_complete(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.stem}.lock")):
                if not is_complete(path):  # unless another process wrote it meanwhile
                    write_table(path, csv_path, prompt_format, columns, on_bad_row, progress)
    except OSError as error:
        raise DataError(f"dataset_kwargs.cache_dir: {path}: {error.strerror or error}: free up space there, or name "
                        "another folder") from error
    return TokenizedDataset(path)


def cache_key(csv_path, prompt_format: PromptFormat, columns: dict | None, on_bad_row: str) -> str:
    """`stem-hash` with 32 hexadecimal digits of everything that decides the rows."""
    with Path(csv_path).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    options = json.dumps([VERSION, content, prompt_format.fingerprint(), columns, on_bad_row], sort_keys=True)
    return f"{Path(csv_path).stem}-{hashlib.sha256(options.encode()).hexdigest()[:32]}"


def is_complete(path: Path) -> bool:
    """Whether the file is there, not cut off."""
    try:
        with path.open("rb") as file:
            file.seek(-len(END_OF_STREAM), os.SEEK_END)
            return file.read() == END_OF_STREAM
    except OSError:
        return False


def write_table(path: Path, csv_path, prompt_format, columns, on_bad_row, progress) -> None:
    """The good rows in order, then the bad ones, which have a reason and no tokens."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    largest = max(prompt_format.tokenizer.get_vocab().values())  # not the number of tokens: ids may have gaps
    features = Features({
        "input_ids": List(Value("uint16" if largest < 1 << 16 else "uint32")), "prompt_length": Value("int64"),
        "number": Value("int64"), "line": Value("int64"), "id": Value("string"), "reason": Value("string"),
    })
    good, bad = 0, []
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with ArrowWriter(path=str(temporary), features=features) as writer:

            def write(rows: list[tuple]) -> None:
                if rows:
                    writer.write_batch(dict(zip(features, map(list, zip(*rows, strict=True)), strict=True)))

            for chunk in chunks(iterate_articles(csv_path, columns), CHUNK):
                bad += [row for row in chunk if isinstance(row, BadRow)]
                articles = [row for row in chunk if isinstance(row, Article)]
                texts = [row.article for row in articles], [row.highlights for row in articles]
                tokenised = list(zip(articles, prompt_format.training_rows(*texts), strict=True))
                bad += [BadRow(article.number, article.line, article.id, str(row)) for article, row in tokenised
                        if isinstance(row, RowTooLong)]
                rows = [(*row, article.number, article.line, article.id, "") for article, row in tokenised
                        if not isinstance(row, RowTooLong)]
                write(rows)
                good += len(rows)
                progress(len(chunk))
            check_bad_rows(csv_path, sorted(bad, key=lambda row: row.number), good, on_bad_row)
            write([([], 0, row.number, row.line, row.id, row.reason) for row in bad])
            writer.finalize()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def chunks(rows: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk
