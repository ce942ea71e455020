"""Tables of articles and highlights -> checked rows, one at a time, with row and line in every complaint.

    for row in iterate_articles("train.csv"):  # Article or BadRow
    articles, bad_rows = read_articles("train.csv", on_bad_row="skip")

CSV (`.csv`, and `.tsv` with tabs), JSON Lines (`.jsonl`) and Parquet (`.parquet`), the first three also with `.gz`.
Text is UTF-8, with or without byte order mark. Every cell stays the text it is ("NA", "001", "3.50", outer white
space); only line ends inside a cell become LF. Memory does not grow with the file.

Quoting is strict: after one lost quote a lenient reader swallows rows in silence. Everything that `csv` and pandas
write passes. Quotes inside a cell that does not start with one (`he said "no"`) are plain text.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

DEFAULT_COLUMNS = {"id": "id", "article": "article", "highlights": "highlights"}
Row = tuple[int, int, dict[str, str], str | None]  # number, line, cells by column, what is wrong with its form


class DataError(ValueError):
    """A file or setting that cannot be used. The message is one line for the user."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Article:
    """A good row. number: of the data row, from 1. line: of the file, where the row starts. extra: other columns."""

    number: int
    line: int
    id: str
    article: str
    highlights: str
    extra: dict[str, str]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why. number and line as in Article; id is "" if the row is too short."""

    number: int
    line: int
    id: str
    reason: str


def iterate_articles(path: str | PathLike, columns: dict[str, str | None] | None = None) -> Iterator[Article | BadRow]:
    """The file's rows in order, read on demand; of earlier rows only the ids are kept.

    columns: {"id", "article" or "highlights": the file's name for it}, the rest as in DEFAULT_COLUMNS; with "id" None
    the ids are the row numbers.
    Bad rows: a wrong number of fields (`,,` is a row, a blank line is none), an empty id, article or highlights, and an
    id that an earlier good row has.
    Raises DataError, when iterated, if the file as a whole cannot be trusted: missing, empty, no rows, no such
    column, two columns of one name, wrong quoting, NUL bytes, or bytes that are not UTF-8.
    """
    columns = complete_columns(columns or {})
    rows = read_rows(Path(path))
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: the file is empty: expected a header with {', '.join(DEFAULT_COLUMNS)}")
    check_header(path, header, columns)
    row, first_rows = None, {}
    for values in rows:
        row = make_row(values, columns)
        if isinstance(row, Article) and (first := first_rows.setdefault(row.id, row.number)) != row.number:
            row = BadRow(row.number, row.line, row.id, f"the id is that of row {first}")
        yield row
    if row is None:
        raise DataError(f"{path}: a header but no rows: add rows to it")


def read_articles(
    path: str | PathLike, columns: dict[str, str | None] | None = None, on_bad_row: str = "error"
) -> tuple[list[Article], list[BadRow]]:
    """(good rows, bad rows) of the whole file. Arguments and errors are those of `iterate_articles`.

    on_bad_row: "error" raises DataError for bad rows, after the last row is read; "skip" returns them. A file without
    any good row is a DataError in both cases.
    """
    articles, bad_rows = [], []
    for row in iterate_articles(path, columns):
        (articles if isinstance(row, Article) else bad_rows).append(row)
    check_bad_rows(path, bad_rows, len(articles), on_bad_row)
    return articles, bad_rows


# -- formats -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[list[str] | Row]:
    """The column names (a list), then a Row for each row. Raises DataError."""
    *_, ending = (suffix for suffix in ["", *path.suffixes] if suffix != ".gz")
    try:
        if ending == ".parquet":
            yield from parquet_rows(path)
            return
        # A byte that is not UTF-8 becomes a lone surrogate, so that its row can be named.
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from json_rows(path, file) if ending in (".jsonl", ".ndjson") else csv_rows(
                path, file, "\t" if ending == ".tsv" else ",")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): check the path and the "
                        "file") from None


def csv_rows(path: Path, file, delimiter: str) -> Iterator[list[str] | Row]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit is less than a long article
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    header, number = None, 0
    while True:
        line = reader.line_num + 1
        where = f"{path}: {f'row {number + 1}' if header else 'header'} (line {line})"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}: a quote in it is wrong ({error}): close the cell with \" before the comma, and "
                            'write a quote inside it as ""') from None
        if cells is None:
            return
        check_text(where, cells)
        if header is None and cells:
            header = cells
            yield header
        elif cells:
            number += 1
            problem = f"{len(cells)} fields where the header has {len(header)}" if len(cells) != len(header) else None
            yield number, line, dict(zip(header, cells, strict=False)), problem


def json_rows(path: Path, file) -> Iterator[list[str] | Row]:
    number = 0
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        number += 1
        where = f"{path}: row {number} (line {line})"
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON ({error}): one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: is not a JSON object: expected {{\"article\": ...}}")
        row = {key: as_text(value) for key, value in values.items()}
        check_text(where, row.values())
        if number == 1:
            yield list(row)
        yield number, line, row, None


def parquet_rows(path: Path) -> Iterator[list[str] | Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table.schema_arrow.names
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, values in enumerate(rows, 1):
                yield number, number, {key: as_text(value) for key, value in values.items()}, None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a readable Parquet file ({error})") from None


def as_text(value) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def make_row(row: Row, columns: dict[str, str | None]) -> Article | BadRow:
    """The Article, or a BadRow for a problem of its form or a required cell that is empty or white space."""
    number, line, cells, problem = row
    cells = {name: cell.replace("\r\n", "\n").replace("\r", "\n") for name, cell in cells.items()}
    values = {role: str(number) if name is None else cells.get(name, "") for role, name in columns.items()}
    empty = [role for role, value in values.items() if not value.strip()]
    if problem or empty:
        return BadRow(number, line, values["id"], problem or f"empty {' and '.join(empty)}")
    extra = {name: cell for name, cell in cells.items() if name not in columns.values()}
    return Article(number, line, **values, extra=extra)


# -- checks --------------------------------------------------------------------------------------------------------


def check_text(where: str, cells: Iterable[str]) -> None:
    """Raises DataError for a byte that is not UTF-8 or is NUL."""
    for cell in cells:
        if (not cell.isascii() or "\0" in cell) and (bad := re.search("[\0\ud800-\udfff]", cell)):
            byte = "a NUL byte" if bad[0] == "\0" else f"the byte 0x{ord(bad[0]) & 0xFF:02X}, which is not UTF-8"
            raise DataError(f"{where}: holds {byte}: save as UTF-8 and try again")


def complete_columns(columns: dict[str, str | None]) -> dict[str, str | None]:
    """{"id", "article", "highlights": column name}, by default the same; only the id may be None. Raises DataError."""
    columns = DEFAULT_COLUMNS | columns
    if None in (columns["article"], columns["highlights"]):
        raise DataError("article and highlights should be names of columns: only id may be null")
    if len(set(columns.values())) < len(columns):
        raise DataError("id, article and highlights should be different columns")
    return columns


def check_header(path, header: list[str], columns: dict[str, str | None]) -> None:
    """Raises DataError for two columns of one name, and for one that is missing."""
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path}: more than one column is named {name[:40]!r}: rename or remove all but one")
    missing = {role: name for role, name in columns.items() if name is not None and name not in header}
    if not missing:
        return
    found = ", ".join(f"{column[:40]!r}" for column in header[:20])
    if len(header) == 1 and re.search("[;\t|]", header[0]):
        raise DataError(f"{path}: one column found, {found}: separate the columns with commas")
    lower_case, example = {column.strip().lower(): column for column in header}, {}
    for role, name in missing.items():
        near = get_close_matches(name.strip().lower(), lower_case, 1, cutoff=0.75)
        example[role] = lower_case[near[0]] if near else None if role == "id" else "name of your column"
    raise DataError(
        f"{path}: no column {', '.join(map(repr, missing.values()))} (columns found: {found}): rename it, or set "
        f"dataset_kwargs.columns (--columns of validate_model.py) to {json.dumps(example, ensure_ascii=False)}"
        " (an id of null numbers the rows)"
    )


def check_bad_rows(path: str | PathLike, bad_rows: list[BadRow], good: int, on_bad_row: str) -> None:
    """Raises DataError for bad rows, unless they are to be skipped and good ones are left. good: their number."""
    if bad_rows and (on_bad_row == "error" or not good):
        remedy = ('correct them, or skip them with on_bad_row "skip" (in dataset_kwargs, or --on_bad_row skip)' if good
                  else "no usable row is left: correct them")
        raise DataError(f"{describe_bad_rows(path, bad_rows, good + len(bad_rows))}: {remedy}")


def describe_bad_rows(path: str | PathLike, bad_rows: list[BadRow], total: int) -> str:
    """One line: how many of the file's `total` rows are bad, and the first three of them."""
    shown = [f"row {row.number} (line {row.line}, id {row.id[:40]!r}): {row.reason}" for row in bad_rows[:3]]
    more = [f"and {len(bad_rows) - 3} more"] if len(bad_rows) > 3 else []
    verb = "is" if len(bad_rows) == 1 else "are"
    return f"{path}: {len(bad_rows)} of {total} rows {verb} bad: {'; '.join(shown + more)}"
