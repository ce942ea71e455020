"""One table of the scores of several runs, as text, CSV or JSON.

    python -m utils.compare FOLDER... [--teacher NAME --baseline NAME] [--metric rougeL] [--format text|csv|json]

Each folder was written by validate_model.py, or is the output_dir of a training script. Its row is named after the
folder (by its whole path if two folders have one name), or as you like: NAME=FOLDER.
"""

import argparse
import json
import sys
from pathlib import Path

from utils.cli import OneLineParser, run_command, user_path
from utils.evaluation.comparison import compare, read_evaluation
from utils.evaluation.rouge import METRICS
from utils.files import write_text
from utils.text import printable

HEADINGS = dict(zip(METRICS, ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"), strict=True))

EXAMPLES = """\
examples:
  python -m utils.compare runs/demo/predictions/*
  python -m utils.compare teacher=runs/t/test plain=runs/s/test JS=runs/js/test --teacher teacher --baseline plain
"""


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command("utils.compare", lambda: print_table(options))


def print_table(options: argparse.Namespace) -> int:
    import pandas  # only now: it takes a second

    settings = {key: getattr(options, key) for key in ("metric", "teacher", "baseline")}
    rows, remarks = compare([read_evaluation(name, folder) for name, folder in options.folders.items()], **settings)
    if options.format == "text":
        table = pandas.DataFrame([cells(row, rows, options.baseline) for row in rows]).set_index("method")
        table = table.loc[:, (table != "").any()].rename_axis(index=None, columns="method")
        width = {heading: len(heading) + 1 for heading in table}  # two spaces between columns
        text = "\n".join([table.to_string(col_space=width), "", *notes(rows, **settings), *remarks]) + "\n"
    elif options.format == "csv":
        table = pandas.DataFrame(rows, dtype=object)
        for column in ("method", "set"):  # an apostrophe keeps spreadsheet programs from running a name as a formula
            table[column] = table[column].str.replace(r"^(\s*[=+\-@])", r"'\1", regex=True)
        text = table.to_csv(index=False)
    else:
        text = json.dumps({"settings": settings, "rows": rows, "remarks": remarks}, indent=2, ensure_ascii=False) + "\n"
    if options.format != "text":
        for remark in remarks:
            print(f"utils.compare: {remark}", file=sys.stderr)
    if options.output is not None:
        write_text(options.output, text)
        text = f"written: {printable(str(options.output))}\n"
    print(text, end="")
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """folders: {name of the row: folder}."""
    parser = OneLineParser(
        "python -m utils.compare", description="One table of the scores of several runs.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER",
                        help="output_dir of validate_model.py or of a training script; NAME: name of its row")
    parser.add_argument("--teacher", metavar="NAME", help="row of the teacher: shows shares of the gap to it")
    parser.add_argument("--baseline", metavar="NAME",
                        help="row of the student trained as long without a teacher: shows differences to it")
    parser.add_argument("--metric", choices=METRICS, default="rougeL",
                        help="of gap, difference and significance (default: %(default)s)")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text", help="default: %(default)s")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="write there instead of to the console")
    options = parser.parse_intermixed_args(arguments)
    given = [("", text) if Path(text).is_dir() or "=" not in text else text.split("=", 1) for text in options.folders]
    last_parts = [Path(folder).resolve().name for name, folder in given if not name]
    options.folders = {}
    for name, folder in given:
        last_part = Path(folder).resolve().name
        name = printable(name.strip() or (last_part if last_parts.count(last_part) == 1 else folder))
        if name in options.folders:
            parser.error(f"{name} is the name of two rows, {options.folders[name]} and {folder}: write NAME=FOLDER")
        options.folders[name] = user_path(folder)
    for key in ("teacher", "baseline"):
        if (name := getattr(options, key)) is not None and name not in options.folders:
            parser.error(f"--{key} {name} names no row: the rows are {', '.join(options.folders)}")
    if options.teacher is not None and options.baseline in (None, options.teacher):
        parser.error("--teacher shows the gap to a baseline: name another row with --baseline")
    return options


def cells(row: dict, rows: list[dict], baseline: str | None) -> dict[str, str]:
    """A row of the text table, in per cent. Columns in which every row has the same value are notes instead."""
    shown = {"method": row["method"], **{HEADINGS[metric]: with_interval(row, metric) for metric in METRICS[:3]}}
    shown["facts"] = per_cent(row["facts"])
    shown |= {key: str(row[key] or "") for key in ("set", "rows") if len({other[key] for other in rows}) > 1}
    if baseline is None:
        shown["params"] = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.3g} M"
        shown["tokens/s"] = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}"
    else:
        shown["gap %"] = per_cent(row.get("gap_share"))
        shown["difference"] = with_interval(row, "difference", "+")
        shown["p"] = "" if row["method"] == baseline else "unknown"
        if row["p_value_holm"] is not None:
            shown["p"] = f"{row['p_value_holm']:.4f} {'*' if row['significant'] else ' '}"
    return shown


def per_cent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"  # + 0.0: no "-0.0"


def with_interval(row: dict, key: str, sign: str = "") -> str:
    if row[key] is None:
        return ""
    return f"{per_cent(row[key], sign)} ±{50 * (row[f'{key}_high'] - row[f'{key}_low']):.1f}"


def notes(rows: list[dict], metric: str, teacher: str | None, baseline: str | None) -> list[str]:
    """What the columns mean."""
    common = [f"{key}: {value}" for key in ("set", "rows") for value in [rows[0][key]]
              if value is not None and all(row[key] == value for row in rows)]
    common += ["tokens/s: median of the training"] if baseline is None else []
    lines = ["; ".join(["per cent, ± half the 95 % bootstrap interval", *common])]
    if teacher is not None:
        lines.append(f"gap: (method - {baseline}) / ({teacher} - {baseline}) in {HEADINGS[metric]}")
    if baseline is not None:
        count = sum(row["p_value"] is not None for row in rows)
        lines += [f"difference: method - {baseline} in {HEADINGS[metric]}, on the same articles",
                  f"p: paired bootstrap, Holm's correction for {count} comparison{'s' * (count != 1)}; *: below 5 %"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
