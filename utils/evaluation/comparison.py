"""The numbers of a comparison: scores of several runs, share of the teacher-student gap, significance."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.config.load import parse, show
from utils.evaluation.rouge import METRICS, paired_bootstrap
from utils.evaluation.weights import weights_of
from utils.files import finish_writing
from utils.runs.run_log import split_lines
from utils.runs.seal import is_broken
from utils.text import printable, shorten

LEVEL = 0.05
MOST = 1e300
# What scores.json says of the texts that were scored: how they were generated, and from what.
DECODING = ("max_generation_length", "num_beams", "early_stopping", "prompt_template", "prompt_max_length", "precision")
ARTICLES, READING = "articles_sha256", "on_bad_row"
DIFFERENCE_KEYS = ("difference", "difference_low", "difference_high", "p_value", "p_value_holm", "significant")


class CompareError(ValueError):
    """Folders that cannot be compared: one line that names file, row and remedy."""


@dataclass(frozen=True)
class Evaluation:
    """One row of the table.

    scores: means, intervals and counts, checked. set_name: "validation" or "test" of a training run, the stem of the
    CSV of validate_model.py (None where its scores.json does not say). predictions: where the scores of each row are;
    predictions_sum: their SHA-256, None where scores.json does not say.
    metrics: the metrics.jsonl of the training, None where no run is known. remedy: what would write the folder anew.
    gone: a remark, where the weights that were scored are no longer in their place.
    origin: those of DECODING, ARTICLES and READING that decided its texts, as JSON; None where scores.json lacks them.
    """

    name: str
    scores: dict
    set_name: str | None
    predictions: Path
    metrics: Path | None
    remedy: str
    origin: dict[str, str | None]
    predictions_sum: str | None = None
    gone: str | None = None


@dataclass(frozen=True)
class ScoredRow:
    """What of a prediction is needed to pair it: its target, and one F-measure (a fraction of 1)."""

    target: str
    score: float


# -- reading -----------------------------------------------------------------------------------------------------


def read_evaluation(name: str, folder: Path) -> Evaluation:
    """The scores in an output_dir of validate_model.py or of a training script (its test set, else its validation).

    Raises:
        CompareError: scores.json is not there, or is of another kind, or not whole.
    """
    path = folder / "scores.json"
    is_of_training = (folder / "model_checkpoints").is_dir()  # the scores of which validate_model.py leaves alone
    remedy = f"validate_model.py --output_dir {folder / 'evaluation' if is_of_training else folder}"
    with suppress(OSError):  # a folder that may only be read is read as it is
        finish_writing(folder)
    try:
        content = parse(path.read_bytes().decode("utf-8-sig"))
        if is_broken(content):
            raise CompareError(f"{path} was changed since it was written (other SHA-256): write it again with {remedy}")
        if "step" in content:
            step, set_name = whole(content["step"]), "test" if "test" in content else "validation"
            scores, metrics = content[set_name], folder / "metrics.jsonl"
            predictions = folder / "predictions" / f"{set_name}-step-{step}.json"
            model = folder / "model_checkpoints" / f"step-{step}"
        else:
            settings = content.get("settings") or {}
            model = settings.get("model_path")
            scores, metrics = content, metrics_of(model)
            set_name = printable(Path(settings["csv_path"]).stem) if "csv_path" in settings else None
            predictions = folder / "predictions.json"
        kept_sum = content.get("predictions_sha256", {}).get(predictions.relative_to(folder).as_posix())
        gone, weights = None, content.get("weights") or {}
        # A relative path may be of another working directory.
        found = digest_at(model) or digest_at(weights.get("path"))
        if weights.get("sha256") is not None and found != weights["sha256"]:
            place = model if weights["step"] is None else f"step {whole(weights['step'])}, {model}"
            gone = (f"the weights behind {name} ({place}) are no longer there, deleted or replaced since: score what "
                    f"is there now with {remedy}")
            if found is not None or "step" not in content:  # else an older step, deleted by the training that made it
                metrics = None
        if "step" in content:
            remedy += ", or train it with trainer_kwargs.save_predictions"
        return Evaluation(
            name, checked(scores), set_name, predictions, metrics, remedy, origin_of(scores), kept_sum, gone
        )
    except CompareError:
        raise
    except OSError as error:
        raise CompareError(f"{path} cannot be read ({error.strerror}): write it with {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kinds = "validate_model.py or of a training script"
        raise CompareError(f"{path} is not a scores.json of {kinds}: write it again with {remedy}") from error


def digest_at(model: object) -> str | None:
    """The SHA-256 of the weights at a path that a scores.json names; None where there are none, or none to be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return weights_of(model)["sha256"]
    return None


def checked(scores: dict) -> dict:
    """The scores. KeyError, TypeError, AttributeError or ValueError where the table could not show them."""
    for metric in METRICS:
        low, high = scores["confidence_intervals"][metric]
        number(scores[metric]), number(low), number(high)
    for key in ("facts", "parameters"):
        if scores.get(key) is not None:
            number(scores[key])
    if whole(scores["rows"]) < 1:
        raise ValueError("no rows")
    return scores


def origin_of(scores: dict) -> dict[str, str | None]:
    settings = scores.get("settings") or {}
    found = {**settings, **scores}  # beside the settings stands what became of them
    keys = [ARTICLES, READING]
    if settings.get("model_path") != "lead-3":  # which decodes nothing
        keys += [key for key in DECODING if key != "early_stopping" or found.get("num_beams") != 1]
    return {key: None if found.get(key) is None else json.dumps(found[key]) for key in keys}


def number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MOST:
        raise TypeError(f"{value!r} is not a number")  # NaN and infinities among them
    return value


def whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**15:
        raise TypeError("not a whole number, or too large")
    return value


def metrics_of(model_path: object) -> Path | None:
    """`<run>/metrics.jsonl` for a model `<run>/model_checkpoints/<x>`; None for a model of any other place."""
    checkpoints = Path(model_path).parent if isinstance(model_path, str) else Path()
    return checkpoints.parent / "metrics.jsonl" if checkpoints.name == "model_checkpoints" else None


def training_speed(metrics: Path | None) -> float | None:
    """Median of the tokens a second of a training; the first value holds the warming up and counts only if alone.

    Raises:
        CompareError: the file is there and cannot be read.
    """
    try:
        if metrics is None or not metrics.is_file():
            return None
        lines, damaged = split_lines(metrics.read_bytes())
        if damaged:
            raise ValueError(f"line {damaged[0]} is damaged")
        speeds = [number(line["tokens_per_second"]) for line in lines
                  if line["split"] == "train" and line.get("tokens_per_second") is not None]
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompareError(f"{metrics} cannot be read ({reason}): mend it, or move it away") from error
    return statistics.median(speeds[1:] or speeds) if speeds else None


def read_scored_rows(evaluation: Evaluation, metric: str) -> dict[str, ScoredRow] | None:
    """The rows behind an evaluation by id, in the file's order; None where no predictions were kept.

    Raises:
        CompareError: the file cannot be read, or its rows are not those behind the evaluation's scores.
    """
    path, remedy = evaluation.predictions, f"write it again with {evaluation.remedy}"
    rows: dict[str, ScoredRow] = {}
    try:
        text = path.read_bytes()
        if evaluation.predictions_sum not in (None, hashlib.sha256(text).hexdigest()):
            raise CompareError(f"{path} is not the file behind the scores.json of {evaluation.name} (other SHA-256): "
                               f"{remedy}")
        records = parse(text.decode("utf-8-sig"))
        if not isinstance(records, list):
            raise TypeError
        for record in records:
            row_id, target, score = record["id"], record["target_highlight"], number(record["rouge"][metric])
            if not isinstance(row_id, str) or not isinstance(target, str) or row_id in rows:
                raise TypeError
            rows[row_id] = ScoredRow(target, score)
    except CompareError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CompareError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except (KeyError, TypeError) as error:
        reason = f"row {len(rows) + 1} lacks an id of its own, target_highlight or rouge"
        raise CompareError(f"{path} holds no predictions of this project ({reason}): {remedy}") from error
    except ValueError as error:
        raise CompareError(f"{path} is not whole JSON ({shorten(str(error))}): {remedy}") from error
    same = len(rows) == evaluation.scores["rows"]
    if not same or abs(statistics.fmean(row.score for row in rows.values()) - evaluation.scores[metric]) > 1e-6:
        raise CompareError(f"{path} does not hold the rows behind the scores.json of {evaluation.name}: {remedy}")
    return rows


# -- whether the rows can be compared ------------------------------------------------------------------------------


def differing_origins(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[str]]:
    """(lines on rows that were decoded differently or are of different articles, remarks on what is not recorded)."""
    differing, unknown = {}, {}
    for key in (*DECODING, ARTICLES, READING):
        rows: dict[str | None, list[str]] = {}
        for each in evaluations:
            if key in each.origin:
                rows.setdefault(each.origin[key], []).append(each.name)
        missing = rows.pop(None, [])
        if len(rows) > 1:
            differing[key] = f"{key} " + ", ".join(f"{shown(key, value)} ({', '.join(rows[value])})" for value in rows)
        if rows:
            unknown[key] = missing
    known = {each.origin[ARTICLES] for each in evaluations}
    if len(known) == 1 and None not in known:
        differing.pop(READING, None)  # without effect: no row was bad
    decoding, articles = ([differing[key] for key in keys if key in differing]
                          for keys in (DECODING, (ARTICLES, READING)))
    lines = [f"decoded differently: {'; '.join(decoding)}"] if decoding else []
    if articles:
        what = "scored on different articles" if ARTICLES in differing else "articles read differently"
        lines.append(f"{what}: {'; '.join(articles)}")
    parts = []
    for keys, words in ((DECODING, "how {} was decoded"), ((ARTICLES, READING), "on which articles {} was scored")):
        lacking = {name for key in keys for name in unknown.get(key, ())}
        if names := [each.name for each in evaluations if each.name in lacking]:
            parts.append(words.format(", ".join(names)))
    return lines, [f"not recorded: {'; '.join(parts)} (written by an older version)"] if parts else []


def shown(key: str, value: str) -> str:
    return value[1:9] if key == ARTICLES else show(json.loads(value))  # the first digits tell enough


# -- derived numbers -----------------------------------------------------------------------------------------------


def compare(
    evaluations: Sequence[Evaluation], metric: str = "rougeL", teacher: str | None = None, baseline: str | None = None
) -> tuple[list[dict], list[str]]:
    """(one flat object for each evaluation, remarks of one line on what is missing).

    All shares and scores are fractions of 1, speeds tokens a second, absent numbers None. With a baseline each other
    row has `difference` (its mean minus the baseline's), `difference_low` and `_high` (95 %), `p_value`,
    `p_value_holm` and `significant` (p_value_holm <= 0.05); with a teacher too, `gap_share`.

    Raises:
        CompareError: a file cannot be read, or two rows were scored on different articles.
    """
    rows = [plain_numbers(evaluation) for evaluation in evaluations]
    remarks = [printable(each.gone) for each in evaluations if each.gone is not None]
    if teacher is not None:
        rows = [{**row, "gap_share": None} for row in rows]
    if baseline is not None:
        remarks += add_differences(rows, evaluations, metric, baseline)
    if teacher is not None:
        remarks += add_gap_shares(rows, metric, teacher, baseline)
    return rows, remarks


def plain_numbers(evaluation: Evaluation) -> dict:
    scores = evaluation.scores
    row = {"method": evaluation.name, "set": evaluation.set_name}
    for metric in METRICS:
        low, high = scores["confidence_intervals"][metric]
        row |= {metric: scores[metric], f"{metric}_low": low, f"{metric}_high": high}
    return {**row, "facts": scores.get("facts"), "rows": scores["rows"], "parameters": scores.get("parameters"),
            "tokens_per_second": training_speed(evaluation.metrics)}


def add_differences(rows: list[dict], evaluations: Sequence[Evaluation], metric: str, baseline: str) -> list[str]:
    """Difference, interval, p values and significance of each row but the baseline's. Remarks."""
    scored = {each.name: read_scored_rows(each, metric) for each in evaluations}
    counts = {row["method"]: row["rows"] for row in rows}
    compared = []
    for row in rows:
        name, row_count = row["method"], row["rows"]
        row |= dict.fromkeys(DIFFERENCE_KEYS)
        both_scored = scored[name] is not None and scored[baseline] is not None
        if both_scored:
            problem = first_difference(name, scored[name], baseline, scored[baseline])
        else:
            problem = f"{row_count} rows and {counts[baseline]}" if row_count != counts[baseline] else None
        if problem:
            remedy = f"score both on one CSV, or leave {name} out"
            raise CompareError(f"{name} and {baseline} were scored on different rows: {problem}: {remedy}")
        if both_scored and name != baseline:
            row |= paired(scored[name], scored[baseline])
            compared.append(row)
    for row, adjusted in zip(compared, holm([row["p_value"] for row in compared]), strict=True):
        row |= {"p_value_holm": adjusted, "significant": adjusted <= LEVEL}
    missing = [name for name, own_rows in scored.items() if own_rows is None]
    remedy = "validate_model.py writes them, training with trainer_kwargs.save_predictions"
    return [f"significance unknown: no predictions of {', '.join(missing)} ({remedy})"] if missing else []


def paired(rows: dict[str, ScoredRow], base_rows: dict[str, ScoredRow]) -> dict[str, float]:
    """Difference of the means over the same ids, its 95 % interval and p value."""
    result = paired_bootstrap(
        [{"score": rows[row_id].score} for row_id in base_rows],
        [{"score": base_row.score} for base_row in base_rows.values()],
        "score",
    )
    low, high = result["interval"]
    return {"difference": result["difference"], "difference_low": low, "difference_high": high,
            "p_value": float(result["p_value"])}


def first_difference(name: str, rows: dict[str, ScoredRow], base: str, base_rows: dict[str, ScoredRow]) -> str | None:
    """Which id is the first that only one of them has, or whose targets differ."""
    for row_id, base_row in base_rows.items():
        if row_id not in rows:
            return f"id {shorten(row_id)} is only in {base}"
        if rows[row_id].target != base_row.target:
            return f"the targets of id {shorten(row_id)} differ"
    return next((f"id {shorten(row_id)} is only in {name}" for row_id in rows if row_id not in base_rows), None)


def add_gap_shares(rows: list[dict], metric: str, teacher: str, baseline: str) -> list[str]:
    """`gap_share` of each row: (method - baseline) / (teacher - baseline), None for those two. Remarks.

    None too where nothing says that a row, or the teacher, was scored on the same articles as the baseline.
    """
    by_name = {row["method"]: row for row in rows}
    base, top = by_name[baseline], by_name[teacher]
    gap = top[metric] - base[metric]
    if gap <= 0:
        return [f"gap: empty, because {teacher} is not above {baseline} in {metric}"]
    elsewhere = [row["method"] for row in rows if row["difference"] is None and row["set"] != base["set"]]
    for row in rows:
        if row is not base and row is not top and not {row["method"], teacher} & set(elsewhere):
            row["gap_share"] = (row[metric] - base[metric]) / gap
    another = f"gap: empty where {', '.join(elsewhere)} would be compared with {baseline}, scored on another set"
    return [another] if elsewhere else []


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number, in the given order: Holm (1979), "A simple sequentially rejective multiple
    test procedure".
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted
