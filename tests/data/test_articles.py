import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.articles import Article, BadRow, DataError, iterate_articles, read_articles

AWKWARD = Path(__file__).resolve().parents[3] / "shared" / "data" / "awkward"
HEADER = b"id,article,highlights\n"


@pytest.fixture
def write(tmp_path):
    """Writes bytes as news.csv and returns its path."""

    def write_bytes(content):
        path = tmp_path / "news.csv"
        path.write_bytes(content)
        return path

    return write_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


def error_of(path, **arguments):
    """The one-line message of the DataError that reading raises, without the path."""
    with pytest.raises(DataError) as caught:
        read_articles(path, **arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message.replace(str(path), "FILE")


def texts(path, **arguments):
    articles, bad_rows = read_articles(path, **arguments)
    assert not bad_rows
    return [(row.id, row.article, row.highlights) for row in articles]


CASE_BYTES = (
    b"\xef\xbb\xbf"
    + b'id,article,highlights\n1,"He said ""no"", then left.\nA second line.",NA\n2,None,"null"\n3,"","Empty article"\n'
    b'4,caf\xc3\xa9 opens,"Line one\nLine two"\n5,"   ",blank\n6,n/a,nan\n'.replace(b"\n", b"\r\n")
)


def test_case_file_is_read_as_text(write):
    """BOM in the first column's name, NA/None/null/nan turned into missing values, CRLF left in cells; rows without an
    article trained on, or dropped without a word (A23)."""
    articles, bad_rows = read_articles(write(CASE_BYTES), on_bad_row="skip")
    assert [(row.id, row.article, row.highlights) for row in articles] == [
        ("1", 'He said "no", then left.\nA second line.', "NA"),
        ("2", "None", "null"),
        ("4", "café opens", "Line one\nLine two"),
        ("6", "n/a", "nan"),
    ]
    assert len(articles[0].article) == 39
    assert [(row.number, row.line) for row in articles] == [(1, 2), (2, 4), (4, 6), (6, 9)]
    assert bad_rows == [BadRow(3, 5, "3", "empty article"), BadRow(5, 8, "5", "empty article")]
    message = error_of(write(CASE_BYTES))
    first, second = "row 3 (line 5, id '3'): empty article", "row 5 (line 8, id '5'): empty article"
    assert message.startswith(f"FILE: 2 of 6 rows are bad: {first}; {second}: correct them")
    assert 'on_bad_row "skip"' in message


def test_numbers_and_long_fields_stay_text(write):
    """Ids and articles that look like numbers guessed to be numbers: 1, 12345.0, 3.5; articles above csv's 131,072
    characters refused (A23)."""
    csv.field_size_limit(131_072)  # whatever an earlier test left
    long = "x" * 131_073
    content = HEADER + f"001,12345,678\n002,3.50,true\n003,{long},h\n".encode()
    assert texts(write(content)) == [("001", "12345", "678"), ("002", "3.50", "true"), ("003", long, "h")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_read_alike(write, end):
    """One kind of line end read as one long row, kept inside cells, or counted wrongly; blank lines taken as rows."""
    content = 'id,article,highlights\n\n a , two\twords ,"one\n\ntwo"\n\n\nb,x,y\n\n'.replace("\n", end)
    articles, _ = read_articles(write(content.encode()))
    assert articles == [
        Article(1, 3, " a ", " two\twords ", "one\n\ntwo", {}),
        Article(2, 8, "b", "x", "y", {}),
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0\r"))] * 2), min_size=1))
def test_what_pandas_writes_is_read_back(folder, cells):
    """Any text that pandas can write changed, refused or shifted by strict quoting."""
    frame = "." + pandas.DataFrame(cells, columns=["article", "highlights"])  # so that no cell is empty
    frame.to_csv(folder / "news.csv", index_label="id", lineterminator="\r\n")
    assert [row[1:] for row in texts(folder / "news.csv")] == [tuple(row) for row in frame.itertuples(index=False)]


ROWS = [{"id": "001", "article": "He said \"no\",\tthen left.\nA line.", "highlights": "NA", "year": "2019"},
        {"id": "2", "article": "café ,opens", "highlights": "null", "year": "3.50"}]


def as_csv(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


@pytest.mark.parametrize("name", [
    "a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.jsonl", "a.ndjson.gz", "a.parquet", "news.v2.csv"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    """Fault: a JSONL, Parquet or compressed table is refused, or its numbers and "NA" become something else."""
    path = tmp_path / name
    if ".parquet" in name:
        pandas.DataFrame(ROWS).to_parquet(path)
    else:
        content = (as_csv(ROWS, "\t" if ".tsv" in name else ",") if "json" not in name
                   else b"\n".join(json.dumps(row).encode() for row in ROWS))
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    articles, bad_rows = read_articles(path)
    assert not bad_rows
    assert [[row.id, row.article, row.highlights, row.extra] for row in articles] == [
        [row["id"], row["article"], row["highlights"], {"year": row["year"]}] for row in ROWS]
    renamed, _ = read_articles(path, {"id": None, "highlights": "year"})
    assert [(row.id, row.highlights) for row in renamed] == [("1", "2019"), ("2", "3.50")]


def test_values_of_other_types_become_text(tmp_path):
    """Fault: a number, a list or a missing value of JSONL or Parquet is lost, or 7 becomes 7.0."""
    rows = [{"id": 7, "article": "a", "highlights": ["x", 1.5]}, {"id": 8, "article": None, "highlights": "h"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = pandas.DataFrame({"id": [7, 8], "article": ["a", None], "highlights": ["g", "h"]})
    frame.to_parquet(tmp_path / "a.parquet")
    for name, highlights in (("a.jsonl", '["x", 1.5]'), ("a.parquet", "g")):
        articles, bad_rows = read_articles(tmp_path / name, on_bad_row="skip")
        assert [(row.id, row.highlights) for row in articles] == [("7", highlights)]
        assert bad_rows == [BadRow(2, 2, "8", "empty article")]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", b'{"article": "a"}\n', "no column 'id', 'highlights' (columns found: 'article')"),
    ("a.jsonl", b'{"id": 1,\n', "row 1 (line 1): is not JSON (Expecting property name"),
    ("a.jsonl", b'\n[1, 2]\n', "row 1 (line 2): is not a JSON object"),
    ("a.jsonl", b'{"id": 1, "article": "\xe9"}\n', "row 1 (line 1): holds the byte 0xE9"),
    ("a.jsonl", b'{"id": 1, "article": "half of an emoji \\ud83d"}\n', "row 1 (line 1): holds the byte 0x3D"),
    ("a.jsonl", b"", "the file is empty"),
    ("a.parquet", b"PAR1 not really", "is not a readable Parquet file"),
    ("a.csv.gz", HEADER, "cannot be read"),
    ("a.csv.gz", gzip.compress(HEADER + b"1,a,h\n" * 50)[:40], "cannot be read"),
    ("a.csv.gz", gzip.compress(HEADER)[:10] + b"\xff" * 40, "cannot be read"),
], ids=map(str, range(10)))
def test_damaged_tables_are_one_line(tmp_path, name, content, words):
    """Fault: a traceback of a library in place of file, row and reason."""
    (tmp_path / name).write_bytes(content)
    assert words in error_of(tmp_path / name)


def test_memory_is_flat_in_the_size_of_the_file(write):
    """A file held in memory while its rows are iterated."""
    path = write(HEADER + b"".join(b"%d,%s,h\n" % (number, b"word " * 4000) for number in range(400)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in iterate_articles(path)) == 400
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size / 7


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(("content", "place"), [
    (HEADER + b"1,a,h\n2,caf\xe9,h\n", "row 2 (line 3): holds the byte 0xE9, which is not UTF-8"),
    (HEADER + b"1,a,h,\x80\n", "row 1 (line 2): holds the byte 0x80"),
    (HEADER + b"1,\xed\xa0\x80,h\n", "row 1 (line 2): holds the byte 0xED"),
    (HEADER + b"1,a\0b,h\n", "row 1 (line 2): holds a NUL byte"),
    ("id,article,highlights\n1,a,h\n".encode("utf-16"), "header (line 1): holds the byte 0xFF"),
])
def test_bytes_that_are_not_utf_8_refuse_the_file(write, content, place, on_bad_row):
    """cp1252, lone surrogates, NULs or UTF-16 read as replacement characters, or a traceback without the row (A23)."""
    message = error_of(write(content), on_bad_row=on_bad_row)
    assert message.startswith(f"FILE: {place}")
    assert "save as UTF-8" in message


@pytest.mark.parametrize(("rows", "place"), [
    (b'1,a,h\n2,"never closed,h\n3,a,h\n', "row 2 (line 3)"),
    (b'1,"a\nb","h\nend', "row 1 (line 2)"),
    (b'1,"a ""quote"" b",h\n2,x,"', "row 2 (line 3)"),
    (b'1,"abc"def,h\n', "row 1 (line 2)"),
    (b'1,"lost,h\n2,"b",h\n', "row 1 (line 2)"),
    (b'1,"said \\"no\\"",h\n', "row 1 (line 2)"),
    (b'1,a,h\n\n"2\n\n",x,"y"z\n', "row 2 (line 4)"),
])
def test_wrong_quoting_is_an_error_with_its_row(write, rows, place):
    """A lost quote that swallows the rows after it, or `"abc"def` glued together in silence (A23)."""
    for end in (b"\n", b"\r\n"):
        message = error_of(write((HEADER + rows).replace(b"\n", end)), on_bad_row="skip")
        assert message.startswith(f"FILE: {place}: a quote in it is wrong") and "close the cell" in message


@pytest.mark.parametrize(("content", "options", "words"), [
    (b"", {}, "the file is empty"),
    (b"\xef\xbb\xbf\r\n\r\n", {}, "the file is empty"),
    (HEADER, {}, "a header but no rows"),
    (b"id,article,article,highlights\n1,a,b,h\n", {}, "more than one column is named 'article'"),
    (b"id;article;highlights\n1;a;h\n", {}, "separate the columns with commas"),
    (HEADER + b",,\n,,\n", {}, "2 of 2 rows are bad"),
    (HEADER + b"1,a,h\n", {"columns": {"article": None}}, "only id may be null"),
    (HEADER + b"1,a,h\n", {"columns": {"highlights": "article"}}, "different columns"),
])
def test_files_without_usable_rows_are_refused_in_skip_mode(write, content, options, words):
    """A run that starts on nothing, on a column that another of the same name hides, on no article, or on the article
    as its own summary."""
    assert words in error_of(write(content), on_bad_row="skip", **options)


@pytest.mark.parametrize(("header", "parts"), [
    ("id,text,highlights", ["no column 'article'", "columns found: 'id', 'text', 'highlights'", '{"article": "']),
    ("ID,Article ,highlights", ['{"id": "ID", "article": "Article "}']),
    ("article,highlight", ['{"id": null, "highlights": "highlight"}']),
])
def test_missing_column_lists_columns_and_remedy(write, header, parts):
    """A KeyError instead of the columns found and the mapping to write (A23)."""
    message = error_of(write(f"{header}\n{',x' * header.count(',')}\n".encode()))
    for part in [*parts, "dataset_kwargs.columns", "--columns", "validate_model.py"]:
        assert part in message


def test_mapping_may_be_partial_and_number_the_rows(write):
    """A partial mapping that loses the default names, or row numbers that skip bad rows; other columns lost."""
    path = write(b"text,highlights,article,id\nT1,h,old,7\n,h,old,7\nT3,h,old,7\n")
    articles, bad_rows = read_articles(path, {"article": "text", "id": None}, on_bad_row="skip")
    extra = {"article": "old", "id": "7"}
    assert articles == [Article(1, 2, "1", "T1", "h", extra), Article(3, 4, "3", "T3", "h", extra)]
    assert bad_rows == [BadRow(2, 3, "2", "empty article")]


@pytest.mark.parametrize(("row", "bad_id", "reason"), [
    (b",,", "", "empty id and article and highlights"),
    (b"2,a", "2", "2 fields where the header has 3"),
    (b"2,a,h,", "2", "4 fields where the header has 3"),
    (b"   ", "   ", "1 fields where the header has 3"),
    (b"2, \xc2\xa0,h", "2", "empty article"),
    (b'2,a,"\n"', "2", "empty highlights"),
    (b" ,a,h", " ", "empty id"),
    (b"1,other,h", "1", "the id is that of row 1"),
])
def test_bad_rows_have_reasons(write, row, bad_id, reason):
    """A damaged row passed on as data, or one that shifts the numbers of those after it."""
    articles, bad_rows = read_articles(write(HEADER + b"1,a,h\n" + row + b"\n3,a,h\n"), on_bad_row="skip")
    assert [article.number for article in articles] == [1, 3]
    assert bad_rows == [BadRow(2, 3, bad_id, reason)]


AWKWARD_COLUMNS = {
    "04_bom_book_chapters.csv": {"id": "title", "article": "full_chapter", "highlights": "human_summary"},
    "06_nepali_no_id.csv": {"id": None, "highlights": "summary"},
    "08_xsum_extra_columns_int_ids.csv": {},
}


@pytest.mark.skipif(not AWKWARD.is_dir(), reason="needs the real files of shared/data/awkward")
@pytest.mark.parametrize("name", AWKWARD_COLUMNS)
def test_real_awkward_files_are_read_as_pandas_reads_them(name):
    """A well-formed real file refused by strict quoting, or its cells changed."""
    columns = AWKWARD_COLUMNS[name]
    frame = pandas.read_csv(AWKWARD / name, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    named = {"id": "id", "article": "article", "highlights": "highlights", **columns}
    used = [named[role] for role in ("article", "highlights")]
    articles, bad_rows = read_articles(AWKWARD / name, columns)
    assert not bad_rows
    assert [[row.article, row.highlights] for row in articles] == frame[used].values.tolist()
    assert all({*row.extra} == {*frame} - {*named.values()} for row in articles)


@pytest.mark.skipif(not AWKWARD.is_dir(), reason="needs the real files of shared/data/awkward")
def test_real_broken_files_are_refused_with_a_remedy():
    """Real files of cp1252 bytes, of empty rows or without the columns: read as something else, or a traceback."""
    cp1252 = AWKWARD / "01_inshorts_cp1252_crlf.csv"
    assert "columns found: 'author', 'date', 'headlines', 'read_more', 'text', 'ctext'" in error_of(cp1252)
    message = error_of(cp1252, columns={"id": None, "article": "ctext", "highlights": "text"}, on_bad_row="skip")
    line = next(n for n, text in enumerate(cp1252.read_bytes().split(b"\n"), 1) if not text.isascii())
    assert f"(line {line}): holds the byte 0xE2" in message
    assert '{"id": null, "highlights": ' in error_of(AWKWARD / "10_article_column_only.csv")
    mostly_empty = AWKWARD / "03_mostly_empty_rows.csv"
    assert "35 of 45 rows are bad" in error_of(mostly_empty)
    frame = pandas.read_csv(mostly_empty, dtype=str, keep_default_na=False)
    articles, bad_rows = read_articles(mostly_empty, on_bad_row="skip")
    assert len(articles) == (frame.map(str.strip) != "").all(axis=1).sum() == 10
    assert [row.number for row in bad_rows[:3]] == [2, 3, 4]
