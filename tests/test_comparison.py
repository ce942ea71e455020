"""utils.evaluation.comparison: share of the gap, differences and their significance."""

import json
import math

import pytest

from tests.score_folders import (
    LEAST_P,
    lines_of,
    objects_of,
    records,
    refusal,
    shown,
    write_evaluation,
    write_run,
    write_scores,
)
from utils.compare import main
from utils.evaluation.comparison import holm

# -- gap, difference, significance ---------------------------------------------------------------------------------


def test_gap_share(tmp_path, capsys):
    """Fault: a share of the teacher's score instead of the gap, or one for teacher and baseline themselves."""
    values = {"teacher": 0.75, "plain": 0.5, "quarter": 0.5625, "above": 0.8125, "below": 0.375}
    folders = [write_evaluation(tmp_path / name, [value] * 2) for name, value in values.items()]
    options = ["--teacher", "teacher", "--baseline", "plain"]
    rows = objects_of(capsys, *folders, *options)
    assert {name: row["gap_share"] for name, row in rows.items()} == {
        "teacher": None, "plain": None, "quarter": 0.25, "above": 1.25, "below": -0.5
    }
    header, *lines = shown(capsys, *folders, *options).splitlines()
    at = header.index("gap %")
    assert [line[at : at + 5].strip() for line in lines[:5]] == ["", "", "25.0", "125.0", "-50.0"]
    assert "gap: (method - plain) / (teacher - plain) in ROUGE-L" in lines


def test_metric_of_the_gap(tmp_path, capsys):
    """Fault: --metric changes the gap and not the difference, or neither. (rouge2 mirrors rougeL here.)"""
    for name, value in {"teacher": 0.25, "plain": 0.5, "kl": 0.375}.items():
        write_evaluation(tmp_path / name, [value] * 2)
    folders = [tmp_path / name for name in ("teacher", "plain", "kl")]
    row = objects_of(capsys, *folders, "--teacher", "teacher", "--baseline", "plain", "--metric", "rouge2")["kl"]
    assert (row["gap_share"], row["difference"]) == (0.5, 0.125)


@pytest.mark.parametrize("teacher", [0.5, 0.25])
def test_teacher_not_above_baseline(tmp_path, capsys, teacher):
    """Fault: a division by zero, or a share of a gap that is none."""
    for name, value in {"teacher": teacher, "plain": 0.5, "kl": 0.375}.items():
        write_evaluation(tmp_path / name, [value] * 2)
    options = [tmp_path / "teacher", tmp_path / "plain", tmp_path / "kl", "--teacher", "teacher", "--baseline", "plain"]
    assert "gap: empty, because teacher is not above plain in rougeL" in shown(capsys, *options)
    assert {row["gap_share"] for row in objects_of(capsys, *options).values()} == {None}


def test_no_gap_across_sets(tmp_path, capsys):
    """Fault: test scores of the teacher minus validation scores of the student, shown as a gap."""
    teacher = write_run(tmp_path / "teacher", keep=False, test=[0.75])
    plain = write_run(tmp_path / "plain", keep=False, validation=[0.25])
    kl = write_run(tmp_path / "kl", keep=False, validation=[0.5])
    options = [teacher, plain, kl, "--teacher", "teacher", "--baseline", "plain"]
    assert "gap: empty where teacher would be compared with plain" in shown(capsys, *options)
    assert objects_of(capsys, *options)["kl"]["gap_share"] is None


def test_clear_difference_and_none(tmp_path, capsys):
    """Fault: a wrong sign, an interval of the mean instead of the difference, significance of what is equal."""
    base = [0.25, 0.5] * 10
    write_evaluation(tmp_path / "plain", base)
    write_evaluation(tmp_path / "better", [value + 0.25 for value in base])
    write_evaluation(tmp_path / "worse", [value - 0.125 for value in base])
    write_evaluation(tmp_path / "equal", base)
    folders = [tmp_path / name for name in ("plain", "better", "worse", "equal")]
    rows = objects_of(capsys, *folders, "--baseline", "plain")
    # Each row differs by the same amount, so that every resample does.
    assert [rows["better"][key] for key in ("difference", "difference_low", "difference_high")] == [0.25] * 3
    assert [rows["worse"][key] for key in ("difference", "difference_low", "difference_high")] == [-0.125] * 3
    assert [rows["equal"][key] for key in ("difference", "p_value", "significant")] == [0.0, 1.0, False]
    for name in ("better", "worse"):
        assert rows[name]["p_value"] == pytest.approx(LEAST_P, abs=1e-12)
        assert rows[name]["p_value_holm"] == pytest.approx(3 * LEAST_P, abs=1e-12)
        assert rows[name]["significant"] is True
    assert rows["plain"]["significant"] is rows["plain"]["difference"] is None
    assert "gap_share" not in rows["plain"]
    assert [row[-2:] for row in lines_of(capsys, *folders, "--baseline", "plain")[2:]] == [
        ["+25.0 [25.0, 25.0]", "yes, p 0.0002"], ["-12.5 [-12.5, -12.5]", "yes, p 0.0002"],
        ["+0.0 [0.0, 0.0]", "no, p 1.0000"],
    ]


def test_p_value_between(tmp_path, capsys):
    """Fault: rows are drawn apart instead of in pairs, or a p value of one side.

    Two rows that differ by +0.5 and -0.25: a resample's mean is below 0 only where it holds the second twice: 1/4.
    """
    write_evaluation(tmp_path / "plain", [0.25, 0.75])
    write_evaluation(tmp_path / "kl", [0.75, 0.5])
    row = objects_of(capsys, tmp_path / "plain", tmp_path / "kl", "--baseline", "plain")["kl"]
    assert row["p_value"] == pytest.approx(0.5, abs=0.04)  # four standard deviations of 10,000 draws
    assert [row[key] for key in ("difference", "difference_low", "difference_high")] == [0.125, -0.25, 0.5]


@pytest.mark.parametrize(("p_values", "adjusted"), [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.7, 0.6], [1.0, 1.0]),
    ([0.02], [0.02]),
    ([], []),
])
def test_holm(p_values, adjusted):
    """Fault: Bonferroni (all times their number), ranks in the wrong order, values that fall again or pass 1."""
    assert holm(p_values) == pytest.approx(adjusted, abs=1e-15)


def test_holm_decides(tmp_path, capsys):
    """Fault: each comparison is judged as if it were the only one.

    One of 100 rows falls by 0.28 and the others rise by 0.01. A resample's mean is below 0 where it holds that row at
    least four times (4 * 0.28 > 96 * 0.01, 3 * 0.28 < 97 * 0.01), which happens as binomial(100, 0.01) says.
    """
    below = 1 - sum(math.comb(100, count) * 0.01**count * 0.99 ** (100 - count) for count in range(4))
    write_evaluation(tmp_path / "plain", [0.5] * 100)
    for name in "ab":
        write_evaluation(tmp_path / name, [0.22] + [0.51] * 99)
    folders = [tmp_path / name for name in ("plain", "a", "b")]
    alone = objects_of(capsys, *folders[:2], "--baseline", "plain")["a"]
    assert alone["p_value"] == pytest.approx(2 * below, abs=0.011)  # 2 * 0.0184; four standard deviations
    assert alone["p_value_holm"] == alone["p_value"] < 0.05 and alone["significant"] is True
    both = objects_of(capsys, *folders, "--baseline", "plain")
    for name in "ab":
        assert both[name]["p_value"] == alone["p_value"]
        assert both[name]["p_value_holm"] == 2 * alone["p_value"] > 0.05 and both[name]["significant"] is False
    text = shown(capsys, *folders, "--baseline", "plain")
    assert "significant (Holm, 5 %)" in text.splitlines()[0] and "Holm's correction for 2 comparisons" in text
    assert text.splitlines()[2].endswith(f"no, p {alone['p_value']:.4f}")


def test_rows_in_another_order(tmp_path, capsys):
    """Fault: rows are paired by their place in the file: here every difference is 0 by id and none by place."""
    rows = records([0.25, 0.5, 0.75])
    write_evaluation(tmp_path / "plain", [], rows=rows)
    write_evaluation(tmp_path / "kl", [], rows=rows[::-1])
    row = objects_of(capsys, tmp_path / "plain", tmp_path / "kl", "--baseline", "plain")["kl"]
    assert [row[key] for key in ("difference", "difference_low", "difference_high")] == [0.0] * 3


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


def test_different_counts(tmp_path, capsys):
    """Fault: scores of 2 and 3 rows are compared because nothing but their number is known."""
    plain, kl = write_evaluation(tmp_path / "plain", [0.5] * 2), write_scores(tmp_path / "kl", rows=3)
    assert "different rows: 3 rows and 2" in refusal(capsys, plain, kl, "--baseline", "plain")


def test_missing_predictions(tmp_path, capsys):
    """Fault: an error, or a significance out of nothing, where a run kept no predictions."""
    plain = write_run(tmp_path / "plain", test=[0.5, 0.5])
    kept = write_run(tmp_path / "kept", test=[0.75, 0.75])
    lost = write_run(tmp_path / "lost", keep=False, test=[0.75, 0.75])
    *table, remark = shown(capsys, plain, kept, lost, "--baseline", "plain").splitlines()
    assert table[2].endswith("yes, p 0.0002") and table[3].split()[-1] == "unknown"
    assert remark.startswith("significance unknown: no predictions of lost (") and "save_predictions" in remark
    assert "for 1 comparison" in table[-1]
    rows = objects_of(capsys, plain, kept, lost, "--baseline", "plain")
    assert (rows["lost"]["significant"], rows["lost"]["difference"]) == (None, None)
    assert rows["kept"]["p_value_holm"] == rows["kept"]["p_value"]


def test_missing_predictions_of_the_baseline(tmp_path, capsys):
    """Fault: a traceback where the rows of the baseline itself are unknown."""
    plain = write_run(tmp_path / "plain", keep=False, test=[0.5])
    kl = write_run(tmp_path / "kl", test=[0.75])
    main([str(plain), str(kl), "--baseline", "plain", "--format", "csv"])
    output = capsys.readouterr()
    assert "no predictions of plain (" in output.err and len(output.err.splitlines()) == 1
    assert output.out.splitlines()[2].endswith(",,,,,,")


@pytest.mark.parametrize("content", [
    "[{", "{}", "[3]", "[{}]", "\udcff", json.dumps(records([0.5])), json.dumps(records([0.5, 0.75])),
    json.dumps(records([0.5, 0.5], id=3)),
    json.dumps(records([0.5, 0.5], rouge={"rougeL": None})), json.dumps(records([0.5, float("nan")])),
])
def test_broken_predictions(tmp_path, capsys, content):
    """Fault: a traceback, or a significance from rows that are not those behind the scores."""
    plain = write_evaluation(tmp_path / "plain", [0.5, 0.5])
    kl = write_evaluation(tmp_path / "kl", [0.5, 0.5])
    (kl / "predictions.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    error = refusal(capsys, plain, kl, "--baseline", "plain")
    assert str(kl / "predictions.json") in error and "validate_model.py" in error
    assert shown(capsys, plain, kl)  # not read where nothing is asked of it


def test_row_twice(tmp_path, capsys):
    """Fault: of two rows of one id the first vanishes, and the user is not told which row that is."""
    plain, kl = (write_evaluation(tmp_path / name, [0.5, 0.5]) for name in ("plain", "kl"))
    (kl / "predictions.json").write_text(json.dumps(records([0.5, 0.5], id="same")))
    assert "row 2 lacks an id of its own" in refusal(capsys, plain, kl, "--baseline", "plain")
