"""utils.evaluation.comparison: share of the gap, differences and their significance."""

import json

import pytest

from tests.score_folders import LEAST_P, objects_of, records, refusal, shown, write_evaluation, write_run, write_scores
from utils.compare import main


def test_gap_share(tmp_path, capsys):
    """Fault: a share of the teacher's score instead of the gap, or one for teacher and baseline themselves."""
    values = {"teacher": 0.75, "plain": 0.5, "quarter": 0.5625, "above": 0.8125, "below": 0.375}
    folders = [write_evaluation(tmp_path / name, [value] * 2) for name, value in values.items()]
    options = ["--teacher", "teacher", "--baseline", "plain"]
    rows = objects_of(capsys, *folders, *options)
    assert {name: row["gap_share"] for name, row in rows.items()} == {
        "teacher": None, "plain": None, "quarter": 0.25, "above": 1.25, "below": -0.5
    }
    assert "gap: (method - plain) / (teacher - plain) in ROUGE-L" in shown(capsys, *folders, *options)


@pytest.mark.parametrize("teacher", [0.5, 0.25])
def test_teacher_not_above_baseline(tmp_path, capsys, teacher):
    """Fault: a division by zero, or a share of a gap that does not exist."""
    folders = [write_evaluation(tmp_path / name, [value] * 2)
               for name, value in {"teacher": teacher, "plain": 0.5, "kl": 0.375}.items()]
    options = [*folders, "--teacher", "teacher", "--baseline", "plain"]
    assert "gap: empty, because teacher is not above plain in rougeL" in shown(capsys, *options)
    assert {row["gap_share"] for row in objects_of(capsys, *options).values()} == {None}


def test_clear_difference_and_none(tmp_path, capsys):
    """Fault: a wrong sign, an interval of the mean instead of the difference, significance of what is equal."""
    base = [0.25, 0.5] * 10
    write_evaluation(tmp_path / "plain", base)
    write_evaluation(tmp_path / "better", [value + 0.25 for value in base])
    write_evaluation(tmp_path / "worse", [value - 0.125 for value in base])
    write_evaluation(tmp_path / "equal", base)
    folders = [tmp_path / name for name in ("plain", "better", "worse", "equal")]
    rows = objects_of(capsys, *folders, "--baseline", "plain")
    # Each row differs by the same amount, so every resample does.
    assert [rows["better"][key] for key in ("difference", "difference_low", "difference_high")] == [0.25] * 3
    assert [rows["worse"][key] for key in ("difference", "difference_low", "difference_high")] == [-0.125] * 3
    assert [rows["equal"][key] for key in ("difference", "p_value", "significant")] == [0.0, 1.0, False]
    for name in ("better", "worse"):
        assert rows[name]["p_value"] == pytest.approx(LEAST_P, abs=1e-12)
        assert rows[name]["p_value_holm"] == pytest.approx(3 * LEAST_P, abs=1e-12)
        assert rows[name]["significant"] is True
    assert rows["plain"]["significant"] is rows["plain"]["difference"] is None
    assert "gap_share" not in rows["plain"]
    lines = [line.split()[-4:] for line in shown(capsys, *folders, "--baseline", "plain").splitlines()[2:5]]
    assert lines == [["+25.0", "±0.0", "0.0006", "*"], ["-12.5", "±0.0", "0.0006", "*"],
                     ["±10.6", "+0.0", "±0.0", "1.0000"]]


@pytest.mark.parametrize(("change", "problem"), [
    (lambda rows: [*rows[:1], {**rows[1], "id": "m"}], "id n1 is only in plain"),
    (lambda rows: [*rows, {**rows[1], "id": ""}], "id  is only in kl"),
    (lambda rows: [rows[0], {**rows[1], "target_highlight": "x"}], "the targets of id n1 differ"),
])
def test_different_rows(tmp_path, capsys, change, problem):
    """Fault: a difference between scores of different articles."""
    write_evaluation(tmp_path / "plain", [0.5, 0.5])
    write_evaluation(tmp_path / "kl", [], rows=change(records([0.5, 0.5])))
    error = refusal(capsys, tmp_path / "plain", tmp_path / "kl", "--baseline", "plain")
    assert "kl and plain were scored on different rows" in error and problem in error and "one CSV" in error


@pytest.mark.parametrize(("changes", "problem"), [
    ({"rows": 3}, "3 rows and 2"), ({"articles_sha256": "ef" * 32}, "other articles or targets"),
])
def test_different_rows_without_predictions(tmp_path, capsys, changes, problem):
    """Fault: a gap between scores of different articles, because no predictions say so."""
    plain = write_evaluation(tmp_path / "plain", [0.5] * 2, articles_sha256="ab" * 32)
    kl = write_scores(tmp_path / "kl", **{"rows": 2, **changes})
    assert f"different rows: {problem}" in refusal(capsys, plain, kl, "--baseline", "plain")


def test_missing_predictions(tmp_path, capsys):
    """Fault: an error, or a significance out of nothing, if a run kept no predictions."""
    plain = write_run(tmp_path / "plain", test=[0.5, 0.5])
    kept = write_run(tmp_path / "kept", test=[0.75, 0.75])
    lost = write_run(tmp_path / "lost", keep=False, test=[0.75, 0.75])
    *table, remark = shown(capsys, plain, kept, lost, "--baseline", "plain").splitlines()
    assert table[2].endswith("0.0002 *") and table[3].split()[-1] == "unknown"
    assert remark.startswith("significance unknown: no predictions of lost (") and "save_predictions" in remark
    assert "for 1 comparison" in table[-1]
    rows = objects_of(capsys, plain, kept, lost, "--baseline", "plain")
    assert (rows["lost"]["significant"], rows["lost"]["difference"]) == (None, None)
    assert rows["kept"]["p_value_holm"] == rows["kept"]["p_value"]
    assert main([str(lost), str(kept), "--baseline", "lost", "--format", "csv"]) == 0
    output = capsys.readouterr()
    assert "no predictions of lost (" in output.err and output.out.splitlines()[2].endswith(",,,,,,")


@pytest.mark.parametrize("content", [
    "[{", "{}", "[3]", "[{}]", "\udcff", json.dumps(records([0.5])), json.dumps(records([0.5, 0.75])),
    json.dumps(records([0.5, 0.5], id="same")), json.dumps(records([0.5, 0.5], rouge={"rougeL": None})),
    json.dumps(records([0.5, float("nan")])),
])
def test_broken_predictions(tmp_path, capsys, content):
    """Fault: a traceback, or a significance from rows that are not those behind the scores."""
    plain = write_evaluation(tmp_path / "plain", [0.5, 0.5])
    kl = write_evaluation(tmp_path / "kl", [0.5, 0.5])
    (kl / "predictions.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    error = refusal(capsys, plain, kl, "--baseline", "plain")
    assert str(kl / "predictions.json") in error and "validate_model.py" in error
    assert shown(capsys, plain, kl)  # they are read only if they are needed


def test_predictions_of_another_run(tmp_path, capsys):
    """Fault: after a kill between two files, new predictions are compared under the old scores."""
    plain = write_evaluation(tmp_path / "plain", [0.5, 0.5])
    kl = write_evaluation(tmp_path / "kl", [0.5, 0.5], predictions_sha256={"predictions.json": "00" * 32})
    assert "other SHA-256" in refusal(capsys, plain, kl, "--baseline", "plain")
