"""utils.compare: one table of the scores of several runs."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

import validate_model
from tests import small_runs
from tests.conftest import write_rows
from tests.score_folders import (
    LEAST_P,
    METRICS,
    lines_of,
    objects_of,
    records,
    refusal,
    shown,
    write_evaluation,
    write_run,
    write_scores,
)

# -- the text table ------------------------------------------------------------------------------------------------


def test_table(tmp_path, capsys):
    """Fault: rows in another order than given, fractions as per cent, an interval of another metric, empty columns."""
    intervals = {metric: [0.1 * place, 0.1 * place + 0.02 * place] for place, metric in enumerate(METRICS, start=1)}
    teacher = write_scores(tmp_path / "teacher", confidence_intervals=intervals, parameters=1_234_567, facts=0.875)
    lead = write_scores(tmp_path / "lead-3", rows=7)
    assert lines_of(capsys, teacher, lead) == [
        ["method", "ROUGE-1", "ROUGE-2", "ROUGE-L", "facts", "rows", "params"],
        ["teacher", "34.6 ±1.0", "10.0 ±2.0", "25.0 ±3.0", "87.5", "500", "1.23 M"],
        ["lead-3", "34.6 ±10.6", "10.0 ±10.6", "25.0 ±10.6", "7"],
    ]
    assert "rows: 500" in shown(capsys, teacher)


# -- names -------------------------------------------------------------------------------------------------------


def test_names_of_rows(tmp_path, capsys, monkeypatch):
    """Fault: a row without a name for `.`, a = in a folder's name taken for NAME=FOLDER, a row that vanishes."""
    folder = write_scores(tmp_path / "lr=0.1")
    monkeypatch.chdir(folder)
    first, second = (write_scores(tmp_path / name / "predictions") for name in "ab")
    rows = objects_of(capsys, f"fast one={folder}", first, second, ".")
    assert list(rows) == ["fast one", str(first), str(second), "lr=0.1"]


def test_control_characters(tmp_path, capsys):
    """Fault: a folder's name, an id or a CSV's name changes the colour of the console or breaks the table's lines."""
    name = "red\x1b[31m\nrow\x9b\x7f"
    folder = write_scores(tmp_path / name, settings={"csv_path": "a\x1bb.csv"})
    write_evaluation(tmp_path / "base", [0.5], rows=records([0.5], id="n\x1b0"))
    write_evaluation(tmp_path / "other", [0.5])
    outputs = [shown(capsys, folder, "--format", form) for form in ("text", "csv", "json")]
    outputs.append(refusal(capsys, tmp_path / "base", tmp_path / "other", "--baseline", "base"))
    outputs.append(refusal(capsys, tmp_path / f"{name} absent"))
    outputs.append(refusal(capsys, folder, "--baseline", "\x1b]"))
    for text in outputs:
        assert text.replace("\n", "").isprintable(), ascii(text)
    assert outputs[0].splitlines()[1].startswith("red\\x1b[31m\\nrow\\x9b\\x7f  34.6")


# -- folders of training scripts -----------------------------------------------------------------------------------


def test_run_folder(tmp_path, capsys):
    """Fault: a run folder is refused, or its validation scores are shown although it has test scores."""
    both = write_run(tmp_path / "both", validation=[0.25, 0.25], test=[0.75])
    one = write_run(tmp_path / "one", validation=[0.25, 0.25])
    rows = objects_of(capsys, both, one)
    assert [[row[key] for key in ("rougeL", "set", "rows")] for row in rows.values()] == [
        [0.75, "test", 1], [0.25, "validation", 2]]
    assert lines_of(capsys, both, one)[0][4:6] == ["set", "rows"]


def test_real_folders(tmp_path, capsys):
    """Fault: the folders that the scripts write are not those that are read here. (One model, one CSV, both ways.)"""
    config = small_runs.make_project(tmp_path, rows=8)
    write_rows(tmp_path / "test.csv", small_runs.make_rows(5, seed=2))
    config = small_runs.changed(
        config, trainer_kwargs={"metrics": ["rouge"], "save_predictions": True, "monitor_test": True,
                                "precision": "float32"},
        dataset_kwargs={"test_dataset": "test.csv"},
    )
    assert small_runs.run(tmp_path, config) == 0
    arguments = {"csv_path": tmp_path / "test.csv", "model_path": tmp_path / "run/model_checkpoints/last",
                 "output_dir": tmp_path / "out", "max_generation_length": 8, "precision": "float32", "device_id": -1}
    assert validate_model.main([text for key, value in arguments.items() for text in (f"--{key}", str(value))]) == 0
    capsys.readouterr()
    rows = objects_of(capsys, tmp_path / "run", tmp_path / "out", "--baseline", "run")
    assert rows["run"]["set"] == rows["out"]["set"] == "test"
    assert rows["run"]["tokens_per_second"] == rows["out"]["tokens_per_second"] > 0
    assert (rows["out"]["difference"], rows["out"]["p_value"], rows["out"]["significant"]) == (0.0, 1.0, False)


# -- formats and files ---------------------------------------------------------------------------------------------


def compared(tmp_path: Path) -> list:
    """Arguments with a baseline, a teacher, and a method whose name needs quotes in CSV."""
    intervals = {metric: [0.125 * place, 0.125 * place + 0.0625] for place, metric in enumerate(METRICS, start=1)}
    write_evaluation(tmp_path / "teacher", [0.75] * 3, facts=1 / 3, parameters=10, confidence_intervals=intervals)
    write_evaluation(tmp_path / "plain", [0.25] * 3)
    write_evaluation(tmp_path / "kl", [0.5] * 3)
    return [tmp_path / "teacher", tmp_path / "plain", f'a, "b"={tmp_path / "kl"}', "--teacher", "teacher",
            "--baseline", "plain"]


def test_csv(tmp_path, capsys):
    """Fault: per cent or rounded numbers, cells that a comma in a name shifts."""
    teacher, plain, method = csv.DictReader(io.StringIO(shown(capsys, *compared(tmp_path), "--format", "csv")))
    assert teacher == {
        "method": "teacher", "set": "", "rouge1": str((0.4 + 0.4 + 0.4) / 3), "rouge1_low": "0.125",
        "rouge1_high": "0.1875", "rouge2": "0.25", "rouge2_low": "0.25", "rouge2_high": "0.3125", "rougeL": "0.75",
        "rougeL_low": "0.375", "rougeL_high": "0.4375", "rougeLsum": str(math.fsum([0.6] * 3) / 3),
        "rougeLsum_low": "0.5", "rougeLsum_high": "0.5625", "facts": str(1 / 3), "rows": "3", "parameters": "10",
        "tokens_per_second": "", "difference": "0.5", "difference_low": "0.5", "difference_high": "0.5",
        "p_value": str(LEAST_P), "p_value_holm": str(2 * LEAST_P), "significant": "True", "gap_share": "",
    }
    assert {plain[key] for key in ("facts", "parameters", "gap_share", "difference", "p_value", "significant")} == {""}
    assert (method["method"], method["gap_share"], method["significant"]) == ('a, "b"', "0.5", "True")


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_output_file(tmp_path, capsys, form):
    """Fault: the file holds something else than the console would show, or the old content is left in it."""
    arguments = [*compared(tmp_path), "--format", form]
    expected = shown(capsys, *arguments)
    path = tmp_path / "table"
    path.write_text("old" * 10_000)
    assert shown(capsys, *arguments, "--output", path) == f"written: {path}\n"
    assert path.read_text(encoding="utf-8") == expected


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (["--baseline", "c"], "--baseline c names no row: the rows are a, b"),
    (["--teacher", "c", "--baseline", "a"], "--teacher c names no row: the rows are a, b"),
    (["--teacher", "a"], "--baseline"),
    (["--teacher", "a", "--baseline", "a"], "--baseline"),
    (["--metric", "rouge3"], "rougeLsum"),
    (["--base", "a"], "--base"),
])
def test_wrong_options(tmp_path, capsys, options, words):
    """Fault: a traceback, several lines of usage, or a table without what was asked."""
    folders = [write_evaluation(tmp_path / name, [0.5]) for name in "ab"]
    assert words in refusal(capsys, *folders, *options)


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"step": 3, "validation": {}}', '{"step": 3, "train": {}}', b"\xff\xfe",
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0, 1] for key in METRICS}}),
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0] for key in METRICS}, "rows": 3}),
    *(json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0, 1] for key in METRICS}, "rows": 3,
                  **change}) for change in ({"rougeL": None}, {"rows": 0}, {"settings": 3})),
])
def test_file_that_is_no_scores(tmp_path, capsys, content):
    """Fault: a traceback, or half a table, for a file of another kind or a broken one."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "scores.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(capsys, write_scores(tmp_path / "good"), tmp_path / "bad")
    assert str(tmp_path / "bad" / "scores.json") in error and "validate_model.py" in error
