"""One table of the scores of several runs, as text, CSV or JSON.

    python -m utils.compare FOLDER... [--teacher NAME --baseline NAME] [--metric rougeL] [--format text|csv|json]

Each folder is one that validate_model.py wrote, or the output_dir of a training script. The row is named after the
folder, by its whole path where two folders have one name, or freely: NAME=FOLDER.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

from utils.cli import INTERRUPTED, OneLineParser, user_path
from utils.errors import describe
from utils.evaluation.comparison import CompareError, compare, differing_origins, read_evaluation
from utils.evaluation.rouge import METRICS
from utils.files import json_text, write_text
from utils.text import in_spreadsheet, printable

HEADINGS = dict(zip(METRICS, ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"), strict=True))
SIGNIFICANT = "significant (Holm, 5 %)"

EXAMPLES = """\
examples:
  python -m utils.compare runs/demo/predictions/*
  python -m utils.compare teacher=runs/t/test plain=runs/s/test JS=runs/js/test --teacher teacher --baseline plain
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        folders = named_folders(options.folders)
        settings = checked_settings(options, list(folders))
        evaluations = [read_evaluation(name, folder) for name, folder in folders.items()]
        rows, remarks = compare(evaluations, **settings)
        differing, unknown = differing_origins(evaluations)
        remarks = [*unknown, *remarks]
        if options.format == "text":
            parts = [differing, [aligned(text_table(rows, settings))], [*notes(rows, settings), *remarks]]
            text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
        elif options.format == "csv":
            text = csv_text(rows)
        else:
            text = json_text({"settings": settings, "rows": rows, "remarks": [*differing, *remarks]})
        if options.output is not None:
            write_text(options.output, text)
            text = f"written: {printable(str(options.output))}\n"
        print(text, end="")
    except (ValueError, OSError) as error:
        reason = describe(error) if isinstance(error, OSError) else str(error)
        print(f"utils.compare: error: {printable(reason)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("utils.compare: interrupted", file=sys.stderr)
        return INTERRUPTED
    if options.format != "text":
        for remark in [*differing, *remarks]:
            print(f"utils.compare: {remark}", file=sys.stderr)
    return 0


# -- what is asked -------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        "python -m utils.compare", description="One table of the scores of several runs.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER",
                        help="output_dir of validate_model.py or of a training script; NAME: how its row is called")
    parser.add_argument("--teacher", metavar="NAME", help="row of the teacher: shows shares of the gap to it")
    parser.add_argument("--baseline", metavar="NAME",
                        help="row of the student trained as long without a teacher: shows differences to it")
    parser.add_argument("--metric", choices=METRICS, default="rougeL",
                        help="of gap, difference and significance (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text", help="default: %(default)s")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="write there instead of to the console")
    return parser.parse_intermixed_args(arguments)


def named_folders(texts: list[str]) -> dict[str, Path]:
    """{row name: folder}, in the given order. CompareError for an empty name and for one that stands twice."""
    given = [(None, text) if Path(text).is_dir() or "=" not in text else text.split("=", 1) for text in texts]
    last_parts = [Path(os.path.realpath(folder)).name for name, folder in given if name is None]
    folders: dict[str, Path] = {}
    for text, (name, folder) in zip(texts, given, strict=True):
        if name is None:
            last_part = Path(os.path.realpath(folder)).name
            name = last_part if last_part and last_parts.count(last_part) == 1 else str(Path(folder))
        name = printable(name.strip())
        if not name:
            raise CompareError(f"{text}: no name before the =: write NAME=FOLDER")
        if name in folders:
            raise CompareError(f"{name} is the name of two rows, {folders[name]} and {folder}: write NAME=FOLDER")
        folders[name] = user_path(folder)
    return folders


def checked_settings(options: argparse.Namespace, names: list[str]) -> dict[str, str | None]:
    """{"metric", "teacher", "baseline"}. CompareError for a name that no row has, or a teacher without baseline."""
    settings: dict[str, str | None] = {"metric": options.metric, "teacher": None, "baseline": None}
    for key in ("teacher", "baseline"):
        if (name := getattr(options, key)) is not None:
            settings[key] = printable(name.strip())
            if settings[key] not in names:
                raise CompareError(f"--{key} {name} names no row: the rows are {', '.join(names)}")
    if settings["teacher"] is not None and settings["baseline"] is None:
        raise CompareError("--teacher shows the gap to a baseline: name the row of that one too, with --baseline")
    if settings["teacher"] is not None and settings["teacher"] == settings["baseline"]:
        raise CompareError(f"--teacher and --baseline both name {settings['teacher']}: name two rows")
    return settings


# -- how it is shown -----------------------------------------------------------------------------------------------


def text_table(rows: list[dict], settings: dict) -> list[list[str]]:
    """Header and rows, in per cent. Columns that no row has are left out."""
    columns = {"method": [row["method"] for row in rows]}
    for metric in METRICS[:3]:
        columns[f"{HEADINGS[metric]} [95 %]"] = [
            f"{per_cent(row[metric])} {interval(row[f'{metric}_low'], row[f'{metric}_high'])}" for row in rows
        ]
    if len({row["set"] for row in rows}) > 1:
        columns["set"] = ["val" if row["set"] == "validation" else row["set"] or "" for row in rows]
    columns["facts"] = [per_cent(row["facts"]) for row in rows]
    columns["rows"] = [str(row["rows"]) for row in rows]
    columns["params"] = ["" if row["parameters"] is None else millions(row["parameters"]) for row in rows]
    speeds = [row["tokens_per_second"] for row in rows]
    columns["tokens/s"] = ["" if speed is None else f"{speed:.0f}" for speed in speeds]
    if settings["teacher"] is not None:
        columns["gap %"] = [per_cent(row["gap_share"]) for row in rows]
    if settings["baseline"] is not None:
        columns["difference"] = [difference(row) for row in rows]
        columns[SIGNIFICANT] = [
            "" if row["method"] == settings["baseline"] else significance(row) for row in rows
        ]
    optional = {"facts", "params", "tokens/s"}
    shown = {header: cells for header, cells in columns.items() if any(cells) or header not in optional}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def per_cent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # + 0.0: no "-0.0"


def interval(low: float, high: float) -> str:
    return f"[{per_cent(low)}, {per_cent(high)}]"


def millions(count: float) -> str:
    return f"{count / 1e6:.{2 if count < 1e7 else 1 if count < 1e8 else 0}f} M"


def difference(row: dict) -> str:
    if row["difference"] is None:
        return ""
    return f"{per_cent(row['difference'], '+')} {interval(row['difference_low'], row['difference_high'])}"


def significance(row: dict) -> str:
    if row["significant"] is None:
        return "unknown"
    return f"{'yes' if row['significant'] else 'no'}, p {row['p_value']:.4f}"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def notes(rows: list[dict], settings: dict) -> list[str]:
    """What the columns mean, at most four lines."""
    sets = {row["set"] for row in rows}
    shared_set = f"; set: {sets.pop()}" if len(sets) == 1 and None not in sets else ""
    speed = "; tokens/s: median of the training" if any(row["tokens_per_second"] is not None for row in rows) else ""
    lines = [f"in per cent, with 95 % bootstrap intervals of the means{shared_set}{speed}"]
    metric, teacher, baseline = HEADINGS[settings["metric"]], settings["teacher"], settings["baseline"]
    if teacher is not None:
        lines.append(f"gap: (method - {baseline}) / ({teacher} - {baseline}) in {metric}")
    if baseline is not None:
        count = sum(row["p_value"] is not None for row in rows)
        lines.append(f"difference: method - {baseline} in {metric}, on the same articles")
        lines.append(f"significant: paired bootstrap over articles; p uncorrected, yes or no after Holm's correction "
                     f"for {count} comparison{'' if count == 1 else 's'}")
    return lines


def csv_text(rows: list[dict]) -> str:
    """A header and one line for each row: fractions of 1 in full precision, empty where absent.

    A name that a spreadsheet program would run as a formula has an apostrophe in front.
    """
    words = {None: "", True: "yes", False: "no"}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(
        [words[value] if value is None or isinstance(value, bool) else in_spreadsheet(value) for value in row.values()]
        for row in rows
    )
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
