"""Config files, `--set`, the shipped recipe, schema and reference: utils/config/load.py, config_reference.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config_samples import (
    DEFAULTS,
    KD_ARCH,
    KD_KWARGS,
    KD_TRAINER,
    TEACHER,
    USERS_CONFIG,
    distillation,
    load,
    refusal,
)
from utils.config import reference as config_reference
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError, config_json, load_config, read_json, warnings_of
from utils.config.reference import END, START, markdown_reference, reference, schema

ROOT = Path(__file__).resolve().parent.parent

# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{\n  "trainer_kwargs": {"epochs": 3,}\n}',
         "line 2, column {}: a comma before the closing bracket: remove it"),
        ('{"trainer_kwargs": {} // mine\n}',
         'line 1, column 23: JSON has no comments: write a "_description" key instead'),
        ("{'epochs': 1}", "line 1, column 2: single quotes: write \"...\""),
        ('{"a": True}', "line 1, column 7: True: write true"),
        ('{"a" 1}', "line 1, column 6: expecting ':' delimiter"),
        ("", "line 1, column 1: the file is empty: write {{}} for the defaults"),
        ('{"trainer_kwargs": {"epochs": 1, "epochs": 2}}',
         'the key "epochs" stands twice in one object: keep one of them'),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 50 levels: make it flatter"),
        ("[" * 100_000, "nested deeper than 50 levels: make it flatter"),
        ('{"seed": ' + "9" * 5000 + "}", "99999999999999999... is a number of 5000 digits: write a shorter one"),
    ],
)
def test_broken_json(tmp_path, text, line):
    """A syntax error without its place, a key given twice of which one silently wins, or a traceback."""
    columns = (33, 34)  # of the comma (Python 3.13), of the bracket after it (before)
    assert refusal(tmp_path, text)[0] in [f"config.json: {line.format(column)}" for column in columns]


def test_files_that_cannot_be_read(tmp_path):
    """A missing, binary or odd file ends in a traceback, or without the way out."""
    with pytest.raises(ConfigError, match=r"nope\.json does not exist: .*--config.*\./demo\.sh[^\n]*$"):
        load_config(tmp_path / "nope.json")
    with pytest.raises(ConfigError, match=r"cannot be read: .*--config"):
        load_config(tmp_path)
    (tmp_path / "latin.json").write_bytes('{"_description": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.json: byte 19 is not UTF-8 text: save the file as UTF-8$"):
        load_config(tmp_path / "latin.json")
    with pytest.raises(ConfigError, match=r"config\.json holds a list: expected an object, \{\.\.\.\}$"):
        load(tmp_path, "[]")


def test_byte_order_mark_schema_line_and_free_text(tmp_path):
    """What editors add (a byte order mark, `$schema`) or people note (`_description...`, anywhere) is refused."""
    noted = {
        "$schema": "config.schema.json", "_description": 1, "_description_2": [{"_description": None}],
        "optimizer_kwargs": {"_description": "a", "kwargs": {"_description_decay": "b", "weight_decay": 0.1}},
        "model_arch": {"architecture": {"_description": {}}, "generation_kwargs": {"_descriptions": 0}},
        "dataset_kwargs": {"columns": {"_description": "c", "article": "text"}},
    }
    config = load(tmp_path, "\ufeff" + json.dumps(noted))
    assert config.optimizer_kwargs.kwargs == {"weight_decay": 0.1}
    assert config.model_arch.architecture == {} and config.dataset_kwargs.columns["article"] == "text"


def test_schema_line_only_at_the_top(tmp_path):
    """`$schema` inside a section hides a real mistake."""
    lines = refusal(tmp_path, {"trainer_kwargs": {"$schema": "x"}})
    assert len(lines) == 1 and lines[0].startswith("config.json: trainer_kwargs.$schema is unknown: ")


@pytest.mark.parametrize("content", [{}, USERS_CONFIG, json.loads((ROOT / "config.json").read_text(encoding="utf-8"))])
def test_round_trip(tmp_path, content):
    """The config.json of a run folder does not repeat the run: a value is lost, changed or refused."""
    config = load(tmp_path, content)
    text = config_json(config)
    assert text.endswith("}\n") and text.startswith("{\n  ")
    assert load(tmp_path, text) == config and warnings_of(load(tmp_path, text)) == warnings_of(config)


# -- overrides ---------------------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    """A --set value is not parsed as JSON, breaks on "=" or on a missing section, or loses to the file."""
    config = load(
        tmp_path,
        {"trainer_kwargs": {"epochs": 3, "seed": 5}, "_description": "x"}, "trainer_kwargs.epochs=4",
        "trainer_kwargs.epochs=5", "callbacks_kwargs.kwargs.patience=3", "model_arch.lang_model=runs/a=b c",
        "trainer_kwargs.metrics=[]", "optimizer_kwargs.kwargs={\"weight_decay\": 0.1}",
        "optimizer_kwargs.kwargs.amsgrad=true", "trainer_kwargs.gradient_clipping=null", 'model_arch.tokenizer="7"',
        "dataset_kwargs.columns.article=text", "trainer_kwargs._description=note",
    )
    trainer = config.trainer_kwargs
    assert (trainer.epochs, trainer.seed, trainer.metrics, trainer.clip_norm) == (5, 5, [], None)
    assert config.callbacks_kwargs.kwargs.patience == 3
    assert (config.model_arch.lang_model, config.model_arch.tokenizer) == ("runs/a=b c", "7")
    assert config.optimizer_kwargs.kwargs == {"weight_decay": 0.1, "amsgrad": True}
    assert config.dataset_kwargs.columns["article"] == "text"


def test_override_errors_name_the_override(tmp_path):
    """The user looks for the mistake in the file, while it is on the command line (or the other way round)."""
    lines = refusal(
        tmp_path,
        {"trainer_kwargs": {"epochs": 0, "multi_gpu_ids": []}, "extra": {}}, "trainer_kwargs.multi_gpu_ids=[0, -1]",
        "optimizer_kwargs.lm_lr=fast", "optimizer_kwargs.lm_lr=5e-5x",
        "trainer_kwargs.epoch=3", "foo.bar=1", "extra.b=1",
    )
    assert sorted(lines) == [
        "--set foo.bar=1: foo is unknown: did you mean model_arch?",
        '--set optimizer_kwargs.lm_lr=5e-5x: optimizer_kwargs.lm_lr is "5e-5x" (a string): expected a number greater '
        "than 0",
        "--set trainer_kwargs.epoch=3: trainer_kwargs.epoch is unknown: did you mean epochs?",
        "--set trainer_kwargs.multi_gpu_ids=[0, -1]: trainer_kwargs.multi_gpu_ids[1] is -1: expected a whole number of "
        "at least 0",
        "config.json: extra is unknown: did you mean trainer_kwargs?",
        "config.json: trainer_kwargs.epochs is 0: expected a whole number of at least 1",
    ]


def test_overrides_that_say_nothing(tmp_path):
    """A --set without "=", without a name or through a number ends in a traceback, or is ignored."""
    form = "expected section.key=value, such as trainer_kwargs.epochs=3"
    assert refusal(
        tmp_path,
        {"trainer_kwargs": {"epochs": 3}}, "epochs", "=3", "a..b=3", "trainer_kwargs.epochs.x=3",
        'trainer_kwargs={"seed": 1, "seed": 2}',
    ) == [
        f"--set epochs: {form}", f"--set =3: {form}", f"--set a..b=3: {form}",
        "--set trainer_kwargs.epochs.x=3: trainer_kwargs.epochs is 3, which has no keys: set trainer_kwargs.epochs "
        "itself",
        '--set trainer_kwargs={"seed": 1, "seed": 2}: the key "seed" stands twice in one object: keep one of them',
    ]


# -- what is shipped and generated -------------------------------------------------------------------------------


def test_shipped_config_is_the_recipe():
    """The shipped config.json is not the recipe that is documented, or does not load."""
    config = load_config(ROOT / "config.json")
    arch, trainer, data = config.model_arch, config.trainer_kwargs, config.dataset_kwargs
    assert (arch.lang_model, trainer.output_dir, data.cache_dir) == (
        "gpt2-medium", "runs/gpt2-medium-cnn", "data/token_cache")
    assert (arch.generation_kwargs.max_generation_length, arch.generation_kwargs.num_beams) == (80, 1)
    assert (data.data_dir, data.train_dataset, data.validation_dataset, data.validation_subset, data.test_dataset) == (
        "data/cnn_dailymail", "train.csv", "validation.csv", "validation_subset.csv", "test.csv")
    assert (data.train_batch_size, trainer.accumulation_steps, data.tokens_per_batch) == (2, 16, None)
    assert trainer.epochs == 3
    assert (config.optimizer_kwargs.type, config.optimizer_kwargs.kwargs) == ("AdamW", {"weight_decay": 0.1})
    assert config.optimizer_kwargs.lm_lr == 5e-5 and trainer.save_predictions
    assert (config.callbacks_kwargs.kwargs.patience, config.monitored_metric) == (2, "loss")
    assert warnings_of(config) == []


def test_shipped_distillation_config_is_the_recipe():
    """Fault: config_kd.json is not the documented recipe, does not load, or does not continue config.json."""
    config, teacher = load_config(ROOT / "config_kd.json", (), DistillConfig), load_config(ROOT / "config.json")
    arch, trainer, kwargs = config.model_arch, config.trainer_kwargs, config.distillation_kwargs
    assert trainer.teacher_ckpt_path == "runs/gpt2-medium-cnn/model_checkpoints/best"
    assert trainer.teacher_ckpt_path == f"{teacher.trainer_kwargs.output_dir}/model_checkpoints/best"
    assert (arch.student_lang_model, arch.teacher_gpu_device_id, arch.student_gpu_device_id) == ("gpt2", 0, 0)
    assert (kwargs.kl_div, kwargs.kd_weight, kwargs.temperature, kwargs.teacher_cache) == ("forward", 0.5, 1.0, None)
    assert trainer.output_dir != teacher.trainer_kwargs.output_dir
    rows = config.dataset_kwargs.train_batch_size * trainer.accumulation_steps
    assert rows == teacher.dataset_kwargs.train_batch_size * teacher.trainer_kwargs.accumulation_steps == 32
    assert config.dataset_kwargs == teacher.dataset_kwargs.model_copy(update={"train_batch_size": 4})
    assert warnings_of(config) == []


def test_schema_and_reference_are_in_step():
    """A schema or docs/config.md lags behind utils/config/fine_tune.py or utils/config/distill.py."""
    assert json.loads((ROOT / "config.schema.json").read_text(encoding="utf-8")) == schema()
    assert json.loads((ROOT / "config_kd.schema.json").read_text(encoding="utf-8")) == schema(DistillConfig)
    between = (ROOT / "docs/config.md").read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert between.strip() == reference().strip()


def test_every_key_is_explained():
    """A key in the reference has no meaning, type or default, or a "|" or newline breaks its table."""
    rows = [line for line in markdown_reference().splitlines() if line.startswith("| `")]
    cells = [row.replace("\\|", "").strip("|").split("|") for row in rows]
    names = [row[0].strip(" `") for row in cells]
    flat = [key for section in DEFAULTS.values() for key, value in section.items()
            if key not in ("generation_kwargs",) and not (key == "kwargs" and "patience" in value)]
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in cells)
    assert set(flat) <= set(names) and {"kwargs.patience", "generation_kwargs.num_beams"} <= set(names)
    expected = "| `lm_lr` | number greater than 0 | `5e-05` | peak learning rate of the language model |"
    assert expected in rows


def test_editors_accept_what_we_accept():
    """The schema marks `$schema`, free text or a shipped config as wrong in an editor, or lets a wrong key pass."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; pydantic alone was tested")
    validator = jsonschema.Draft202012Validator(schema())
    shipped = [read_json(path) for path in (ROOT / "config.json", *(ROOT / "demo").glob("train*.json"))]
    columns = {"dataset_kwargs": {"columns": {"_description": 3, "id": None}}}
    architecture = {"model_arch": {"architecture": {"_description": [], "n_layer": 2}}}
    for good in (*shipped, USERS_CONFIG, {}, columns, architecture):
        assert [error.message for error in validator.iter_errors(good)] == []
    for bad in ({"a": 1}, {"trainer_kwargs": {"epoch": 1}}, {"dataset_kwargs": {"columns": {"x": "y"}}},
                {"optimizer_kwargs": {"lm_lr": "5e-5"}}, {"trainer_kwargs": {"loss_scaling_batch": 0}}):
        assert list(validator.iter_errors(bad))


@pytest.mark.parametrize(
    ("model", "count"),
    [(FineTuneConfig, 12),  # the file, its 6 sections, 2 inner ones, and 3 objects of free keys
     (DistillConfig, 14)],  # two sections more: distillation_kwargs, and its teacher_cache
)
def test_every_object_of_the_schema_has_free_text(model, count):
    """One level of the schema refuses `_description` keys, so an editor underlines them there."""
    tree = schema(model)
    assert tree["properties"]["$schema"]["type"] == "string"

    def objects(node):
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for child in node.values():
                yield from objects(child)

    found = list(objects(tree))
    assert len(found) == count
    assert all(node["patternProperties"] == {"^_description": {}} for node in found)


def test_reference_is_written_and_checked(tmp_path, capsys):
    """The generator spoils the text around the reference, is never content, or --check says nothing or too much."""
    run = config_reference.main
    assert run(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == [
        "out of date: config.schema.json, config_kd.schema.json; run python -m utils.config.reference"]
    page = tmp_path / "docs/config.md"
    page.parent.mkdir()
    page.write_text(f"# Title\n{START}\nold\n{END}\nrest\n", encoding="utf-8")
    assert run([], tmp_path) == 0 and run(["--check"], tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n{START}\n") and text.endswith(f"{END}\nrest\n")
    assert "`lm_lr`" in text and "`lambda`" in text
    page.write_text(text.replace("lm_lr", "lr"), encoding="utf-8")
    capsys.readouterr()
    assert run(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == [
        "out of date: docs/config.md; run python -m utils.config.reference"]
    page.write_text("# no markers\n", encoding="utf-8")
    assert run(["--check"], tmp_path) == 1 and len(capsys.readouterr().err.splitlines()) == 1


def test_editors_accept_a_distillation_config():
    """Fault: the schema marks a good config_kd.json as wrong in an editor, or lets a key of config.json pass."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; pydantic alone was tested")
    validator = jsonschema.Draft202012Validator(schema(DistillConfig))
    cache = distillation(teacher_cache={"_description": 1, "kind": "top_k"}, **{"lambda": 0.2})
    for good in (read_json(ROOT / "config_kd.json"), TEACHER, cache):
        assert [error.message for error in validator.iter_errors(good)] == []
    for bad in ({"model_arch": {"lang_model": "x"}}, distillation(lambda_=0.2), distillation(teacher_cache="hidden"),
                distillation(**{"lambda": 1}), distillation(temperature=0)):
        assert list(validator.iter_errors(bad))


def test_reference_lists_what_differs_and_nothing_twice():
    """Fault: a key of config_kd.json is in no table of docs/config.md, is in two, or its section is not in full."""
    between = (ROOT / "docs/config.md").read_text(encoding="utf-8").split(START)[1].split(END)[0]
    first, second = between.split("\n## `config_kd.json` (`train_kd.py`)\n")
    found = {section.split("`")[0]: [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
             for section in second.split("\n### `")[1:]}
    generation = ["max_generation_length", "num_beams", "early_stopping"]
    arch = [key for key in KD_ARCH if key != "generation_kwargs"]
    cache = [f"teacher_cache.{key}" for key in ("kind", "top_k", "dtype", "dir")]
    kwargs = list(KD_KWARGS)
    after = kwargs.index("teacher_cache") + 1
    assert found == {
        "model_arch": [*arch, *(f"generation_kwargs.{key}" for key in generation)],
        "trainer_kwargs": list(KD_TRAINER),
        "distillation_kwargs": [*kwargs[:after], *cache, *kwargs[after:]],
    }
    assert "distillation_kwargs" not in first and "`lang_model`" not in second


def test_configs_need_no_torch():
    """A mistyped key is told only after seconds of importing torch."""
    code = "import sys, utils.config.load, utils.config.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
