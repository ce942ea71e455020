"""CNN/DailyMail from the hub, or local tables, with length buckets and stratified subsets.

    python -m data.cnn_dailymail --output_dir data/cnn_dailymail --fraction 0.1
    python -m data.cnn_dailymail --from_csv mine/train.csv mine/test.csv --output_dir data/mine

writes train.csv, validation.csv and test.csv (with --from_csv: one table per file, under the file's name) with the
columns `id, article, highlights, article_length, length_bucket` and any other columns of a local file, and beside each
a `_subset.csv` with a seeded share of its rows. `article_length` is in words (split at white space).
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data.articles import DataError, describe_bad_rows, read_articles

HUB_DATASET, CONFIGURATION = "abisee/cnn_dailymail", "3.0.0"
SPLITS = ("train", "validation", "test")
COLUMNS = ["id", "article", "highlights"]
BUCKET_WIDTH = 100  # words


def with_lengths(frame):
    """The table with `article_length` and `length_bucket` after id, article and highlights, in place of its own.

    The bucket "300-399" has the articles of 300 to 399 words.
    """
    words = frame["article"].map(lambda text: len(text.split()))
    first = words // BUCKET_WIDTH * BUCKET_WIDTH
    buckets = first.astype(str) + "-" + (first + BUCKET_WIDTH - 1).astype(str)
    others = frame.drop(columns=[*COLUMNS, "article_length", "length_bucket"], errors="ignore")
    return frame[COLUMNS].assign(article_length=words, length_bucket=buckets).join(others)


def stratified_subset(frame, fraction: float, seed: int):
    """A seeded share of the rows, at least one, in the order of the table.

    Each bucket gets its share to within one row: the rows are evenly spaced in a random order sorted by bucket.
    (Rounding in each bucket, as `groupby.sample` does, would leave out whole tables of small buckets.)
    """
    by_bucket = frame.sample(frac=1, random_state=seed).sort_values("length_bucket", kind="stable")
    total = max(1, round(fraction * len(frame)))
    return by_bucket.iloc[[(2 * number + 1) * len(frame) // (2 * total) for number in range(total)]].sort_index()


def read_hub() -> Iterator[tuple]:
    """(split, DataFrame) for each split. Raises DataError."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs a warning at each retry
    try:
        import datasets

        tables = datasets.load_dataset(HUB_DATASET, CONFIGURATION)
        for split in SPLITS:
            frame = tables[split].select_columns(COLUMNS).to_pandas()
            yield split, frame.replace("\r\n?", "\n", regex=True)
    except Exception as error:  # the clients of the hub, of the files and of Arrow share no class of error
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(f"cannot load {HUB_DATASET} {CONFIGURATION} from the hub ({reason}): --from_csv works on local "
                        "files, and ./demo.sh shows everything without the hub") from error


def read_local(paths: list[Path], on_bad_row: str) -> Iterator[tuple]:
    """(name, DataFrame) for each file. Raises DataError."""
    import pandas

    for path in paths:
        articles, bad_rows = read_articles(path, on_bad_row=on_bad_row)
        if bad_rows:
            print(f"skipped: {describe_bad_rows(path, bad_rows, len(articles) + len(bad_rows))}", file=sys.stderr)
        rows = [{"id": row.id, "article": row.article, "highlights": row.highlights, **row.extra} for row in articles]
        yield path.stem, pandas.DataFrame(rows, dtype=str).fillna("")


def check_outputs(folder: Path, names: list[str], inputs: list[Path], overwrite: bool) -> None:
    """Raises DataError if a file would be lost."""
    name, count = Counter(map(str.casefold, names)).most_common(1)[0]
    if count > 1:
        raise DataError(f"--from_csv: two tables would be named {name}: rename a file or convert it separately")
    for path in (folder / name for name in names):
        if path.resolve() in [source.resolve() for source in inputs]:
            raise DataError(f"{path} is an input: choose another --output_dir")
        if path.exists() and not overwrite:
            raise DataError(f"{path} exists: choose another --output_dir, or replace it with --overwrite")


def write_tables(options: argparse.Namespace) -> None:
    """Write all tables; they get their names only when all are complete. Raises DataError or OSError."""
    folder, sources = options.output_dir, options.from_csv
    endings = ("", "_subset") if options.fraction < 1 else ("",)
    stems = SPLITS if sources is None else [path.stem for path in sources]
    names = [f"{stem}{ending}.csv" for stem in stems for ending in endings]
    check_outputs(folder, names, sources or [], options.overwrite)
    temporaries = {name: folder / f".tmp-{name}" for name in names}
    try:
        for stem, frame in read_hub() if sources is None else read_local(sources, options.on_bad_row):
            full = with_lengths(frame)
            tables = [full, stratified_subset(full, options.fraction, options.seed)]
            folder.mkdir(parents=True, exist_ok=True)
            for ending, table in zip(endings, tables, strict=False):
                name = f"{stem}{ending}.csv"
                table.to_csv(temporaries[name], index=False, lineterminator="\n")
                print(f"{folder / name}: {len(table)} rows, {table['length_bucket'].nunique()} length buckets")
        for name, temporary in temporaries.items():
            temporary.replace(folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m data.cnn_dailymail",
        description="Write train.csv, validation.csv and test.csv of the hub's CNN/DailyMail, or the same for local"
        " tables, with article lengths; and train_subset.csv, validation_subset.csv and test_subset.csv beside them.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("data/cnn_dailymail"), help="default: %(default)s")
    parser.add_argument("--fraction", type=float, default=0.1, help="share of each table's rows in its"
                        " NAME_subset.csv, stratified by length; 1: write no subsets; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="of the subsets; default: %(default)s")
    parser.add_argument("--from_csv", type=Path, nargs="+", metavar="FILE", help="local files with the columns id,"
                        " article, highlights, instead of the hub: NAME.csv gives NAME.csv and NAME_subset.csv")
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace tables that exist")
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction must be above 0 and at most 1, not {options.fraction}")
    try:
        write_tables(options)
    except (DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
