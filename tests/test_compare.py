"""utils.compare: one table of the scores of several runs."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import validate_model
from tests import small_runs
from tests.conftest import ROOT, write_rows
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
    write_speeds,
)
from utils.compare import main

# -- the plain table ---------------------------------------------------------------------------------------------


def test_table(tmp_path, capsys):
    """Fault: rows in another order than given, fractions shown as per cent, an interval of another metric."""
    intervals = {metric: [0.1 * place, 0.1 * place + 0.05] for place, metric in enumerate(METRICS, start=1)}
    teacher = write_scores(tmp_path / "teacher", confidence_intervals=intervals, parameters=1_234_567, facts=0.875)
    lead = write_scores(tmp_path / "lead-3", rows=7)
    assert lines_of(capsys, teacher, lead) == [
        ["method", "ROUGE-1 [95 %]", "ROUGE-2 [95 %]", "ROUGE-L [95 %]", "facts", "rows", "params"],
        ["teacher", "34.6 [10.0, 15.0]", "10.0 [20.0, 25.0]", "25.0 [30.0, 35.0]", "87.5", "500", "1.23 M"],
        ["lead-3", "34.6 [20.0, 41.2]", "10.0 [20.0, 41.2]", "25.0 [20.0, 41.2]", "7"],
    ]


def test_second_word_is_rouge_1(tmp_path, capsys):
    """Fault: a column between name and ROUGE-1, which scripts that read the table would take for the score."""
    teacher = write_scores(tmp_path / "teacher", settings={"csv_path": "data/test.csv", "model_path": "x"})
    run = write_run(tmp_path / "run", validation=[0.5])
    lines = shown(capsys, teacher, run).splitlines()
    assert " set " in lines[0]
    assert [float(line.split()[1]) for line in lines if line.startswith("teacher ")] == [34.6]


def test_no_empty_columns(tmp_path, capsys):
    """Fault: an empty column for what no run has, or columns of a comparison that nobody asked for."""
    assert lines_of(capsys, write_scores(tmp_path / "a"))[0] == [
        "method", "ROUGE-1 [95 %]", "ROUGE-2 [95 %]", "ROUGE-L [95 %]", "rows"
    ]


def test_columns_are_aligned(tmp_path, capsys):
    """Fault: cells of long and short names stand under the wrong heading."""
    main([str(write_scores(tmp_path / "a")), str(write_scores(tmp_path / "a_much_longer_name"))])
    header, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert len(rows) == 2
    for row in rows:
        assert row[header.index("ROUGE-1") :].startswith("34.6 [")
        assert row[header.index("rows") :].startswith("500")


def test_sizes_of_models(tmp_path, capsys):
    """Fault: GPT-2 XL in a notation that nobody reads, or a demo model rounded away."""
    sizes = {"a": 824_448, "b": 12_345_678, "c": 124_439_808, "d": 1_557_611_200}
    folders = [write_scores(tmp_path / name, parameters=count) for name, count in sizes.items()]
    assert [row[-1] for row in lines_of(capsys, *folders)[1:]] == ["0.82 M", "12.3 M", "124 M", "1558 M"]


def test_five_methods_fit_160_columns(tmp_path, capsys):
    """Fault: a table that a console wraps."""
    rows = records([0.5, 0.25] * 50)
    names = ["teacher", "plain", "forward_kl", "jensen_shannon", "policy_gradient"]
    for place, name in enumerate(names):
        write_evaluation(tmp_path / name, [], rows=[
            {**row, "rouge": {**row["rouge"], "rougeL": row["rouge"]["rougeL"] - place * number / 1000}}
            for number, row in enumerate(rows)
        ], facts=0.676, parameters=124_439_808, settings={
            "csv_path": "test.csv", "model_path": f"{tmp_path / name}/run/model_checkpoints/best"})
        write_speeds(tmp_path / name / "run", 1.0, 123_456.7)
    arguments = [*(tmp_path / name for name in names), "--teacher", "teacher", "--baseline", "plain"]
    lines = shown(capsys, *arguments).splitlines()
    assert lines[0].endswith("significant (Holm, 5 %)")
    assert "123457" in lines[5] and "124 M" in lines[5] and "yes, p 0.0002" in lines[5]
    assert max(map(len, lines)) <= 160
    assert len(lines) == 6 + 1 + 4


# -- names -------------------------------------------------------------------------------------------------------


def test_folders_of_one_name(tmp_path, capsys):
    """Fault: runs/a/predictions and runs/b/predictions share a name, and one of them vanishes from the table."""
    first = write_scores(tmp_path / "a" / "predictions", rows=1)
    second = write_scores(tmp_path / "b" / "predictions", rows=2)
    rows = lines_of(capsys, first, second)[1:]
    assert [(row[0], row[-1]) for row in rows] == [(str(first), "1"), (str(second), "2")]


def test_this_folder_has_its_name(tmp_path, capsys, monkeypatch):
    """Fault: a row without a name for `python -m utils.compare .`."""
    monkeypatch.chdir(write_scores(tmp_path / "mine"))
    assert lines_of(capsys, ".")[1][0] == "mine"


def test_given_names(tmp_path, capsys):
    """Fault: NAME=FOLDER is not split at the first =, or a folder whose own name has a = is taken for NAME=FOLDER."""
    folder = write_scores(tmp_path / "lr=0.1", rows=3)
    rows = lines_of(capsys, f"fast one={folder}", folder)[1:]
    assert [(row[0], row[-1]) for row in rows] == [("fast one", "3"), ("lr=0.1", "3")]


@pytest.mark.parametrize("given", [["x={a}", "x={b}"], ["b={a}", "{b}"], ["{a}", "{a}"]])
def test_name_twice(tmp_path, capsys, given):
    """Fault: of two rows of one name one vanishes."""
    folders = {name: write_scores(tmp_path / name) for name in "ab"}
    error = refusal(capsys, *(text.format(**folders) for text in given))
    assert "the name of two rows" in error and "NAME=FOLDER" in error


def test_no_name(tmp_path, capsys):
    """Fault: a row without a name for =FOLDER."""
    assert "no name before the =" in refusal(capsys, f"={write_scores(tmp_path / 'a')}")


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
    outputs.append(refusal(capsys, folder, "--\x1b"))
    for text in outputs:
        assert text.replace("\n", "").isprintable(), ascii(text)
    assert outputs[0].splitlines()[1].startswith("red\\x1b[31m\\nrow\\x9b\\x7f  34.6")
    assert list(csv.reader(io.StringIO(outputs[1])))[1][:2] == ["red\\x1b[31m\\nrow\\x9b\\x7f", "a\\x1bb"]


# -- folders of training scripts -----------------------------------------------------------------------------------


def test_run_folder(tmp_path, capsys):
    """Fault: a run folder is refused, or its validation scores are shown where it has test scores."""
    both = write_run(tmp_path / "both", validation=[0.25, 0.25], test=[0.75])
    one = write_run(tmp_path / "one", validation=[0.25, 0.25])
    header, *rows = lines_of(capsys, both, one)
    at = [header.index(name) for name in ("ROUGE-L [95 %]", "set", "rows")]
    assert [[row[place] for place in at] for row in rows] == [
        ["75.0 [10.0, 90.0]", "test", "1"], ["25.0 [10.0, 90.0]", "val", "2"]
    ]


def test_common_set_is_told(tmp_path, capsys):
    """Fault: nobody can see that all scores are those of the validation set, which runs were chosen by."""
    runs = [write_run(tmp_path / name, validation=[0.25]) for name in "ab"]
    text = shown(capsys, *runs)
    assert "set: validation" in text and " set " not in text.splitlines()[0]


@pytest.mark.parametrize(("speeds", "median"), [
    ((10, 300, 100, 200, 900), 250), ((10,), 10), ((10, 70), 70), ((10, None, 70, 90), 80), ((), None),
])
def test_training_speed(tmp_path, capsys, speeds, median):
    """Fault: the slow first line counts, lines of a validation or without a number count, or a mean is taken."""
    run = write_run(tmp_path / "run", validation=[0.5], speeds=speeds)
    last = write_scores(tmp_path / "at", settings={"model_path": f"{run}/model_checkpoints/last/", "csv_path": "a.csv"})
    rows = objects_of(capsys, run, last)
    assert [rows[name]["tokens_per_second"] for name in ("run", "at")] == [median, median]


@pytest.mark.parametrize("model_path", ["lead-3", "gpt2", "absent/model_checkpoints/last", "old.pt", None, 3])
def test_no_training_speed(tmp_path, capsys, monkeypatch, model_path):
    """Fault: an error, or the speed of another run, for a model that no run is known of."""
    monkeypatch.chdir(tmp_path)
    write_speeds(tmp_path, 1.0, 2.0)
    folder = write_scores(tmp_path / "a", settings={"model_path": model_path})
    assert objects_of(capsys, folder)["a"]["tokens_per_second"] is None


def test_broken_metrics(tmp_path, capsys):
    """Fault: a traceback for a metrics.jsonl that is no text."""
    run = write_run(tmp_path / "run", validation=[0.5])
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert str(run / "metrics.jsonl") in refusal(capsys, run)


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
    """Arguments with a baseline, a teacher and a method whose name needs quotes in CSV."""
    intervals = {metric: [0.125 * place, 0.125 * place + 0.0625] for place, metric in enumerate(METRICS, start=1)}
    write_evaluation(tmp_path / "teacher", [0.75] * 3, facts=1 / 3, parameters=10, confidence_intervals=intervals)
    write_evaluation(tmp_path / "plain", [0.25] * 3)
    write_evaluation(tmp_path / "kl", [0.5] * 3)
    return [tmp_path / "teacher", tmp_path / "plain", f'a, "b"={tmp_path / "kl"}', "--teacher", "teacher",
            "--baseline", "plain"]


def test_csv(tmp_path, capsys):
    """Fault: per cent or rounded numbers, cells that a comma in a name shifts, words for what is absent."""
    teacher, plain, method = csv.DictReader(io.StringIO(shown(capsys, *compared(tmp_path), "--format", "csv")))
    p_value, adjusted = str(LEAST_P), str(2 * LEAST_P)
    assert teacher == {
        "method": "teacher", "set": "", "rouge1": str((0.4 + 0.4 + 0.4) / 3), "rouge1_low": "0.125",
        "rouge1_high": "0.1875", "rouge2": "0.25", "rouge2_low": "0.25", "rouge2_high": "0.3125", "rougeL": "0.75",
        "rougeL_low": "0.375", "rougeL_high": "0.4375", "rougeLsum": str(math.fsum([0.6] * 3) / 3),
        "rougeLsum_low": "0.5", "rougeLsum_high": "0.5625", "facts": str(1 / 3), "rows": "3", "parameters": "10",
        "tokens_per_second": "", "gap_share": "", "difference": "0.5", "difference_low": "0.5",
        "difference_high": "0.5", "p_value": p_value, "p_value_holm": adjusted, "significant": "yes",
    }
    assert {plain[key] for key in ("facts", "parameters", "gap_share", "difference", "p_value", "significant")} == {""}
    assert (method["method"], method["gap_share"], method["significant"]) == ('a, "b"', "0.5", "yes")


def test_csv_without_baseline(tmp_path, capsys):
    """Fault: columns of a comparison that nobody asked for."""
    header = shown(capsys, write_scores(tmp_path / "a"), "--format", "csv").splitlines()[0]
    assert header.endswith("facts,rows,parameters,tokens_per_second")


def test_json(tmp_path, capsys):
    """Fault: NaN, rows without the settings behind them, or other numbers than the CSV has."""
    arguments = compared(tmp_path)
    content = json.loads(shown(capsys, *arguments, "--format", "json"), parse_constant=pytest.fail)
    assert content["settings"] == {"metric": "rougeL", "teacher": "teacher", "baseline": "plain"}
    lines = csv.DictReader(io.StringIO(shown(capsys, *arguments, "--format", "csv")))
    words = {None: "", True: "yes", False: "no"}
    for row, line in zip(content["rows"], lines, strict=True):
        flat = {key: words[value] if value is None or isinstance(value, bool) else str(value)
                for key, value in row.items()}
        assert flat == line
    assert content["rows"][2]["significant"] is True and content["rows"][1]["facts"] is None


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_output_file(tmp_path, capsys, form):
    """Fault: the file holds something else than the console would show, or the old content is left in it."""
    arguments = [*compared(tmp_path), "--format", form]
    expected = shown(capsys, *arguments)
    path = tmp_path / "table"
    path.write_text("old" * 10_000)
    assert shown(capsys, *arguments, "--output", path) == f"written: {path}\n"
    assert path.read_text(encoding="utf-8") == expected


def test_output_stays_on_failure(tmp_path, capsys):
    """Fault: a comparison that fails empties or half replaces an existing file, or leaves a temporary one."""
    write_evaluation(tmp_path / "plain", [0.5])
    write_evaluation(tmp_path / "kl", [], rows=records([0.5], id="other"))
    path = tmp_path / "tables" / "table.csv"
    path.parent.mkdir()
    path.write_text("old")
    refusal(capsys, tmp_path / "plain", tmp_path / "kl", "--baseline", "plain", "--output", path)
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [("table.csv", "old")]


def test_output_that_cannot_be_written(tmp_path, capsys):
    """Fault: a traceback for --output into a folder that is not there, or onto a folder."""
    folder = write_scores(tmp_path / "a")
    assert "absent" in refusal(capsys, folder, "--output", tmp_path / "absent" / "table.txt")
    assert str(folder) in refusal(capsys, folder, "--output", folder)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    (["--baseline", "c"], "--baseline c names no row: the rows are a, b"),
    (["--teacher", "c", "--baseline", "a"], "--teacher c names no row: the rows are a, b"),
    (["--teacher", "a"], "with --baseline"),
    (["--teacher", "a", "--baseline", "a"], "both name a"),
    (["--metric", "rouge3"], "rougeLsum"),
    (["--format", "xml"], "json"),
    (["--base", "a"], "--base"),
])
def test_wrong_options(tmp_path, capsys, options, said):
    """Fault: a traceback, several lines of usage, or a table without what was asked."""
    folders = [write_evaluation(tmp_path / name, [0.5]) for name in "ab"]
    assert said in refusal(capsys, *folders, *options)


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", "3", '{"step": 3, "validation": {}}', '{"step": 3, "train": {}}', b"\xff\xfe",
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0, 1] for key in METRICS}}),
    json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0] for key in METRICS}, "rows": 3}),
    *(json.dumps({**dict.fromkeys(METRICS, 0.1), "confidence_intervals": {key: [0, 1] for key in METRICS}, "rows": 3,
                  **change})
      for change in ({"rougeL": None}, {"rougeL": "0.1"}, {"rougeL": math.nan}, {"rougeL": 10**350}, {"rows": 0},
                     {"rows": 2.5}, {"facts": "half"}, {"parameters": True}, {"settings": 3})),
    "[" * 100_000,
])
def test_file_that_is_no_scores(tmp_path, capsys, content):
    """Fault: a traceback, or half a table, for a file of another kind or a broken one."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "scores.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refusal(capsys, write_scores(tmp_path / "good"), tmp_path / "bad")
    assert str(tmp_path / "bad" / "scores.json") in error and "validate_model.py" in error


def test_missing_folder(tmp_path):
    """Fault: a traceback and exit code 1 for a folder that is not there; run as users run it."""
    command = [sys.executable, "-m", "utils.compare", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "absent" in done.stderr and "No such file" in done.stderr and "--output_dir" in done.stderr


def test_options_between_folders(tmp_path, capsys):
    """Fault: folders behind an option are refused as unknown."""
    folders = [write_evaluation(tmp_path / name, [0.5]) for name in "abc"]
    assert len(objects_of(capsys, *folders[:2], "--baseline", "a", folders[2])) == 3
