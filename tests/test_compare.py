"""utils.compare: one table of several scores.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.compare import main

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def write_scores(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"rouge1": 0.3456, "rouge2": 0.1, "rougeL": 0.25, "rougeLsum": 0.3,
              "confidence_intervals": {metric: [0.2, 0.41249] for metric in METRICS}, "rows": 500}
    (folder / "scores.json").write_text(json.dumps({**scores, **changes}), encoding="utf-8")
    return folder


def lines_of(capsys, *folders: Path) -> list[list[str]]:
    """The printed table, each line split where two or more spaces are."""
    assert main([str(folder) for folder in folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_table(tmp_path, capsys):
    """Fault: rows in another order than given, fractions shown as per cent, an interval of another metric."""
    intervals = {metric: [0.1 * place, 0.1 * place + 0.05] for place, metric in enumerate(METRICS, start=1)}
    teacher = write_scores(tmp_path / "teacher", confidence_intervals=intervals, parameters=1_234_567, facts=0.875)
    lead = write_scores(tmp_path / "lead-3", rows=7)
    assert lines_of(capsys, teacher, lead) == [
        ["rouge1 [95 %]", "rouge2 [95 %]", "rougeL [95 %]", "facts", "rows", "parameters"],
        ["teacher", "34.6 [10.0, 15.0]", "10.0 [20.0, 25.0]", "25.0 [30.0, 35.0]", "87.5 %", "500", "1.23 M"],
        ["lead-3", "34.6 [20.0, 41.2]", "10.0 [20.0, 41.2]", "25.0 [20.0, 41.2]", "7"],
    ]


def test_no_facts_no_column(tmp_path, capsys):
    """Fault: an empty column for what no run has."""
    assert lines_of(capsys, write_scores(tmp_path / "a"))[0] == [
        "rouge1 [95 %]", "rouge2 [95 %]", "rougeL [95 %]", "rows", "parameters"
    ]


def test_columns_are_aligned(tmp_path, capsys):
    """Fault: cells of long and short names stand under the wrong heading."""
    main([str(write_scores(tmp_path / "a")), str(write_scores(tmp_path / "a_much_longer_name"))])
    header, *rows = capsys.readouterr().out.splitlines()
    for row in rows:
        assert row[header.index("rouge1") :].startswith("34.6 [")
        assert row[header.index("rows") :].startswith("500")


def test_folders_of_one_name(tmp_path, capsys):
    """Fault: runs/a/predictions and runs/b/predictions share a name, and one of them vanishes from the table."""
    first = write_scores(tmp_path / "a" / "predictions", rows=1)
    second = write_scores(tmp_path / "b" / "predictions", rows=2)
    rows = lines_of(capsys, first, second)[1:]
    assert [(row[0], row[-1]) for row in rows] == [(str(first), "1"), (str(second), "2")]


def test_this_folder_has_its_name(tmp_path, capsys, monkeypatch):
    """Fault: a row without a name for `python -m utils.compare .`."""
    monkeypatch.chdir(write_scores(tmp_path / "mine"))
    assert lines_of(capsys, Path())[1][0] == "mine"


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", "3", '{"step": 3, "validation": {}}', b"\xff\xfe",
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0, 1] for key in METRICS}}),
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0] for key in METRICS}, "rows": 3}),
    json.dumps({**dict.fromkeys(METRICS, None), "confidence_intervals": {key: [0, 1] for key in METRICS}, "rows": 3}),
])
def test_file_that_is_no_scores(tmp_path, capsys, content):
    """Fault: a traceback, or half a table, for a file of another kind or a broken one."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "scores.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(write_scores(tmp_path / "good")), str(tmp_path / "bad")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert str(tmp_path / "bad" / "scores.json") in shown.err and "validate_model.py" in shown.err


def test_missing_folder(tmp_path):
    """Fault: a traceback and exit code 1 for a folder that is not there; run as users run it."""
    command = [sys.executable, "-m", "utils.compare", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "absent" in done.stderr and "No such file" in done.stderr and "--output_dir" in done.stderr
