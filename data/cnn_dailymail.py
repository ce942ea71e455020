"""CNN/DailyMail from the hub, or local CSVs, with length buckets and stratified subsets.

    python -m data.cnn_dailymail --output_dir data/cnn_dailymail --fraction 0.1
    python -m data.cnn_dailymail --from_csv mine/train.csv mine/test.csv --output_dir data/mine

writes train.csv, validation.csv and test.csv (with --from_csv: one table a file, under the file's name) with the
columns `id, article, highlights, article_length, length_bucket` and whatever else a local file holds, and beside each
a `_subset.csv` with a seeded share of its rows. `cnn_dailymail.json` records the settings: the same settings are not
run twice. `article_length` is in words (split at white space).
"""

import argparse
import csv
import json
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data.articles import DataError, describe_bad_rows, read_articles
from data.digest import file_digest
from data.os_errors import describe
from data.scratch import clear_dead, finish_moves, place_together, scratch_folder

VERSION = 1  # of the tables: raise it when the same settings give other rows
HUB_DATASET, CONFIGURATION = "abisee/cnn_dailymail", "3.0.0"
SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "article", "highlights")
RECORD = "cnn_dailymail.json"


class UsageError(ValueError):
    """Arguments that cannot be carried out. The message is one line for the user."""


class HubError(RuntimeError):
    """The hub's data set cannot be had. The message is one line for the user."""


def length_bucket(words: int, width: int) -> str:
    """The bucket of an article of so many words, such as "300-399" for width 100; both ends belong to it.

    Buckets start at multiples of the width, from 0, so that every whole number is in exactly one.
    Raises ValueError for words below 0 or a width below 1.
    """
    if words < 0 or width < 1:
        raise ValueError(f"words must be 0 or more and width 1 or more, not {words} and {width}")
    first = words // width * width
    return f"{first}-{first + width - 1}"


def allocate(sizes, total):
    """{bucket: rows of the total}, by largest remainder: each is its exact share rounded down or up.

    sizes: {bucket: rows there are}; total: at most their sum. Equal remainders go to the bigger bucket, then by name.
    """
    rows = sum(sizes.values())
    shares = {bucket: total * size // rows for bucket, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda bucket: (-(total * sizes[bucket] % rows), -sizes[bucket], bucket))
    for bucket in by_remainder[: total - sum(shares.values())]:
        shares[bucket] += 1
    return shares


def stratified_subset(buckets: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Sorted indices of round(fraction * rows) rows, each bucket holding its share of them by largest remainder.

    buckets: the bucket of each row. The same seed gives the same rows. Each bucket has one seeded order of its rows
    and gives its first ones, so a smaller fraction's subset lies inside a bigger one's, but for single rows of a
    bucket to which largest remainder gives fewer rows of the bigger total (the Alabama paradox).
    Raises ValueError for a fraction outside 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    rows_of = defaultdict(list)
    for index, bucket in enumerate(buckets):
        rows_of[bucket].append(index)
    if not rows_of:
        return []
    shares = allocate({bucket: len(rows) for bucket, rows in rows_of.items()}, round(fraction * len(buckets)))
    chosen = []
    for bucket, rows in rows_of.items():
        random.Random(f"{bucket}/{seed}").shuffle(rows)  # a string seed gives the same order in every process
        chosen += rows[: shares[bucket]]
    return sorted(chosen)


@contextmanager
def quiet_hub():
    """Without the warning that the hub's client logs at each of its retries."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_hub():
    """{split: datasets.Dataset} of the three splits. Raises HubError."""
    try:
        import datasets  # takes a second, and --from_csv needs none of it

        with quiet_hub():
            tables = datasets.load_dataset(HUB_DATASET, CONFIGURATION)
        return {split: tables[split].select_columns(list(COLUMNS)) for split in SPLITS}
    except Exception as error:  # the clients of the hub, of the files and of Arrow share no class of error
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise HubError(
            f"cannot load {HUB_DATASET} {CONFIGURATION} from the hub ({reason}): "
            "--from_csv works on local files, and ./demo.sh shows everything without the hub"
        ) from error


def load_csv(path, on_bad_row):
    """The file's good rows as dicts with the keys of COLUMNS and the file's other columns. Raises DataError."""
    articles, bad_rows = read_articles(path, on_bad_row=on_bad_row)
    if bad_rows:
        told = describe_bad_rows(path, bad_rows, len(articles) + len(bad_rows))
        print(f"skipped: {told}", file=sys.stderr)
    return [{"id": row.id, "article": row.article, "highlights": row.highlights, **row.extra} for row in articles]


def load_tables(sources, on_bad_row):
    """(name, rows) one at a time, rows with len(), iteration and rows[index] -> dict. Raises DataError, HubError."""
    if sources is None:
        yield from load_hub().items()
    else:
        for path in sources:
            yield path.stem, load_csv(path, on_bad_row)


def write_table(path, rows, total, width):
    """Writes the rows (dicts of texts, `total` of them) with their lengths; returns the bucket of each.

    Line ends inside a cell become LF. Lengths that the rows bring along are made anew.
    """
    buckets = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in tqdm(rows, desc=path.name, total=total, unit=" rows", disable=None, file=sys.stderr):
            words = len(row["article"].split())
            row = {name: text.replace("\r\n", "\n").replace("\r", "\n") for name, text in row.items()}
            lengths = {"article_length": words, "length_bucket": length_bucket(words, width)}
            row = {**{name: row[name] for name in COLUMNS}, **lengths, **row, **lengths}
            if not buckets:
                writer.writerow(row)
            writer.writerow(row.values())
            buckets.append(row["length_bucket"])
    return buckets


def write_tables(folder, tables, settings):
    """Writes each table and, for a fraction below 1, its subset. Returns one line per file. Raises DataError."""
    fraction, width = settings["fraction"], settings["bucket_width"]
    lines = []
    for name, rows in tables:
        if len(rows) == 0:
            raise DataError(f"{name}: the table holds no rows: add rows or leave it out")
        buckets = write_table(folder / f"{name}.csv", rows, len(rows), width)
        lines.append(f"{name}.csv: {len(rows)} rows, {len(set(buckets))} length buckets")
        if fraction < 1:
            chosen = stratified_subset(buckets, fraction, settings["seed"])
            if not chosen:
                raise DataError(f"{name}: --fraction {fraction} of {len(rows)} rows is no row: raise it")
            of_subset = write_table(
                folder / f"{name}_subset.csv", (rows[index] for index in chosen), len(chosen), width
            )
            lines.append(f"{name}_subset.csv: {len(chosen)} rows, {len(set(of_subset))} length buckets")
    return lines


def read_record(folder):
    """The folder's record: {"settings", "sha256": {file: digest}}, both {} where there is none or it is not ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        digests = dict(record["sha256"])
        if any(name != Path(name).name or not name.endswith(".csv") for name in digests):  # those may be deleted
            raise ValueError
        return {"settings": dict(record["settings"]), "sha256": digests}
    except (OSError, ValueError, KeyError, TypeError):
        return {"settings": {}, "sha256": {}}


def table_names(sources, fraction):
    """Names of the files to write. Raises UsageError where two of them would be the same."""
    stems = SPLITS if sources is None else [path.stem for path in sources]
    names = [f"{stem}{end}.csv" for stem in stems for end in (("", "_subset") if fraction < 1 else ("",))]
    folded = [name.casefold() for name in names]  # as file systems that ignore case see them
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise UsageError(f"--from_csv: two of the tables would be {name}: rename a file or convert it by itself")
    return names


def check_inputs(folder, names, sources):
    """Raises UsageError if writing or removing one of the names would lose an input file."""
    for path in sources or []:
        for target in (folder / name for name in names):
            if target.exists() and path.exists() and target.samefile(path):
                raise UsageError(f"--from_csv {path} is in the way of the result: choose another --output_dir")


def check_replaceable(folder, names, record, digests):
    """Raises UsageError if a file in the way is not as this command left it."""
    foreign = [name for name in names if name in digests and digests[name] != record["sha256"].get(name)]
    if (folder / RECORD).exists() and not record["settings"]:
        foreign.append(RECORD)
    if foreign:
        raise UsageError(
            f"{folder / foreign[0]} was not written by this command or was changed since: "
            "choose another --output_dir, or replace it with --overwrite"
        )


def describe_settings(options):
    """What the result depends on. Raises DataError for an input file that cannot be read."""
    source = {"dataset": HUB_DATASET, "configuration": CONFIGURATION}
    if options.from_csv is not None:
        try:
            source = [{"file": path.name, "sha256": file_digest(path)} for path in options.from_csv]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}): check --from_csv") from None
    return {
        "version": VERSION,
        "source": source,
        "fraction": options.fraction,
        "bucket_width": options.bucket_width,
        "seed": options.seed,
        "on_bad_row": options.on_bad_row,
    }


def make_tables(options):
    """Writes everything, or finds it already there. Returns the lines to print.

    Files take their places only when all are complete, the record last. Tables that an earlier run left and these
    settings do not have are removed. Raises UsageError, DataError, HubError or OSError.
    """
    folder, sources = options.output_dir, options.from_csv
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is not a folder: choose another")
    if folder.exists():
        finish_moves(folder)
    names = table_names(sources, options.fraction)
    settings, record = describe_settings(options), read_record(folder)
    known = sorted({*names, *record["sha256"]})
    check_inputs(folder, known, sources)
    digests = {name: file_digest(folder / name) for name in known if (folder / name).is_file()}
    if not options.overwrite:
        if record == {"settings": settings, "sha256": digests}:
            clear_dead(folder)
            return [f"{folder}: already complete with these settings, reused"]
        check_replaceable(folder, names, record, digests)
    tables = load_tables(sources, options.on_bad_row)
    if sources is None:
        tables = list(tables)  # so that an unreachable hub leaves no folder behind
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as new:
        lines = write_tables(new, tables, settings)
        new_record = {"settings": settings, "sha256": {name: file_digest(new / name) for name in names}}
        (new / RECORD).write_text(json.dumps(new_record, indent=2) + "\n", encoding="utf-8")
        place_together(new)
    for name, digest in record["sha256"].items():
        if name not in names and digests.get(name) == digest:
            (folder / name).unlink()
    return [f"{folder}/{line}" for line in lines]


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"cnn_dailymail: error: {message}\n")


def parse_arguments(arguments=None):
    """The options of the command line. Exits with 2 and one line for a usage error."""
    parser = OneLineParser(
        prog="python -m data.cnn_dailymail",
        description="Write train.csv, validation.csv and test.csv of the hub's CNN/DailyMail, or the same for local CSV"
        " files, with article lengths; and train_subset.csv, validation_subset.csv and test_subset.csv beside them.",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("data/cnn_dailymail"), help="default: %(default)s"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.1,
        help="of each table's rows in its NAME_subset.csv, the same share of every length; 1: write no subsets;"
        " default: %(default)s",
    )
    parser.add_argument("--bucket_width", type=int, default=100, help="in words; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1234, help="of the subsets; default: %(default)s")
    parser.add_argument(
        "--from_csv",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="local files with the columns id, article, highlights, instead of the hub: NAME.csv gives NAME.csv and"
        " NAME_subset.csv in --output_dir",
    )
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="make the files anew, whatever is there")
    options = parser.parse_args(arguments)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction must be above 0 and at most 1, not {options.fraction}")
    if options.bucket_width < 1:
        parser.error(f"--bucket_width must be 1 or more, not {options.bucket_width}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 for the hub, a file or its contents, 2 for a usage error,
    130 for Ctrl-C."""
    options = parse_arguments(arguments)
    try:
        lines = make_tables(options)
    except (UsageError, DataError, HubError) as error:
        print(f"cnn_dailymail: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(f"cnn_dailymail: error: cannot write {describe(error, options.output_dir)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cnn_dailymail: interrupted", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
