"""One table of the scores of several predictions.

    python -m utils.compare FOLDER...

Each folder is one that validate_model.py wrote: its `scores.json` is read. The row is named after the folder, by
its whole path where two folders have one name.
"""

import argparse
import json
import sys
from pathlib import Path

from utils.rouge import METRICS


def read_scores(folder: Path) -> dict:
    """The content of scores.json. Raises ValueError, in one line, where it is not there or not whole."""
    path = folder / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        check_scores(scores)
    except OSError as error:
        remedy = f"write it with validate_model.py --output_dir {folder}"
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"write it again with validate_model.py --output_dir {folder}"
        raise ValueError(f"{path} is not a scores.json of validate_model.py: {remedy}") from error
    return scores


def check_scores(scores: dict) -> None:
    """Raises KeyError, TypeError, AttributeError or ValueError where `table` could not show them."""
    for metric in METRICS:
        low, high = scores["confidence_intervals"][metric]
        float(scores[metric]), float(low), float(high)
    float(scores.get("facts", 0)), float(scores.get("parameters", 0)), int(scores["rows"])


def row_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or the whole path where two end alike."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]


def table(named_scores: dict[str, dict]) -> list[list[str]]:
    """Header and rows: per cent, with the 95 % interval of each mean."""
    facts = any("facts" in scores for scores in named_scores.values())
    header = ["", *(f"{metric} [95 %]" for metric in METRICS[:3]), *(["facts"] if facts else []), "rows", "parameters"]
    rows = [header]
    for name, scores in named_scores.items():
        cells = [name]
        for metric in METRICS[:3]:
            low, high = scores["confidence_intervals"][metric]
            cells.append(f"{100 * scores[metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        if facts:
            cells.append(f"{100 * scores['facts']:.1f} %" if "facts" in scores else "")
        parameters = scores.get("parameters")
        rows.append([*cells, str(scores["rows"]), f"{parameters / 1e6:.2f} M" if parameters else ""])
    return rows


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m utils.compare", description="One table of several scores.json.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output_dir of validate_model.py")
    options = parser.parse_args(arguments)
    try:
        named = dict(zip(row_names(options.folders), map(read_scores, options.folders), strict=True))
    except ValueError as error:
        print(f"utils.compare: error: {error}", file=sys.stderr)
        return 2
    print(aligned(table(named)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
