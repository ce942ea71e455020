"""Reading `metrics.jsonl`, the log of a training."""

import json
from pathlib import Path


def read_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """(the lines, numbers from 1 of the damaged ones). Raises OSError.

    A last line without a newline was cut off by a kill: it is skipped, not damaged.
    """
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if type(line) is not dict or type(line["step"]) is not int or type(line["split"]) is not str:
                raise ValueError("not a line of a run")
            lines.append(line)
        except (ValueError, KeyError, RecursionError):
            damaged.append(number)
    return lines, damaged
