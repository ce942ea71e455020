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
import difflib
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

DEFAULT_COLUMNS = {"id": "id", "article": "article", "highlights": "highlights"}
LINE_END = re.compile(r"\r\n|\r|\n")
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
    """A row that cannot be used, and why. number and line as in Article; id is "" where the row is too short."""

    number: int
    line: int
    id: str
    reason: str


def iterate_articles(
    path: str | PathLike, columns: dict[str, str | None] | None = None, need_highlights: bool = True
) -> Iterator[Article | BadRow]:
    """The file's rows in order, read on demand; of earlier rows only the ids are kept.

    columns: {"id", "article" or "highlights": the file's name for it}, the rest as in DEFAULT_COLUMNS; with "id" None
    the ids are the row numbers. need_highlights False: highlights may be empty or their column missing (then "").
    Bad rows: a wrong number of fields (`,,` is a row, a blank line is none), an empty id, article or needed
    highlights, and an id that an earlier good row has.
    Raises DataError, when iterated, if the file as a whole cannot be trusted: missing, empty, no rows, no such
    column, two columns of one name, wrong quoting, NUL bytes, or bytes that are not UTF-8.
    """
    names = complete_columns(columns)  # before the file: a wrong setting is wrong for any file
    first_rows: dict[str, int] = {}
    with opened(path) as rows:
        header = next(rows, None)
        if header is None:
            raise DataError(f"{path}: the file is empty: expected a header with {', '.join(DEFAULT_COLUMNS)}")
        check_header(path, header, names, need_highlights)
        row = None
        for values in rows:
            row = make_row(values, names, need_highlights)
            if isinstance(row, Article) and (first := first_rows.setdefault(row.id, row.number)) != row.number:
                row = BadRow(row.number, row.line, row.id, f"the id is that of row {first}")
            yield row
        if row is None:
            raise DataError(f"{path}: a header but no rows: add rows to it")


def read_articles(
    path: str | PathLike,
    columns: dict[str, str | None] | None = None,
    on_bad_row: str = "error",
    need_highlights: bool = True,
) -> tuple[list[Article], list[BadRow]]:
    """(good rows, bad rows) of the whole file. Arguments and errors are those of `iterate_articles`.

    on_bad_row: "error" raises DataError for bad rows, after the last row is read; "skip" returns them. A file without
    any good row is a DataError in both cases.
    """
    articles, bad_rows = [], []
    for row in iterate_articles(path, columns, need_highlights):
        (articles if isinstance(row, Article) else bad_rows).append(row)
    check_bad_rows(path, bad_rows, len(articles), on_bad_row)
    return articles, bad_rows


# -- formats -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: str | PathLike) -> Iterator[Iterator]:
    """An iterator over the column names (a list), then a Row for each row. Raises DataError; also while it is read."""
    path = Path(path)
    *_, kind = (suffix for suffix in ["", *path.suffixes] if suffix != ".gz")
    try:
        if kind == ".parquet":
            with path.open("rb") as file:
                yield parquet_rows(path, file)
            return
        # A byte that is not UTF-8 becomes a lone surrogate, so that its row and column can be named.
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield json_rows(path, file) if kind in (".jsonl", ".ndjson") else csv_rows(
                path, file, "\t" if kind == ".tsv" else ",")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder: give the table in it") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}): check the file") from None


def csv_rows(path: Path, file, delimiter: str) -> Iterator[list[str] | Row]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit is less than a long article
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    header, number = None, 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            row = name_row(number + (header is not None), line)
            raise DataError(f"{path}: {row}: a quote in it is wrong ({error}): close the cell with \" before the "
                            'comma, and write a quote inside it as ""') from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            check_text(path, 0, line, {str(place): cell for place, cell in enumerate(cells, 1)})
            yield header
            continue
        number += 1
        names = [*header, *map(str, range(len(header) + 1, len(cells) + 1))]
        row = dict(zip(names, cells, strict=False))
        check_text(path, number, line, row)
        wrong = len(cells) != len(header)
        yield number, line, row, f"{len(cells)} fields where the header has {len(header)}" if wrong else None


def json_rows(path: Path, file) -> Iterator[list[str] | Row]:
    header, number = None, 0
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        number += 1
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {name_row(number, line)}: is no JSON ({error}): one object a line") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: {name_row(number, line)}: is no JSON object: expected {{\"article\": ...}}")
        row = {key: as_text(value) for key, value in values.items()}
        check_text(path, number, line, row)
        if header is None:
            header = list(row)
            yield header
        yield number, line, row, None


def parquet_rows(path: Path, file) -> Iterator[list[str] | Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        yield table.schema_arrow.names
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        for number, values in enumerate(rows, 1):
            yield number, number, {key: as_text(value) for key, value in values.items()}, None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no Parquet file that can be read ({error})") from None


def as_text(value) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# -- checks --------------------------------------------------------------------------------------------------------


def check_text(path: Path, number: int, line: int, cells: dict[str, str]) -> None:
    """Raises DataError for a byte that is not UTF-8 or is NUL, naming its column."""
    for name, cell in cells.items():
        if cell.isascii() and "\0" not in cell:
            continue
        if bad := re.search("[\0\ud800-\udfff]", cell):
            byte = "a NUL byte" if bad[0] == "\0" else f"the byte 0x{ord(bad[0]) & 0xFF:02X}, which is not UTF-8"
            column = name if name.isdecimal() else shorten(name)
            raise DataError(f"{path}: {name_row(number, line)}, column {column}: holds {byte}: save as UTF-8 and try "
                            "again")


def check_header(path, header: list[str], names: dict[str, str | None], need_highlights: bool) -> None:
    """Raises DataError for two columns of one name, and for one that is missing."""
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(f"{path}: more than one column is named {shorten(repeated[0])}: rename or remove all but one")
    # Highlights that are not needed may be missing by their default name alone: a mapped one was meant.
    optional = set() if need_highlights else {("highlights", DEFAULT_COLUMNS["highlights"])}
    missing = {role: name for role, name in names.items()
               if name is not None and name not in header and (role, name) not in optional}
    if missing:
        raise DataError(describe_missing(path, header, missing))


def complete_columns(columns: dict[str, str | None] | None) -> dict[str, str | None]:
    """{"id", "article", "highlights": column name}, only the id None. Raises DataError for what cannot be a mapping."""
    columns = columns or {}
    for role, name in columns.items():
        if name is None and role != "id":
            raise DataError(f"columns: {role} is null: give the name of a column")
    columns = {**DEFAULT_COLUMNS, **columns}
    name, count = Counter(columns.values()).most_common(1)[0]
    if count > 1:
        roles = [role for role in columns if columns[role] == name]
        raise DataError(f"columns: {' and '.join(roles)} are both {name!r}: give each a column of its own")
    return columns


def describe_missing(path, header: list[str], missing: dict[str, str]) -> str:
    """One line about the columns that the file lacks. missing: {role: column name}."""
    alike = {column.strip().lower(): column for column in header}
    near = {role: next((alike[key] for key in difflib.get_close_matches(name.strip().lower(), alike, 1, cutoff=0.75)),
                       None) for role, name in missing.items()}
    found = ", ".join(shorten(column) for column in header[:20]) + (", …" if len(header) > 20 else "")
    meant = ", ".join(repr(column) for column in near.values() if column is not None)
    if len(header) == 1 and re.search("[;\t|]", header[0]):
        return f"{path}: one column found, {found}: separate the columns with commas"
    example = {role: near[role] or (None if role == "id" else "name of your column") for role in missing}
    return (
        f"{path}: no column {', '.join(repr(name) for name in missing.values())} (columns found: {found})"
        + (f", did you mean {meant}?" if meant else "")
        + ": rename it, or map it with dataset_kwargs.columns in a config or --columns on the command line of"
        + f" validate_model.py, e.g. {json.dumps(example, ensure_ascii=False)}"
        + (" (null numbers the rows)" if None in example.values() else "")
    )


def make_row(row: Row, names: dict[str, str | None], need_highlights: bool) -> Article | BadRow:
    """The Article, or a BadRow for a problem of its form or a required cell that is empty or white space."""
    number, line, cells, problem = row
    cells = {name: LINE_END.sub("\n", cell) if "\r" in cell else cell for name, cell in cells.items()}
    values = {role: str(number) if name is None else cells.get(name, "") for role, name in names.items()}
    required = DEFAULT_COLUMNS if need_highlights else ("id", "article")
    empty = [role for role in required if not values[role].strip()]
    if problem is not None or empty:
        return BadRow(number, line, values["id"], problem or "empty " + " and ".join(empty))
    extra = {name: cell for name, cell in cells.items() if name not in names.values()}
    return Article(number, line, **values, extra=extra)


# -- messages ------------------------------------------------------------------------------------------------------


def check_bad_rows(path: str | PathLike, bad_rows: list[BadRow], good: int, on_bad_row: str) -> None:
    """Raises DataError for bad rows, unless they are to be skipped and good ones are left. good: their number."""
    if bad_rows and (on_bad_row == "error" or not good):
        remedy = 'correct them, or skip them with on_bad_row "skip" (in dataset_kwargs, or --on_bad_row skip)'
        if not good:
            remedy = "no usable row is left: correct them"
        raise DataError(f"{describe_bad_rows(path, bad_rows, good + len(bad_rows))}: {remedy}")


def describe_bad_rows(path: str | PathLike, bad_rows: list[BadRow], total: int) -> str:
    """One line: how many of the file's `total` rows are bad, and the first three of them."""
    shown = [f"row {row.number} (line {row.line}, id {shorten(row.id)}): {row.reason}" for row in bad_rows[:3]]
    more = [f"and {len(bad_rows) - 3} more"] if len(bad_rows) > 3 else []
    verb = "is" if len(bad_rows) == 1 else "are"
    return f"{path}: {len(bad_rows)} of {total} rows {verb} bad: {'; '.join(shown + more)}"


def name_row(number: int, line: int) -> str:
    return f"row {number} (line {line})" if number else f"header (line {line})"


def shorten(text: str, limit: int = 40) -> str:
    """The text in quotes, on one line, cut after `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
