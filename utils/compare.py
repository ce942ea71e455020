"""One table of the scores of several predictions.

    python -m utils.compare FOLDER...

Each folder is one that validate_model.py wrote: its `scores.json` is read. The row is named after the folder.
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
        for metric in METRICS:
            scores[metric], scores["confidence_intervals"][metric]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): run validate_model.py --output_dir {folder}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a scores.json of validate_model.py: run that again") from error
    return scores


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
        named = {folder.name: read_scores(folder) for folder in options.folders}
    except ValueError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    print(aligned(table(named)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
