"""Folders of scores as the scripts leave them, and what utils.compare shows of them."""

import json
import math
from pathlib import Path

import pytest

from utils.compare import main

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LEAST_P = 2 / 10_001  # none of 10,000 resamples on the far side, and the one that is always counted


def write_scores(folder: Path, **changes) -> Path:
    """A folder as validate_model.py leaves it, without predictions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"rouge1": 0.3456, "rouge2": 0.1, "rougeL": 0.25, "rougeLsum": 0.3,
              "confidence_intervals": {metric: [0.2, 0.41249] for metric in METRICS}, "rows": 500}
    (folder / "scores.json").write_text(json.dumps({**scores, **changes}), encoding="utf-8")
    return folder


def records(values: list[float], **changes) -> list[dict]:
    """Rows of a predictions file: rougeL as given, rouge2 its mirror image, the others constant."""
    return [{"id": f"n{place}", "article": "a", "target_highlight": f"target {place}", "generated_highlight": "g",
             "rouge": {"rouge1": 0.4, "rouge2": 1 - value, "rougeL": value, "rougeLsum": 0.6}, **changes}
            for place, value in enumerate(values)]


def means(rows: list[dict]) -> dict:
    return {metric: math.fsum(row["rouge"][metric] for row in rows) / len(rows) for metric in METRICS}


def write_evaluation(folder: Path, values: list[float], rows: list[dict] | None = None, **changes) -> Path:
    """A folder as validate_model.py leaves it."""
    rows = records(values) if rows is None else rows
    write_scores(folder, **{**means(rows), "rows": len(rows), **changes})
    (folder / "predictions.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write_run(folder: Path, keep: bool = True, speeds: tuple = (), **sets: list[float]) -> Path:
    """A folder as a training script leaves it after step 7, with the row scores of its sets."""
    intervals = {metric: [0.1, 0.9] for metric in METRICS}
    sections = {}
    (folder / "predictions").mkdir(parents=True)
    for name, values in sets.items():
        rows = records(values)
        sections[name] = {**means(rows), "confidence_intervals": intervals, "rows": len(rows)}
        if keep:
            (folder / "predictions" / f"{name}-step-7.json").write_text(json.dumps(rows))
    (folder / "scores.json").write_text(json.dumps({"step": 7, **sections}))
    write_speeds(folder, *speeds)
    return folder


def write_speeds(run: Path, *speeds: float | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [{"split": "train", "step": step, "tokens_per_second": speed} for step, speed in enumerate(speeds, start=1)]
    lines.insert(1, {"split": "validation", "step": 1, "loss": 1.0, "tokens_per_second": 1e9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tr')


def shown(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def lines_of(capsys, *arguments) -> list[list[str]]:
    """The printed table, each line split where two or more spaces are."""
    lines = shown(capsys, *arguments).partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def objects_of(capsys, *arguments) -> dict[str, dict]:
    """{method: its object} as JSON shows them; nothing but strict JSON passes."""
    text = shown(capsys, *arguments, "--format", "json")
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    return {row["method"]: row for row in content["rows"]}


def refusal(capsys, *arguments) -> str:
    """The one line of an error with exit code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert (code, output.out, len(output.err.splitlines())) == (2, "", 1), output
    return output.err
