"""CNN/DailyMail's tables and those of local files: data/cnn_dailymail.py."""

import datasets
import pandas
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.articles import read_articles
from data.cnn_dailymail import main, stratified_subset


def make_rows(count, split="train"):
    """Rows whose article lengths run through 3, 40, 77, … words, and the borders 99, 100 and 399."""
    words = ([3 + 37 * number % 450 for number in range(count - 3)] + [99, 100, 399])[-count:]
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
    """The last line that a failing run prints."""
    assert run(*arguments) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m data.cnn_dailymail: error: ")
    return line


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["0-99", "100-199", "200-299", "300-399"]), min_size=1, max_size=80),
       st.floats(min_value=0.01, max_value=1), st.integers(0, 10))
@example(["0-99", "100-199"] * 5, 0.1, 1)
def test_subset_is_stratified_and_seeded(buckets, fraction, seed):
    """Fault: another size, a bucket over-represented, rows twice or in another order, or other rows each time."""
    frame = pandas.DataFrame({"length_bucket": buckets})
    subset = stratified_subset(frame, fraction, seed)
    total = max(1, round(fraction * len(buckets)))
    assert len(subset) == total
    assert subset.index.is_monotonic_increasing and subset.index.is_unique
    counts = subset["length_bucket"].value_counts()
    for bucket in set(buckets):
        assert abs(counts.get(bucket, 0) - total * buckets.count(bucket) / len(buckets)) <= 1
    assert subset.equals(stratified_subset(frame, fraction, seed))


def test_hub_tables_and_subsets(hub, tmp_path):
    """Fault: another data set or version loaded, splits mixed, lengths miscounted, or subsets of other rows."""
    assert run("--output_dir", tmp_path / "out", "--fraction", 0.2) == 0
    assert hub == [("abisee/cnn_dailymail", "3.0.0")]
    sizes = {"train": 100, "validation": 25, "test": 15}
    assert set(contents(tmp_path / "out")) == {f"{split}{end}.csv" for split in sizes for end in ("", "_subset")}
    for split, rows in sizes.items():
        full, subset = (read_csv(tmp_path / "out" / f"{split}{end}.csv") for end in ("", "_subset"))
        assert list(full) == ["id", "article", "highlights", "article_length", "length_bucket"]
        assert full[["id", "article", "highlights"]].to_dict("records") == make_rows(rows, split)
        words = full.article.map(lambda text: text.count(" ") + 1)
        assert full.article_length.astype(int).tolist() == words.tolist()
        assert full.length_bucket.tolist() == [f"{low}-{low + 99}" for low in words // 100 * 100]
        assert len(subset) == rows / 5
        assert full[full.id.isin(subset.id)].reset_index(drop=True).equals(subset)


def test_output_can_be_read_by_read_articles(monkeypatch, tmp_path):
    """Fault: carriage returns, quotes or commas of the hub's texts break a row, or a long article cannot be read."""
    row = {"id": "1", "article": 'a\rb\r\n"c", d' + " word" * 30_000, "highlights": "x\ry"}
    tables = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list([row])))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: tables)
    assert run("--output_dir", tmp_path, "--fraction", 1) == 0
    assert set(contents(tmp_path)) == {"train.csv", "validation.csv", "test.csv"}
    (article,), _ = read_articles(tmp_path / "test.csv")
    assert (article.article[:10], article.highlights) == ('a\nb\n"c", d', "x\ny")
    assert article.extra == {"article_length": "30004", "length_bucket": "30000-30099"}


@pytest.mark.parametrize("failure", [ConnectionError("cannot reach it\nmore"), KeyError(""), RuntimeError()])
def test_unreachable_hub_is_one_line(monkeypatch, tmp_path, capsys, failure):
    """Fault: a traceback, an empty output folder, or no word of what works without the hub."""

    def load_dataset(*_):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of(capsys, "--output_dir", tmp_path / "out", code=2)
    for part in ("abisee/cnn_dailymail 3.0.0", "from the hub", "--from_csv", "./demo.sh"):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_existing_tables_and_input_are_kept(hub, tmp_path, capsys):
    """Fault: a table that the user corrected is overwritten, or downloaded again before it is refused; an input file
    is lost to its own result, even with --overwrite."""
    out = tmp_path / "out"
    path = write_csv(out / "test.csv", make_rows(20))
    before = contents(out)
    assert "test.csv exists: choose another --output_dir" in error_of(capsys, "--output_dir", out, code=2)
    error = error_of(capsys, "--from_csv", path, "--output_dir", out, "--overwrite", code=2)
    assert "choose another --output_dir" in error
    assert contents(out) == before and hub == []
    assert run("--output_dir", out, "--overwrite") == 0
    assert len(read_csv(path)) == 15


def test_local_files_keep_their_other_columns(tmp_path):
    """Fault: columns lost, cells read as numbers, old lengths kept, or the hub asked for local files."""
    rows = [{**row, "length_bucket": "old", "category": "00NA"[i % 3 :]} for i, row in enumerate(make_rows(30))]
    files = [write_csv(tmp_path / "in" / "news.csv", rows), write_csv(tmp_path / "in" / "b.csv", make_rows(10))]
    assert run("--from_csv", *files, "--output_dir", tmp_path / "out") == 0
    assert set(contents(tmp_path / "out")) == {"news.csv", "news_subset.csv", "b.csv", "b_subset.csv"}
    full, subset = read_csv(tmp_path / "out" / "news.csv"), read_csv(tmp_path / "out" / "news_subset.csv")
    assert list(full) == ["id", "article", "highlights", "article_length", "length_bucket", "category"]
    assert full.category.tolist() == [row["category"] for row in rows]
    assert full.length_bucket[:4].tolist() == ["0-99", "0-99", "0-99", "100-199"]  # 3, 40, 77, 114 words
    assert len(subset) == 3


def test_failure_keeps_the_old_tables(tmp_path, capsys):
    """Fault: some of the tables replaced, or temporary files left, when a later input is bad."""
    files = [write_csv(tmp_path / "in" / name, make_rows(20)) for name in ("a.csv", "b.csv")]
    arguments = ["--from_csv", *files, "--output_dir", tmp_path / "out", "--overwrite"]
    assert run(*arguments) == 0
    before = contents(tmp_path / "out")
    write_csv(files[0], make_rows(30))
    write_csv(files[1], [*make_rows(20), {"id": "x", "article": " ", "highlights": "h"}])
    capsys.readouterr()
    assert "1 of 21 rows is bad: row 21" in error_of(capsys, *arguments, code=2)
    assert contents(tmp_path / "out") == before
    assert run(*arguments, "--on_bad_row", "skip") == 0
    assert "skipped: " in capsys.readouterr().err
    assert [len(read_csv(tmp_path / "out" / name)) for name in ("a.csv", "b.csv")] == [30, 20]


def test_wrong_arguments(tmp_path, capsys):
    """Fault: tracebacks, wrong exit codes, or two inputs of one name of which the second wins."""
    news = write_csv(tmp_path / "in" / "news.csv", make_rows(4))
    out = ["--output_dir", tmp_path / "out"]
    assert "none.csv: cannot be read (No" in error_of(capsys, "--from_csv", tmp_path / "none.csv", *out, code=2)
    for twin in ("other/News.csv", "in/news_subset.csv"):
        twin = write_csv(tmp_path / twin, make_rows(4))
        assert "two tables would be named news" in error_of(capsys, "--from_csv", news, twin, *out, code=2)
    assert str(news) in error_of(capsys, "--from_csv", news, "--fraction", 1, "--output_dir", news, code=1)
    for fraction in (0, -0.1, 1.1, "nan"):
        assert "--fraction must be above 0" in error_of(capsys, *out, "--fraction", fraction, code=2)
    assert run("--help") == 0
    assert "train_subset.csv, validation_subset.csv and test_subset.csv" in " ".join(capsys.readouterr().out.split())
