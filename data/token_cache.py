"""Tokenised rows on disk as flat files: tokenised once, then read in microseconds a batch.

A cache folder holds `tokens.bin` (all ids one after the other), `offsets.npy`, `boundaries.npy`, `numbers.npy`,
`ids.json`, `skipped.json` and `manifest.json`. It is named by a hash of the CSV's bytes, the tokenizer, the template
and the options, so a stale one is never used, and made beside its place and renamed, so a half-made one is never seen.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.articles import Article, BadRow, DataError, describe_bad_rows, iterate_articles
from data.digest import file_digest
from data.flat_array import FlatArray
from data.os_errors import describe
from data.prompts import PromptFormat, RowTooLong
from data.scratch import clear_dead, made_folder, scratch_folder

VERSION = 2  # raise it when the same input gives other files
CHUNK = 512  # rows tokenised at a time, on all cores
DTYPES = ("uint16", "uint32")  # of a token
FILES = {"tokens.bin", "offsets.npy", "boundaries.npy", "numbers.npy", "ids.json", "skipped.json"}


class TokenizedDataset:
    """Rows of token ids, read from the disk as they are asked for.

    len(table): rows. lengths, boundaries: int64 [rows]; the labels of row i are its ids from boundaries[i] on.
    skipped: the bad rows that were left out.
    """

    def __init__(self, folder: Path):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.folder = folder
        self._tokens = FlatArray(folder / "tokens.bin", manifest["dtype"])
        self._offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.boundaries = np.load(folder / "boundaries.npy", allow_pickle=False)
        self.numbers = np.load(folder / "numbers.npy", allow_pickle=False)
        self.lengths = np.diff(self._offsets)
        self.skipped = [BadRow(**row) for row in json.loads((folder / "skipped.json").read_text(encoding="utf-8"))]

    def __reduce__(self):
        return TokenizedDataset, (self.folder,)  # an open file cannot be sent to a worker process

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row. Raises OSError."""
        return self._tokens[self._offsets[row] : self._offsets[row + 1]]

    @property
    def label_counts(self) -> np.ndarray:
        """Label tokens of each row, int64 [rows]."""
        return self.lengths - self.boundaries

    def names(self, rows) -> list[str]:
        """`id (row number)` of each row, for messages."""
        ids = json.loads((self.folder / "ids.json").read_text(encoding="utf-8"))
        return [f"{ids[row]} (row {self.numbers[row]})" for row in rows]

    def fits_together(self) -> bool:
        """Whether every row lies inside the tokens and has a name, which the sums of the files do not tell."""
        starts, ends, rows = self._offsets[:-1], self._offsets[1:], len(self.lengths)
        whole = rows > 0 and starts[0] == 0 and ends[-1] == len(self._tokens) and bool((starts < ends).all())
        ids = json.loads((self.folder / "ids.json").read_text(encoding="utf-8"))
        counts = {len(self.boundaries), len(self.numbers), len(ids)}
        return whole and counts == {rows} and bool(((self.boundaries >= 0) & (self.boundaries <= self.lengths)).all())


def open_token_table(
    csv_path: str | Path,
    prompt_format: PromptFormat,
    cache_dir: str | Path,
    columns: dict | None = None,
    on_bad_row: str = "error",
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenizedDataset:
    """The token table of a CSV: from the cache where it is there and whole, else made.

    on_bad_row: "error" refuses the file after reading all of it, "skip" leaves bad rows out and lists them. A row whose
    highlights do not fit is a bad row. progress is called with the number of rows just tokenised.

    Raises:
        DataError: the CSV cannot be read, has bad rows ("error"), or has no good row; cache_dir cannot be written;
            on_bad_row is neither.
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f'on_bad_row is {on_bad_row!r}: use "error" or "skip"')
    folder = Path(cache_dir) / cache_key(csv_path, prompt_format, columns, on_bad_row)
    clear_dead(folder.parent)
    if not is_whole(folder):
        build_table(folder, csv_path, prompt_format, columns, on_bad_row, progress)
    return TokenizedDataset(folder)


def cache_key(csv_path, prompt_format: PromptFormat, columns: dict | None, on_bad_row: str) -> str:
    try:
        content = file_digest(csv_path)
    except OSError as error:
        raise DataError(f"{csv_path}: cannot be read ({error.strerror or error}): check the path") from error
    options = json.dumps([VERSION, content, prompt_format.fingerprint(), columns, on_bad_row], sort_keys=True)
    return f"{Path(csv_path).stem}-{hashlib.sha256(options.encode()).hexdigest()[:16]}"


def is_whole(folder: Path) -> bool:
    """Whether every file of the cache is there with the sha256 it was written with."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["version"] != VERSION or set(manifest["files"]) != FILES or manifest["dtype"] not in DTYPES:
            return False
        same = all(file_digest(folder / name) == value for name, value in manifest["files"].items())
        return same and TokenizedDataset(folder).fits_together()
    except (OSError, ValueError, LookupError, TypeError, MemoryError, RecursionError):
        return False


def build_table(folder: Path, csv_path, prompt_format, columns, on_bad_row, progress) -> None:
    try:
        with made_folder(folder.parent), scratch_folder(folder.parent) as scratch:
            table = scratch / "table"  # a folder in it, because the scratch folder is closed to other users
            table.mkdir()
            write_table(table, csv_path, prompt_format, columns, on_bad_row, progress)
            # The name promises the bytes that were hashed: a file changed while it was read must not get it.
            if cache_key(csv_path, prompt_format, columns, on_bad_row) != folder.name:
                raise DataError(f"{csv_path}: was changed while it was read: run again once it is whole")
            install(table, folder)
    except OSError as error:
        raise DataError(f"dataset_kwargs.cache_dir: {describe(error, folder)}; or name another folder") from error


def install(table: Path, folder: Path) -> None:
    """Moves a finished table to its place. A whole one that another process put there is as good and stays."""
    try:
        table.rename(folder)
    except OSError:
        if is_whole(folder):
            return
        if not os.path.lexists(folder):
            raise
        if not folder.is_dir():
            folder.rename(table.parent / "damaged")
            table.rename(folder)
            return
        # File by file over a damaged one: the name promises the same bytes, and no reader ever finds a file missing.
        for path in table.iterdir():
            place = folder / path.name
            if place.is_dir():
                place.rename(table.parent / f"damaged-{path.name}")
            path.replace(place)


def write_table(folder: Path, csv_path, prompt_format, columns, on_bad_row, progress) -> None:
    greatest = max(prompt_format.tokenizer.get_vocab().values())  # not the number of tokens: ids may have gaps
    dtype = "uint16" if greatest < 1 << 16 else "uint32"
    lengths, boundaries, numbers, ids, bad_rows = [], [], [], [], []
    with (folder / "tokens.bin").open("wb") as tokens:
        for chunk in chunks(iterate_articles(csv_path, columns), CHUNK):
            good = [row for row in chunk if isinstance(row, Article)]
            bad_rows += [row for row in chunk if isinstance(row, BadRow)]
            rows = prompt_format.training_rows([row.article for row in good], [row.highlights for row in good])
            for article, row in zip(good, rows, strict=True):
                if isinstance(row, RowTooLong):
                    bad_rows.append(BadRow(article.number, article.line, article.id, str(row)))
                    continue
                tokens.write(np.array(row[0], dtype=dtype).tobytes())
                lengths.append(len(row[0]))
                boundaries.append(row[1])
                numbers.append(article.number)
                ids.append(article.id)
            progress(len(chunk))
    total = len(ids) + len(bad_rows)
    bad_rows.sort(key=lambda row: row.number)
    if bad_rows and (on_bad_row == "error" or not ids):
        remedy = 'correct them, or go on without them with dataset_kwargs.on_bad_row "skip"'
        if not ids:
            remedy = "no usable row is left: correct them"
        raise DataError(f"{describe_bad_rows(csv_path, bad_rows, total)}: {remedy}")
    save_array(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    save_array(folder / "boundaries.npy", np.array(boundaries, dtype=np.int64))
    save_array(folder / "numbers.npy", np.array(numbers, dtype=np.int64))
    dump(folder / "ids.json", ids)
    dump(folder / "skipped.json", [asdict(row) for row in bad_rows])
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    dump(folder / "manifest.json", {"version": VERSION, "dtype": dtype, "files": files})


def save_array(path: Path, array: np.ndarray) -> None:
    """As `np.save`, which hides it where the last bytes cannot be written. Raises OSError."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    path.write_bytes(content.getvalue())


def dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")


def chunks(rows: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk
