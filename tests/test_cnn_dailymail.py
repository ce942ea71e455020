import os
from collections import Counter
from fractions import Fraction

import datasets
import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import scratch
from data.articles import read_articles
from data.cnn_dailymail import length_bucket, main, stratified_subset

BUCKETS = st.lists(st.sampled_from(["0-99", "100-199", "200-299", "300-399"]), max_size=80)
FRACTIONS = st.floats(min_value=0, max_value=1, exclude_min=True)


def make_rows(count, split="train"):
    """Rows whose article lengths run through 3, 40, 77, … words."""
    words = [3 + 37 * number % 450 for number in range(count)]
    return [
        {"id": f"{split}-{number}", "article": " ".join(["word"] * length), "highlights": f"one, {number}\ntwo"}
        for number, length in enumerate(words)
    ]


@pytest.fixture
def hub(monkeypatch):
    """A hub with small splits; returns the list of the calls it got."""
    calls = []
    sizes = {"train": 100, "validation": 25, "test": 15}
    tables = {split: datasets.Dataset.from_list(make_rows(size, split)) for split, size in sizes.items()}

    def load_dataset(*arguments):
        calls.append(arguments)
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def write_csv(path, rows):
    path.parent.mkdir(exist_ok=True)
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def read_csv(path):
    return pandas.read_csv(path, dtype=str, keep_default_na=False)


def run(*arguments):
    """The exit code; usage errors that argparse finds included."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def error_of(capsys, *arguments, code):
    assert run(*arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    return output.err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "width", "bucket"),
    [(0, 100, "0-99"), (99, 100, "0-99"), (100, 100, "100-199"), (399, 100, "300-399"), (7, 1, "7-7"), (8, 3, "6-8")],
)
def test_bucket_borders(words, width, bucket):
    """Articles on a border in two buckets or in none."""
    assert length_bucket(words, width) == bucket


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_every_length_is_in_its_bucket_and_no_other(words, width):
    """Gaps or overlaps between buckets."""
    low, high = map(int, length_bucket(words, width).split("-"))
    assert low <= words <= high
    assert high - low + 1 == width
    assert {length_bucket(low, width), length_bucket(high, width)} == {f"{low}-{high}"}
    assert length_bucket(high + 1, width).startswith(f"{high + 1}-")


@pytest.mark.parametrize(("words", "width"), [(-1, 100), (5, 0), (5, -100)])
def test_impossible_buckets_are_refused(words, width):
    """A negative length or width given a name that means nothing."""
    with pytest.raises(ValueError, match=f"not {words} and {width}"):
        length_bucket(words, width)


@settings(deadline=None)
@given(BUCKETS, FRACTIONS, st.integers(0, 10))
@example(["0-99"] * 5, 0.5, 1)
def test_subset_has_the_exact_size_and_shares(buckets, fraction, seed):
    """A total off by rounding in each bucket, a row twice, another order, or a bucket a row off its share."""
    chosen = stratified_subset(buckets, fraction, seed)
    total = round(fraction * len(buckets))
    assert len(chosen) == total
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(buckets)))
    sizes, got = Counter(buckets), Counter(buckets[index] for index in chosen)
    remainders = {bucket: Fraction(total * size, len(buckets)) % 1 for bucket, size in sizes.items()}
    rounded_up = {bucket for bucket in sizes if got[bucket] > Fraction(total * sizes[bucket], len(buckets))}
    for bucket, size in sizes.items():
        assert abs(got[bucket] - Fraction(total * size, len(buckets))) < 1
        assert all(remainders[up] >= remainders[bucket] for up in rounded_up if bucket not in rounded_up)
    assert stratified_subset(buckets, fraction, seed) == chosen


@settings(deadline=None)
@given(BUCKETS, FRACTIONS, FRACTIONS)
def test_smaller_subset_lies_inside_the_bigger_one(buckets, one, other):
    """Subsets of two sizes that share rows by chance only, so that results on them cannot be compared."""
    small, big = (set(stratified_subset(buckets, fraction, 7)) for fraction in sorted((one, other)))
    for bucket in set(buckets):
        of_small, of_big = ({index for index in rows if buckets[index] == bucket} for rows in (small, big))
        assert of_small <= of_big or (of_big < of_small and len(of_small) == len(of_big) + 1)


def test_largest_remainder_by_hand():
    """Leftover rows given to the first or biggest buckets: of 10 rows by half, 3.5, 1 and 0.5 become 4, 1 and 0."""
    buckets = ["a"] * 7 + ["b"] * 2 + ["c"]
    chosen = stratified_subset(buckets, 0.5, 3)
    assert Counter(buckets[index] for index in chosen) == {"a": 4, "b": 1}


def test_seed_changes_the_subset():
    """The first rows of each bucket taken, whatever the seed."""
    subsets = {tuple(stratified_subset(["0-99"] * 100, 0.1, seed)) for seed in range(5)}
    assert len(subsets) == 5


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_impossible_fractions_are_refused(fraction, tmp_path, capsys):
    """A fraction that gives no rows or more rows than there are."""
    with pytest.raises(ValueError, match="fraction must be above 0"):
        stratified_subset(["0-99"], fraction, 1)
    assert "--fraction must be above 0" in error_of(capsys, "--output_dir", tmp_path, "--fraction", fraction, code=2)


def test_hub_tables_and_subsets(hub, tmp_path):
    """Another data set or version loaded, splits mixed, lengths miscounted, or subsets out of order."""
    assert run("--output_dir", tmp_path / "out", "--fraction", 0.2, "--bucket_width", 50) == 0
    assert hub == [("abisee/cnn_dailymail", "3.0.0")]
    tables = {"train": (100, 20), "validation": (25, 5), "test": (15, 3)}
    names = {f"{split}{end}.csv" for split in tables for end in ("", "_subset")}
    assert set(contents(tmp_path / "out")) == names | {"cnn_dailymail.json"}
    for split, (rows, subset_rows) in tables.items():
        full, subset = (read_csv(tmp_path / "out" / f"{split}{end}.csv") for end in ("", "_subset"))
        assert list(full) == ["id", "article", "highlights", "article_length", "length_bucket"]
        assert full[["id", "article", "highlights"]].to_dict("records") == make_rows(rows, split)
        words = full.article.map(lambda text: text.count(" ") + 1)
        assert full.article_length.astype(int).tolist() == words.tolist()
        first = words // 50 * 50
        assert full.length_bucket.tolist() == [f"{low}-{low + 49}" for low in first]
        assert len(subset) == subset_rows
        assert full[full.id.isin(subset.id)].reset_index(drop=True).equals(subset)


def test_output_can_be_read_by_read_articles(monkeypatch, tmp_path):
    """Carriage returns, quotes or commas of the hub's texts written so that the row breaks."""
    row = {"id": "1", "article": 'a\rb\r\n"c", d', "highlights": "x\ry"}
    tables = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list([row])))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: tables)
    assert run("--output_dir", tmp_path, "--fraction", 1) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.csv", "validation.csv", "test.csv", "cnn_dailymail.json"
    }  # fmt: skip
    (article,), _ = read_articles(tmp_path / "test.csv")
    assert (article.article, article.highlights) == ('a\nb\n"c", d', "x\ny")
    assert article.extra == {"article_length": "4", "length_bucket": "0-99"}


@pytest.mark.parametrize("failure", [ConnectionError("cannot reach it\nmore"), KeyError(""), RuntimeError()])
def test_unreachable_hub_is_one_line(monkeypatch, tmp_path, capsys, failure):
    """A traceback, an empty output folder, or no word of what works without the hub."""

    def load_dataset(*_):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of(capsys, "--output_dir", tmp_path / "out", code=1)
    for part in ("abisee/cnn_dailymail 3.0.0", "from the hub", "--from_csv", "./demo.sh"):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_complete_result_is_reused_until_something_changes(hub, tmp_path, capsys):
    """A download repeated for nothing, or an old result taken for the one of new settings."""
    arguments = ["--output_dir", tmp_path / "out"]
    assert run(*arguments) == 0
    first = contents(tmp_path / "out")
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "reused" in capsys.readouterr().out
    assert len(hub) == 1
    assert run(*arguments, "--overwrite") == 0
    assert contents(tmp_path / "out") == first
    assert len(hub) == 2
    assert run(*arguments, "--seed", 5) == 0
    assert contents(tmp_path / "out")["train_subset.csv"] != first["train_subset.csv"]
    assert run(*arguments, "--fraction", 1) == 0
    assert not list((tmp_path / "out").glob("*_subset.csv"))
    (tmp_path / "out" / "test.csv").unlink()
    assert run(*arguments, "--fraction", 1) == 0
    assert contents(tmp_path / "out")["test.csv"] == first["test.csv"]


@pytest.mark.parametrize("name", ["train.csv", "cnn_dailymail.json"])
@pytest.mark.parametrize("made_before", [False, True])
def test_foreign_or_edited_file_is_kept(hub, tmp_path, capsys, name, made_before):
    """A user's own file, or a table that the user corrected, overwritten without being asked to."""
    out = tmp_path / "out"
    out.mkdir()
    if made_before:
        assert run("--output_dir", out) == 0
        capsys.readouterr()
    (out / name).write_text("mine")
    assert "was not written by this command or was changed since" in error_of(capsys, "--output_dir", out, code=2)
    assert (out / name).read_text() == "mine"
    assert run("--output_dir", out, "--overwrite") == 0
    assert (out / name).read_text() != "mine"


def test_local_files_keep_their_other_columns(tmp_path):
    """Columns lost, old lengths kept, or the hub asked for local files."""
    rows = [{**row, "length_bucket": "old", "category": f"c{i % 3}"} for i, row in enumerate(make_rows(30))]
    files = [write_csv(tmp_path / "in" / "news.csv", rows), write_csv(tmp_path / "in" / "b.csv", make_rows(10))]
    assert run("--from_csv", *files, "--output_dir", tmp_path / "out") == 0
    assert set(contents(tmp_path / "out")) == {
        "news.csv", "news_subset.csv", "b.csv", "b_subset.csv", "cnn_dailymail.json"
    }  # fmt: skip
    full, subset = read_csv(tmp_path / "out" / "news.csv"), read_csv(tmp_path / "out" / "news_subset.csv")
    assert list(full) == ["id", "article", "highlights", "article_length", "length_bucket", "category"]
    assert full.category.tolist() == [row["category"] for row in rows]
    assert full.length_bucket[:4].tolist() == ["0-99", "0-99", "0-99", "100-199"]  # 3, 40, 77, 114 words
    assert len(subset) == 3


def test_changed_input_is_read_again(tmp_path, capsys):
    """The old result reused although the input file has changed under its name."""
    path = write_csv(tmp_path / "in" / "news.csv", make_rows(20))
    arguments = ["--from_csv", path, "--output_dir", tmp_path / "out"]
    assert run(*arguments) == 0
    write_csv(path, make_rows(40))
    assert run(*arguments) == 0
    assert "reused" not in capsys.readouterr().out
    assert len(read_csv(tmp_path / "out" / "news.csv")) == 40


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_input_is_never_overwritten(tmp_path, capsys, link):
    """An input file lost to its own result, even by way of a link and with --overwrite."""
    path = write_csv(tmp_path / "news.csv", make_rows(20))
    before = path.read_bytes()
    if link:
        (tmp_path / "out").mkdir()
        link(path, tmp_path / "out" / "news.csv")
    out = tmp_path / "out" if link else tmp_path
    error = error_of(capsys, "--from_csv", path, "--output_dir", out, "--overwrite", code=2)
    assert "choose another --output_dir" in error
    assert path.read_bytes() == before


def test_failure_keeps_the_old_result_whole(tmp_path, capsys):
    """Some of the tables replaced, or temporary files left, when a later input is bad."""
    files = [write_csv(tmp_path / "in" / name, make_rows(20)) for name in ("a.csv", "b.csv")]
    arguments = ["--from_csv", *files, "--output_dir", tmp_path / "out"]
    assert run(*arguments) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    write_csv(files[0], make_rows(30))
    write_csv(files[1], [*make_rows(20), {"id": "x", "article": " ", "highlights": "h"}])
    assert "1 of 21 rows is bad: row 21" in error_of(capsys, *arguments, code=1)
    assert contents(tmp_path / "out") == before
    assert run(*arguments, "--on_bad_row", "skip") == 0
    assert "skipped: " in capsys.readouterr().err
    assert [len(read_csv(tmp_path / "out" / name)) for name in ("a.csv", "b.csv")] == [30, 20]


def test_failures_of_local_files_are_one_line(tmp_path, capsys):
    """Tracebacks, wrong exit codes, or two inputs of one name of which the second wins."""
    news = write_csv(tmp_path / "in" / "news.csv", make_rows(4))
    out = ["--output_dir", tmp_path / "out"]
    assert "none.csv: cannot be read" in error_of(capsys, "--from_csv", tmp_path / "none.csv", *out, code=1)
    assert "is no row: raise it" in error_of(capsys, "--from_csv", news, *out, code=1)
    twin = write_csv(tmp_path / "other" / "News.csv", make_rows(4))
    assert "two of the tables" in error_of(capsys, "--from_csv", news, twin, *out, code=2)
    subset = write_csv(tmp_path / "in" / "news_subset.csv", make_rows(4))
    assert "two of the tables" in error_of(capsys, "--from_csv", news, subset, *out, code=2)
    assert "is not a folder" in error_of(capsys, "--from_csv", news, "--output_dir", news, code=2)
    assert "--bucket_width must be 1" in error_of(capsys, *out, "--bucket_width", 0, code=2)
    assert "unrecognized" in error_of(capsys, *out, "--fractoin", 1, code=2)


def test_help_names_the_subset_files(capsys):
    """Nothing that says under which names the subsets are written."""
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "train_subset.csv, validation_subset.csv and test_subset.csv" in text


def test_lengthy_articles_pass(tmp_path):
    """An article above csv's limit of 131,072 characters that can be written but not read back."""
    row = {"id": "1", "article": "word " * 30_000, "highlights": "h"}
    path = write_csv(tmp_path / "in" / "long.csv", [row])
    assert run("--from_csv", path, "--output_dir", tmp_path / "out", "--fraction", 1) == 0
    (article,), _ = read_articles(tmp_path / "out" / "long.csv")
    assert article.extra == {"article_length": "30000", "length_bucket": "30000-30099"}


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("number", range(1, 5))
def test_killed_between_two_tables(tmp_path, monkeypatch, number):
    """Fault: killed while the tables take their places, the same command refuses its own files or mixes two results."""
    table, folder = write_csv(tmp_path / "in" / "news.csv", make_rows(20)), tmp_path / "out"
    command = ("--from_csv", table, "--output_dir", folder)
    assert run(*command, "--fraction", "0.2") == 0
    calls, real = [], os.replace

    def replace(source, target):
        calls.append(source)
        if len(calls) >= number:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if number == 4:  # all files are in their places
            patch.setattr(scratch.shutil, "rmtree", lambda *_, **__: replace(None, None))
        with pytest.raises(Killed):
            run(*command, "--fraction", "0.5")
    assert run(*command, "--fraction", "0.5") == 0
    found = contents(folder)
    assert run("--from_csv", table, "--output_dir", tmp_path / "clean", "--fraction", "0.5") == 0
    assert found == contents(tmp_path / "clean")
