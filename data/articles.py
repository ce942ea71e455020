"""CSV files of articles and highlights -> checked rows, one at a time, with row and line in every complaint.

    for row in iterate_articles("train.csv"):  # Article or BadRow
    articles, bad_rows = read_articles("train.csv", on_bad_row="skip")

The file is UTF-8 with or without byte order mark, comma-separated, with LF, CRLF or CR line ends. Every cell stays the
text it is ("NA", "001", "3.50", outer white space); only line ends inside a cell become LF. No Unicode normalisation.

A row may have LONGEST_ROW characters, highlights LONGEST_HIGHLIGHTS, a file MOST_COLUMNS columns: far more than news
have, and few enough that a hostile file ends in an error and not in all the memory. Pipes and devices are not read.

Quoting is strict: text after a closing quote (`"abc"def`) is an error, as is a quote never closed. A lenient reader
glues such cells together and, after one lost quote, swallows rows in silence. Nothing well-formed is lost by it: every
file that `csv` and pandas write passes, and so do the six real awkward files this reader was tried on. Quotes inside
a cell that does not start with one (`he said "no"`) are plain text.
"""

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from untrusted.files import open_regular

DEFAULT_COLUMNS = {"id": "id", "article": "article", "highlights": "highlights"}
LONGEST_ROW = 20_000_000  # characters, so of a cell too
LONGEST_HIGHLIGHTS = 300_000  # characters: the time and memory of ROUGE grow with the square of the words
LONGEST_ID = 10_000  # characters: all ids are kept
MOST_COLUMNS = 5000
LINE_END = re.compile(r"\r\n|\r|\n")


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


def shorten(text, limit=40):
    """The text in quotes, on one line, cut after `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def name_row(number, line):
    return f"row {number} (line {line})" if number else f"header (line {line})"


@contextmanager
def long_fields():
    """Lifts the csv module's limit of 131,072 characters. The limit is global, so hold it for one record at a time."""
    limit = csv.field_size_limit(LONGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


@contextmanager
def open_csv(path):
    """The file as text in which a byte that is not UTF-8 is a lone surrogate. Raises DataError if it cannot be read."""
    if Path(path).is_dir():
        raise DataError(f"{path}: is a folder: give the CSV file in it")
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the file") from None


def locate_faulty_quote(text):
    """(start, end) of the first quoted cell that no comma or line end follows; end is -1 if the cell never ends.

    text: one record, of which the csv module said that its quoting is wrong. end is the place after the closing quote.
    """
    start = 0
    while start < len(text):
        end = text.find(",", start)
        if text[start] == '"':
            end = text.find('"', start + 1)
            while end >= 0 and text.startswith('""', end):
                end = text.find('"', end + 2)
            end += 1
            if end == 0 or text[end : end + 1] not in (",", "\r", "\n"):
                return start, end or -1
        if end < 0:
            break
        start = end + 1
    return 0, -1


def describe_quote_error(path, number, line, text):
    """One line about the record's wrong quoting. line: where the record starts."""
    start, end = locate_faulty_quote(text)
    opened = line + line_ends(text[:start])
    quote = f"{path}: {name_row(number, line)}: the quote opened in line {opened} before {shorten(text[start + 1 :])}"
    remedy = 'close the cell with " before the comma, and write a quote inside it as ""'
    if end < 0:
        return f"{quote} is never closed: {remedy}"
    closed = line + line_ends(text[:end])
    return f"{quote} is closed in line {closed} before {shorten(text[end:])}: {remedy}"


def line_ends(text):
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def read_records(path, file):
    """(row number, line it starts in, cells) of each record but blank lines; the header is number 0.

    Raises DataError where the quoting is wrong, or a row too long.
    """
    lines = []  # of the record being read
    room = LONGEST_ROW  # characters that may still come of it

    def keep_lines():
        nonlocal room
        while text := file.readline(LONGEST_ROW + 1):
            room -= len(text)
            if room < 0:
                remedy = "close its quote, or cut the text" if len(lines) or '"' in text else "is this a CSV?"
                raise DataError(f"{path}: {name_row(number, line)}: longer than {LONGEST_ROW:,} characters: {remedy}")
            lines.append(text)
            yield text

    reader = csv.reader(keep_lines(), strict=True)
    number = 0
    while True:
        lines.clear()
        room = LONGEST_ROW
        line = reader.line_num + 1
        try:
            with long_fields():
                cells = next(reader, None)
        except csv.Error:
            raise DataError(describe_quote_error(path, number, line, "".join(lines))) from None
        if cells is None:
            return
        if cells:
            yield number, line, cells
            number += 1


def check_text(path, number, line, cells, header):
    """Raises DataError for a byte that is not UTF-8 or is NUL, naming its column."""
    for index, cell in enumerate(cells):
        if cell.isascii() and "\0" not in cell:
            continue
        try:
            cell.encode()
            byte = "a NUL byte" if "\0" in cell else ""
        except UnicodeEncodeError as error:
            byte = f"the byte 0x{ord(cell[error.start]) - 0xDC00:02X}, which is not UTF-8"
        if byte:
            column = f"column {shorten(header[index]) if index < len(header) else index + 1}"
            raise DataError(f"{path}: {name_row(number, line)}, {column}: holds {byte}: save as UTF-8 and try again")


def check_header(path, line, header):
    """Raises DataError for too many columns, bytes that are not text, or two columns of one name."""
    if len(header) > MOST_COLUMNS:
        raise DataError(f"{path}: {len(header):,} columns: expected at most {MOST_COLUMNS:,}: is this the right file?")
    check_text(path, 0, line, header, header=())
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise DataError(f"{path}: more than one column is named {shorten(repeated[0])}: rename or remove all but one")


def complete_columns(columns):
    """{"id", "article", "highlights": column name}, only the id None. Raises DataError for what cannot be a mapping."""
    columns = columns or {}
    for role, name in columns.items():
        if role not in DEFAULT_COLUMNS:
            raise DataError(f"columns: unknown key {role!r}: use only {', '.join(DEFAULT_COLUMNS)}")
        if not isinstance(name, str) and not (role == "id" and name is None):
            or_null = ", or null to number the rows" if role == "id" else ""
            raise DataError(f"columns: {role} is {json.dumps(name)}: give the name of a column{or_null}")
    columns = {**DEFAULT_COLUMNS, **columns}
    for role, name in columns.items():
        twins = [other for other in columns if columns[other] == name]
        if len(twins) > 1:
            raise DataError(f"columns: {' and '.join(twins)} are both {name!r}: give {role} a column of its own")
    return columns


def find_near(name, header):
    """The column most like the name, whatever its case and outer white space, or None."""
    alike = {column.strip().lower(): column for column in header}
    return next((alike[key] for key in difflib.get_close_matches(name.strip().lower(), alike, 1, cutoff=0.75)), None)


def describe_missing(path, header, missing):
    """One line about the columns that the file lacks. missing: {role: column name}."""
    near = {role: find_near(name, header) for role, name in missing.items()}
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


def locate_columns(path, header, columns, need_highlights):
    """{role: index in the header}; no "id" where rows are numbered, no "highlights" where not needed and not there.

    Raises DataError for a column that is missing.
    """
    wanted = {role: name for role, name in complete_columns(columns).items() if name is not None}
    optional = () if need_highlights else ("highlights",)  # by its default name alone: a mapped one was meant
    missing = {
        role: name
        for role, name in wanted.items()
        if name not in header and not (role in optional and name == DEFAULT_COLUMNS[role])
    }
    if missing:
        raise DataError(describe_missing(path, header, missing))
    return {role: header.index(name) for role, name in wanted.items() if name in header}


def make_row(number, line, cells, header, indices, required):
    """The Article, or a BadRow for a wrong number of fields or a required cell that is empty or white space."""
    cells = [LINE_END.sub("\n", cell) if "\r" in cell else cell for cell in cells]
    values = {role: cells[index] if index < len(cells) else "" for role, index in indices.items()}
    row_id = values.get("id", str(number))
    if len(cells) != len(header):
        return BadRow(number, line, row_id[:LONGEST_ID], f"{len(cells)} fields where the header has {len(header)}")
    limits = {"id": LONGEST_ID, "highlights": LONGEST_HIGHLIGHTS}
    long = [f"{role} of {len(values[role]):,} characters (at most {most:,})" for role, most in limits.items()
            if len(values.get(role, "")) > most]
    if long:
        return BadRow(number, line, row_id[:LONGEST_ID], " and ".join(long))
    empty = [role for role in required if role in values and not values[role].strip()]
    if empty:
        return BadRow(number, line, row_id, "empty " + " and ".join(empty))
    used = set(indices.values())
    extra = {name: cell for index, (name, cell) in enumerate(zip(header, cells, strict=True)) if index not in used}
    return Article(number, line, row_id, values["article"], values.get("highlights", ""), extra)


def iterate_articles(
    path: str | PathLike, columns: dict[str, str | None] | None = None, need_highlights: bool = True
) -> Iterator[Article | BadRow]:
    """The file's rows in order, read as they are asked for; of earlier rows only the ids are kept.

    columns: {"id", "article" or "highlights": the file's name for it}, the rest as in DEFAULT_COLUMNS; with "id" None
    the ids are the row numbers. need_highlights False: highlights may be empty or their column missing (then "").
    Bad rows: a wrong number of fields (`,,` is a row, a blank line is none), an empty id, article or needed
    highlights, an id or highlights too long, and an id that an earlier good row has.
    Raises DataError, when iterated, where the file as a whole cannot be trusted: missing, empty, no rows, no such
    column, two columns of one name, wrong quoting, NUL bytes, or bytes that are not UTF-8.
    """
    complete_columns(columns)  # before the file: a wrong setting is wrong for any file
    required = ("id", "article", "highlights") if need_highlights else ("id", "article")
    first_rows = {}  # id: row number
    with open_csv(path) as file:
        records = read_records(path, file)
        header_record = next(records, None)
        if header_record is None:
            raise DataError(f"{path}: the file is empty: expected a header with {', '.join(DEFAULT_COLUMNS)}")
        _, line, header = header_record
        check_header(path, line, header)
        indices = locate_columns(path, header, columns, need_highlights)
        number = 0
        for number, line, cells in records:
            check_text(path, number, line, cells, header)
            row = make_row(number, line, cells, header, indices, required)
            if isinstance(row, Article):
                first = first_rows.setdefault(row.id, number)
                if first != number:
                    row = BadRow(number, line, row.id, f"the id is that of row {first}")
            yield row
        if number == 0:
            raise DataError(f"{path}: a header but no rows: add rows to it")


def describe_bad_rows(path: str | PathLike, bad_rows: list[BadRow], total: int) -> str:
    """One line: how many of the file's `total` rows are bad, and the first three of them."""
    shown = [f"row {row.number} (line {row.line}, id {shorten(row.id)}): {row.reason}" for row in bad_rows[:3]]
    more = [f"and {len(bad_rows) - 3} more"] if len(bad_rows) > 3 else []
    verb = "is" if len(bad_rows) == 1 else "are"
    return f"{path}: {len(bad_rows)} of {total} rows {verb} bad: {'; '.join(shown + more)}"


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
    if on_bad_row not in ("error", "skip"):
        raise DataError(f'on_bad_row is {on_bad_row!r}: use "error" or "skip"')
    articles, bad_rows = [], []
    for row in iterate_articles(path, columns, need_highlights):
        (articles if isinstance(row, Article) else bad_rows).append(row)
    if bad_rows and (on_bad_row == "error" or not articles):
        remedy = 'correct them, or go on without them with on_bad_row "skip" (in dataset_kwargs, or --on_bad_row skip)'
        if not articles:
            remedy = "no usable row is left: correct them"
        raise DataError(f"{describe_bad_rows(path, bad_rows, len(articles) + len(bad_rows))}: {remedy}")
    return articles, bad_rows
