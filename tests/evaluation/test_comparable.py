# ruff: noqa: F811 (fixtures of the other file)
"""utils.compare says which rows were decoded differently, or scored on different articles."""

import json

import pytest

import validate_model
from model.loading import load_language_model
from tests import small_runs
from tests.conftest import write_rows
from tests.evaluation.test_validate_model import folder, run, write_news  # noqa: F401
from tests.score_folders import shown, write_scores

# What validate_model.py records of a greedy run.
GREEDY = {"max_generation_length": 80, "num_beams": 1, "early_stopping": False, "prompt_template": None,
          "precision": "auto", "model_path": "m", "csv_path": "test.csv"}
DECODED = {"prompt_template": "{article} =>", "prompt_max_length": 128, "precision": "float32",
           "articles_sha256": "1a2b3c4d" * 8}


def decoded(path, settings: dict | None = None, **changes):
    """A folder as validate_model.py leaves it, with some of what it records changed."""
    return write_scores(path, **{**DECODED, "settings": {**GREEDY, **(settings or {})}, **changes})


def remarks(capsys, *folders) -> list[str]:
    starts = ("decoded differently", "scored on different", "not recorded")
    return [line for line in shown(capsys, *folders).splitlines() if line.startswith(starts)]


@pytest.mark.parametrize(("settings", "recorded", "lines"), [
    ({"max_generation_length": 24}, {}, ["max_generation_length 80 (a, b), 24 (c)"]),
    ({}, {"prompt_template": "{article}\n\x1b"}, ['prompt_template "{article} =>" (a, b), "{article}\\n\\u001b" (c)']),
    ({}, {"prompt_max_length": 64}, ["prompt_max_length 128 (a, b), 64 (c)"]),
    ({}, {"precision": "bfloat16"}, ['precision "float32" (a, b), "bfloat16" (c)']),
    ({"max_generation_length": 2, "num_beams": 2}, {},
     ["max_generation_length 80 (a, b), 2 (c)", "num_beams 1 (a, b), 2 (c)"]),
])
def test_rows_decoded_differently(tmp_path, capsys, settings, recorded, lines):
    """Fault: 2 and 24 new tokens and 4 beams in one table, with p values and without a remark."""
    folders = [decoded(tmp_path / "a"), decoded(tmp_path / "b"), decoded(tmp_path / "c", settings, **recorded)]
    assert remarks(capsys, *folders) == [f"decoded differently: {line}" for line in lines]
    assert remarks(capsys, *folders[:2]) == []


# -- what the scripts record -----------------------------------------------------------------------------------------


def test_training_and_validation_record_the_same(tmp_path, capsys):
    """Fault: nobody can tell whether a training's scores and those of validate_model.py were decoded alike."""
    config = small_runs.make_project(tmp_path, rows=8)
    write_rows(tmp_path / "test.csv", [*small_runs.make_rows(3, seed=2), {"id": "", "article": "", "highlights": ""}])
    config = small_runs.changed(
        config, trainer_kwargs={"metrics": ["rouge"], "monitor_test": True},
        dataset_kwargs={"test_dataset": "test.csv", "on_bad_row": "skip", "max_length": 200},
        model_arch={"generation_kwargs": {"max_generation_length": 9, "num_beams": 2, "early_stopping": True}},
    )
    assert small_runs.run(tmp_path, config) == 0
    flags = ["--max_generation_length", "9", "--num_beams", "2", "--early_stopping", "--on_bad_row", "skip"]
    code, _, validated = run(tmp_path, tmp_path / "run/model_checkpoints/last", tmp_path / "test.csv", *flags)
    trained = json.loads((tmp_path / "run/scores.json").read_text())
    assert code == 0
    for key in ("prompt_template", "prompt_max_length", "precision", "articles_sha256"):
        assert trained["test"][key] == validated[key], key
        assert (trained["validation"][key] == validated[key]) == (key != "articles_sha256")
    assert trained["test"]["settings"] == trained["validation"]["settings"]
    assert trained["test"]["settings"].items() <= validated["settings"].items()
    assert len(trained["test"]["settings"]) == 4
    assert (validated["prompt_max_length"], validated["settings"]["max_generation_length"]) == (200, 9)
    capsys.readouterr()
    assert remarks(capsys, tmp_path / "run", tmp_path / "out") == []
    greedy = [*flags, "--num_beams", "1"]
    assert run(tmp_path, tmp_path / "run/model_checkpoints/last", tmp_path / "test.csv", *greedy)[0] == 0
    capsys.readouterr()
    assert remarks(capsys, tmp_path / "run", tmp_path / "out") == ["decoded differently: num_beams 2 (run), 1 (out)"]


def test_digest_of_articles_and_targets(tmp_path):
    """Fault: an article, a target or the order of rows changes and the digest does not; or it depends on ids."""
    digests = set()
    rows = [{"id": "1", "article": "Rain fell.", "highlights": "Rain."},
            {"id": "2", "article": "Snow.", "highlights": "S"}]
    variants = [rows, [rows[0] | {"article": "Rain fel."}, rows[1]], [rows[0] | {"highlights": "Ran."}, rows[1]],
                rows[::-1], rows[:1], [rows[0] | {"id": "3"}, rows[1]]]
    for number, variant in enumerate(variants):
        path = write_rows(tmp_path / f"{number}.csv", variant)
        digests.add(run(tmp_path, "lead-3", path)[2]["articles_sha256"])
    assert len(digests) == len(variants) - 1  # that of the last is that of the first


def test_length_that_the_model_records(tmp_path, folder):
    """Fault: a model trained to write 80 tokens is scored with 100, or a flag does not win over what is recorded."""
    model = load_language_model(str(folder))
    model.model.generation_config.max_new_tokens = 5
    model.save(tmp_path / "five")
    path = write_news(tmp_path / "news.csv", 2)

    def length(model_path, *flags: str) -> int | None:
        arguments = ["--csv_path", str(path), "--model_path", str(model_path), "--output_dir", str(tmp_path / "out")]
        assert validate_model.main([*arguments, *flags]) == 0
        return json.loads((tmp_path / "out/scores.json").read_text())["settings"]["max_generation_length"]

    assert [length(tmp_path / "five"), length(folder), length("lead-3")] == [5, 100, None]
    assert length(tmp_path / "five", "--max_generation_length", "7") == 7
