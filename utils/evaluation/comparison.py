"""Comparison of scored runs: differences to a baseline and their significance, share of the gap to a teacher."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.rouge import METRICS
from utils.evaluation.statistics import holm, paired_bootstrap
from utils.evaluation.weights import weights_of
from utils.metrics_file import read_metrics
from utils.text import printable, shorten

LEVEL = 0.05
# What scores.json records of how the scored texts were generated, and from what.
DECODING = ("max_generation_length", "num_beams", "early_stopping", "prompt_template", "prompt_max_length", "precision")
ARTICLES = "articles_sha256"
DIFFERENCE_KEYS = ("difference", "difference_low", "difference_high", "p_value", "p_value_holm", "significant")


class CompareError(UserError):
    """Folders that cannot be compared; the message names file, row and remedy."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one set of articles.

    row: its row of the table. predictions: the file with the scores of each article; predictions_sha256: None if not
    recorded. origin: how its texts came about, by the keys DECODING and ARTICLES. remedy: the command that scores it
    again. missing_weights: a remark, if the weights that were scored are gone.
    """

    row: dict
    predictions: Path
    predictions_sha256: str | None
    origin: dict
    remedy: str
    missing_weights: str | None

    @property
    def name(self) -> str:
        return self.row["method"]


# -- reading -------------------------------------------------------------------------------------------------------


def read_evaluation(name: str, folder: Path) -> Evaluation:
    """The scores in the output_dir of validate_model.py or of a training script (its test set, else its validation).

    Raises:
        CompareError: scores.json is missing, or is something else.
    """
    path = folder / "scores.json"
    in_training = (folder / "model_checkpoints").is_dir()  # whose scores validate_model.py does not overwrite
    remedy = f"validate_model.py --output_dir {folder / 'evaluation' if in_training else folder}"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if "step" in content:  # of a training
            checkpoint, set_name = f"step-{content['step']}", "test" if "test" in content else "validation"
            scores, predictions = content[set_name], f"predictions/{set_name}-{checkpoint}.json"
            model, metrics = folder / "model_checkpoints" / checkpoint, folder / "metrics.jsonl"
        else:
            settings = content.get("settings") or {}
            scores, predictions, set_name = content, "predictions.json", Path(settings.get("csv_path", "")).stem
            model = Path(settings.get("model_path") or "")
            metrics = model.parent.parent / "metrics.jsonl" if model.parent.name == "model_checkpoints" else None
        missing = missing_weights(name, content.get("weights") or {}, model, remedy)
        if missing and "step" not in content:
            metrics = None  # may be that of another training
        row = {"method": name, "set": printable(set_name) or None, **table_row(scores),
               "tokens_per_second": training_speed(metrics)}
        predictions_sha256 = content.get("predictions_sha256", {}).get(predictions)
        return Evaluation(row, folder / predictions, predictions_sha256, origin_of(scores), remedy, missing)
    except OSError as error:
        raise CompareError(f"{path} cannot be read ({error.strerror}): write it with {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompareError(f"{path} is not a scores.json of validate_model.py or of a training script: write it again "
                           f"with {remedy}") from error


def table_row(scores: dict) -> dict:
    """Numbers of a scores.json, fractions of 1. Raises KeyError, TypeError or ValueError if they are something else."""
    row = {}
    for metric in METRICS:
        low, high = map(float, scores["confidence_intervals"][metric])
        row |= {metric: float(scores[metric]), f"{metric}_low": low, f"{metric}_high": high}
    if scores["rows"] < 1:
        raise ValueError("no rows")
    return {**row, "facts": scores.get("facts"), "rows": scores["rows"], "parameters": scores.get("parameters")}


def missing_weights(name: str, weights: dict, model: Path, remedy: str) -> str | None:
    """A remark if the weights that were scored are no longer there."""
    with suppress(OSError):
        if weights.get("sha256") in (None, weights_of(weights.get("path") or model)["sha256"]):
            return None
    at = model if weights.get("step") is None else f"step {weights['step']}, {model}"
    return printable(f"the weights behind {name} ({at}) are no longer there, deleted or replaced since: score what is "
                     f"there now with {remedy}")


def origin_of(scores: dict) -> dict:
    settings = scores.get("settings") or {}
    found = {**settings, **scores}  # of a key in both, scores hold what was used
    keys = [] if settings.get("model_path") == "lead-3" else list(DECODING)
    if found.get("num_beams") == 1 and keys:
        keys.remove("early_stopping")  # no effect on greedy decoding
    return {key: found.get(key) for key in (*keys, ARTICLES)}


def training_speed(metrics: Path | None) -> float | None:
    """Median tokens per second of a training; the first value includes the warm-up and counts only if alone."""
    if metrics is None or not metrics.is_file():
        return None
    found = [line.get("tokens_per_second") for line in read_metrics(metrics)[0] if line["split"] == "train"]
    speeds = [speed for speed in found if isinstance(speed, float | int)]
    return statistics.median(speeds[1:] or speeds) if speeds else None


def read_predictions(evaluation: Evaluation, metric: str) -> dict[str, tuple[str, float]] | None:
    """{id: (target, score)} behind an evaluation, in the file's order; None if no predictions were saved.

    Raises:
        CompareError: they are not those behind the evaluation's scores.
    """
    path, remedy = evaluation.predictions, f"write it again with {evaluation.remedy}"
    if not path.is_file():
        return None
    content = path.read_bytes()
    if evaluation.predictions_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise CompareError(f"{path} is not the file behind the scores.json of {evaluation.name} (other SHA-256): "
                           f"{remedy}")
    try:
        records = json.loads(content)
        rows = {record["id"]: (record["target_highlight"], float(record["rouge"][metric])) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{path} does not hold predictions ({shorten(repr(error))}): {remedy}") from error
    count, expected = evaluation.row["rows"], evaluation.row[metric]
    if not len(rows) == len(records) == count or not (
            abs(statistics.fmean(score for _, score in rows.values()) - expected) < 1e-6):
        raise CompareError(f"{path} does not hold the rows behind the scores.json of {evaluation.name}: {remedy}")
    return rows


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(
    evaluations: Sequence[Evaluation], metric: str = "rougeL", teacher: str | None = None, baseline: str | None = None
) -> tuple[list[dict], list[str]]:
    """(rows of the table, remarks of one line each).

    With a baseline every other row has `difference` (its mean minus the baseline's), `difference_low` and `_high`
    (95 %), `p_value`, `p_value_holm` and `significant` (p_value_holm <= 0.05); with a teacher also `gap_share`.

    Raises:
        CompareError: two rows were scored on different articles, or a file cannot be used.
    """
    rows = [dict(evaluation.row) for evaluation in evaluations]
    remarks = [*origin_remarks(evaluations), *filter(None, (evaluation.missing_weights for evaluation in evaluations))]
    if baseline is not None:
        remarks += add_differences(rows, evaluations, metric, baseline)
    if teacher is not None:
        remarks += add_gap_shares(rows, metric, teacher, baseline)
    return rows, remarks


def origin_remarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """What was decoded differently, scored on different articles, or does not say so."""
    remarks, unknown = [], set()
    for key in (*DECODING, ARTICLES):
        names: dict[str, list[str]] = {}
        for evaluation in evaluations:
            if key in evaluation.origin:
                names.setdefault(json.dumps(evaluation.origin[key]), []).append(evaluation.name)
        unrecorded = names.pop("null", [])
        unknown |= set(unrecorded if names else [])
        if len(names) > 1:
            what = "scored on different articles" if key == ARTICLES else "decoded differently"
            values = [f"{value[1:9] if key == ARTICLES else shorten(value)} ({', '.join(rows)})"
                      for value, rows in names.items()]
            remarks.append(f"{what}: {key} {', '.join(values)}")
    if unknown:
        names = ", ".join(evaluation.name for evaluation in evaluations if evaluation.name in unknown)
        remarks.append(f"not recorded: how {names} was decoded, or on which articles (written by an older version)")
    return remarks


def add_differences(rows: list[dict], evaluations: Sequence[Evaluation], metric: str, baseline: str) -> list[str]:
    """Adds what `compare` says to every row; None if predictions are missing. Returns remarks."""
    scores = {evaluation.name: read_predictions(evaluation, metric) for evaluation in evaluations}
    other, base = next(one for one in evaluations if one.name == baseline), scores[baseline]
    compared = []
    for row, evaluation in zip(rows, evaluations, strict=True):
        name, own = evaluation.name, scores[evaluation.name]
        row |= dict.fromkeys(DIFFERENCE_KEYS)
        if problem := first_difference(evaluation, own, other, base):
            raise CompareError(f"{name} and {baseline} were scored on different rows: {problem}: score both on one "
                               f"CSV, or leave {name} out")
        if own is not None and base is not None and name != baseline:
            result = paired_bootstrap([own[row_id][1] for row_id in base], [score for _, score in base.values()])
            row |= zip(DIFFERENCE_KEYS, (result["difference"], *result["interval"], result["p_value"]), strict=False)
            compared.append(row)
    for row, adjusted in zip(compared, holm([row["p_value"] for row in compared]), strict=True):
        row |= {"p_value_holm": adjusted, "significant": adjusted <= LEVEL}
    missing = ", ".join(name for name, own in scores.items() if own is None)
    return [f"significance unknown: no predictions of {missing} (validate_model.py writes them, training with "
            "trainer_kwargs.save_predictions)"] if missing else []


def first_difference(one: Evaluation, scores: dict | None, other: Evaluation, base: dict | None) -> str | None:
    """How the scored articles differ, if they do: the first id that only one of them has, or whose targets differ."""
    if scores is None or base is None:
        if one.row["rows"] != other.row["rows"]:
            return f"{one.row['rows']} rows and {other.row['rows']}"
        digests = {one.origin[ARTICLES], other.origin[ARTICLES]} - {None}
        return "other articles or targets" if len(digests) > 1 else None
    for row_id in (*base, *scores):
        if row_id not in scores or row_id not in base:
            return f"id {shorten(row_id)} is only in {other.name if row_id in base else one.name}"
        if scores[row_id][0] != base[row_id][0]:
            return f"the targets of id {shorten(row_id)} differ"
    return None


def add_gap_shares(rows: list[dict], metric: str, teacher: str, baseline: str) -> list[str]:
    """`gap_share` of every other row: (method - baseline) / (teacher - baseline). Returns remarks."""
    scores = {row["method"]: row[metric] for row in rows}
    gap = scores[teacher] - scores[baseline]
    for row in rows:
        defined = gap > 0 and row["method"] not in (teacher, baseline)
        row["gap_share"] = (row[metric] - scores[baseline]) / gap if defined else None
    return [] if gap > 0 else [f"gap: empty, because {teacher} is not above {baseline} in {metric}"]
