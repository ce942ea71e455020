"""Config files, `--set`, the shipped recipes, schema and reference: utils/config/load.py, utils/config/reference.py."""

import json
from pathlib import Path

import pytest

from tests.config_samples import (
    POLICY_KWARGS,
    TEACHER,
    USERS_CONFIG,
    distillation,
    load,
    refusal,
)
from tests.conftest import ROOT
from utils.config import reference
from utils.config.checks import warnings_of
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError, config_json, load_config, read_json
from utils.config.reference import END, START, schema

# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "trainer_kwargs": {"epochs": 3,}\n}', ["line 2 column 3"]),  # of the comma or of the bracket behind it
        ('{"trainer_kwargs": {} // mine\n}', ["line 1 column 23"]),
        ('{"a": True}', ["line 1 column 7"]),
        ("", ["line 1 column 1"]),
        ('{"trainer_kwargs": {"epochs": 1, "epochs": 2}}', ['"epochs"', "twice"]),
        ('{"a": ' + "9" * 5000 + "}", []),
        ("[]", ["object", "[]"]),
        ('{"a": ' + "[" * 5000, []),
        ('{"optimizer_kwargs": {"kwargs": ' + '{"a": ' * 600 + "1" + "}" * 602, ["nested too deeply"]),
        ('{"trainer_kwargs": 3}', ["trainer_kwargs: Input should be an object {...} (got 3)"]),
    ],
)
def test_broken_json(tmp_path, text, words):
    """Fault: a syntax error without its position, a key given twice of which one silently wins, or a traceback."""
    (line,) = refusal(tmp_path, text)
    assert line.startswith("config.json") and all(word in line for word in words)


def test_files_that_cannot_be_read(tmp_path):
    """Fault: a missing or binary file ends in a traceback, or without the way out."""
    for path in (tmp_path / "nope.json", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: .*--config.*\./demo\.sh[^\n]*$") as error:
            load_config(path)
        assert str(path) in str(error.value)
    (tmp_path / "latin.json").write_bytes('{"_description": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.json is not valid JSON: .*utf-8"):
        load_config(tmp_path / "latin.json")


def test_byte_order_mark_schema_line_and_free_text(tmp_path):
    """Fault: what editors add (byte order mark, `$schema`) or people note (`_description...`, anywhere) is refused."""
    noted = {
        "$schema": "config.schema.json", "_description": 1, "_description_2": [{"_description": None}],
        "optimizer_kwargs": {"_description": "a", "kwargs": {"_description_decay": "b", "weight_decay": 0.1}},
        "model_arch": {"architecture": {"_description": {}}, "generation_kwargs": {"_descriptions": 0}},
        "dataset_kwargs": {"columns": {"_description": "c", "article": "text"}},
    }
    text = json.dumps(noted).replace('"_description": 1', '"_description": 1, "_description": 2')
    config = load(tmp_path, "\ufeff" + text)
    assert config.optimizer_kwargs.kwargs == {"weight_decay": 0.1}
    assert config.model_arch.architecture == {} and config.dataset_kwargs.columns["article"] == "text"
    assert "trainer_kwargs.$schema is unknown" in refusal(tmp_path, {"trainer_kwargs": {"$schema": "x"}})[0]


@pytest.mark.parametrize(("content", "model"), [
    ({}, FineTuneConfig), (USERS_CONFIG, FineTuneConfig),
    (json.loads((ROOT / "config.json").read_text(encoding="utf-8")), FineTuneConfig),
    (json.loads((ROOT / "config_kd.json").read_text(encoding="utf-8")), DistillConfig),
    (distillation(teacher_cache={"kind": "top_k", "top_k": 5}, student_init="teacher_layers", student_layers=[0, 2]),
     DistillConfig),
    (distillation(method="policy_gradient", **POLICY_KWARGS, **{"lambda": 0.3}), DistillConfig),
])
def test_round_trip(tmp_path, content, model):
    """Fault: the config.json of a run folder does not repeat the run: a value is lost, changed or refused."""
    text = config_json(load(tmp_path, content, model=model))
    assert text.endswith("}\n") and text.startswith("{\n  ")
    assert config_json(load(tmp_path, text, model=model)) == text


# -- overrides ---------------------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    """Fault: a --set value is not parsed as JSON, breaks on "=" or on a missing section, or loses to the file."""
    config = load(
        tmp_path,
        {"trainer_kwargs": {"epochs": 3, "seed": 5}, "_description": "x"}, "trainer_kwargs.epochs=4",
        "trainer_kwargs.epochs=5", "callbacks_kwargs.kwargs.patience=3", "model_arch.lang_model=runs/a=b c",
        "trainer_kwargs.metrics=[]", 'optimizer_kwargs.kwargs={"weight_decay": 0.1}',
        "optimizer_kwargs.kwargs.amsgrad=true", "trainer_kwargs.gradient_clipping=null", 'model_arch.tokenizer="7"',
        "dataset_kwargs.columns.article=text", "trainer_kwargs._description=note",
    )
    trainer = config.trainer_kwargs
    assert (trainer.epochs, trainer.seed, trainer.metrics, trainer.gradient_clipping) == (5, 5, [], None)
    assert config.callbacks_kwargs.kwargs.patience == 3
    assert (config.model_arch.lang_model, config.model_arch.tokenizer) == ("runs/a=b c", "7")
    assert config.optimizer_kwargs.kwargs == {"weight_decay": 0.1, "amsgrad": True}
    assert config.dataset_kwargs.columns["article"] == "text"


def test_errors_name_file_or_override(tmp_path):
    """Fault: the user looks for a mistake in the file, while it is on the command line (or the other way round)."""
    lines = refusal(
        tmp_path, {"trainer_kwargs": {"epochs": 0, "multi_gpu_ids": []}}, "trainer_kwargs.multi_gpu_ids=[0, -1]",
        "optimizer_kwargs.lm_lr=fast", "optimizer_kwargs.lm_lr=5e-5x", "trainer_kwargs.epoch=3", "foo.bar=1",
    )
    assert sorted(line.split(": ")[:2] for line in lines) == [
        ["--set foo.bar=1", "foo is unknown"],
        ["--set optimizer_kwargs.lm_lr=5e-5x", "optimizer_kwargs.lm_lr"],
        ["--set trainer_kwargs.epoch=3", "trainer_kwargs.epoch is unknown"],
        ["--set trainer_kwargs.multi_gpu_ids=[0, -1]", "trainer_kwargs.multi_gpu_ids.1"],
        ["config.json", "trainer_kwargs.epochs"],
    ]


@pytest.mark.parametrize("text", ["epochs", "=3", "a..b=3", "trainer_kwargs.epochs.x=3"])
def test_overrides_that_cannot_be_applied(tmp_path, text):
    """Fault: a --set without "=", without a name or through a number ends in a traceback, or is ignored."""
    (line,) = refusal(tmp_path, {"trainer_kwargs": {"epochs": 3}}, text)
    assert f"--set {text}: " in line


# -- what is shipped and generated -------------------------------------------------------------------------------


def test_shipped_distillation_config_is_the_recipe():
    """Fault: config_kd.json is not the documented recipe, does not load, or does not continue config.json."""
    config, teacher = load_config(ROOT / "config_kd.json", (), DistillConfig), load_config(ROOT / "config.json")
    arch, trainer, kwargs = config.model_arch, config.trainer_kwargs, config.distillation_kwargs
    assert trainer.teacher_ckpt_path == "runs/gpt2-medium-cnn/model_checkpoints/best"
    assert trainer.teacher_ckpt_path == f"{teacher.trainer_kwargs.output_dir}/model_checkpoints/best"
    assert (arch.student_lang_model, arch.teacher_gpu_device_id, arch.student_gpu_device_id) == ("gpt2", 0, 0)
    assert (kwargs.kl_div, kwargs.kd_weight, kwargs.temperature, kwargs.teacher_cache) == ("forward", 0.5, 1.0, None)
    assert trainer.output_dir != teacher.trainer_kwargs.output_dir
    rows = config.dataset_kwargs.train_batch_size * trainer.gradient_accumulation_steps
    assert rows == teacher.dataset_kwargs.train_batch_size * teacher.trainer_kwargs.gradient_accumulation_steps == 32
    assert config.dataset_kwargs == teacher.dataset_kwargs.model_copy(update={"train_batch_size": 4})
    assert warnings_of(config) == []


def test_reference_is_written_and_checked(tmp_path, capsys):
    """Fault: the shipped schemas or docs/config.md are out of date, or the generator spoils what is around them."""
    assert reference.main(["--check"]) == 0
    page = tmp_path / "docs/config.md"
    page.parent.mkdir()
    page.write_text(f"# Title\n{START}\nold\n{END}\nrest\n", encoding="utf-8")
    assert reference.main(["--check"], tmp_path) == 1
    assert reference.main([], tmp_path) == 0 and reference.main(["--check"], tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n{START}\n") and text.endswith(f"{END}\nrest\n") and "`lm_lr`" in text
    page.write_text(text.replace("lm_lr", "lr"), encoding="utf-8")
    capsys.readouterr()
    assert reference.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == [
        "out of date: docs/config.md; run python -m utils.config.reference"]


@pytest.mark.parametrize(("model", "good", "bad"), [
    (FineTuneConfig,
     [ROOT / "config.json", *(ROOT / "demo").glob("train*.json"), USERS_CONFIG, {},
      {"dataset_kwargs": {"columns": {"_description": 3, "id": None}}},
      {"model_arch": {"architecture": {"_description": [], "n_layer": 2}}}],
     [{"a": 1}, {"trainer_kwargs": {"epoch": 1}}, {"dataset_kwargs": {"columns": {"x": "y"}}},
      {"optimizer_kwargs": {"lm_lr": "5e-5"}}, {"trainer_kwargs": {"loss_scaling_batch": 0}}]),
    (DistillConfig,
     [ROOT / "config_kd.json", *(ROOT / "demo").glob("distil*.json"), TEACHER,
      distillation(teacher_cache={"_description": 1, "kind": "top_k"}, **{"lambda": 0.2})],
     [{"model_arch": {"lang_model": "x"}}, distillation(lambda_=0.2), distillation(teacher_cache="hidden"),
      distillation(**{"lambda": 1}), distillation(temperature=0)]),
])
def test_editors_accept_what_we_accept(model, good, bad):
    """Fault: the schema marks free text or a shipped config as wrong in an editor, or lets a wrong key pass."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; pydantic alone was tested")
    validator = jsonschema.Draft202012Validator(schema(model))
    for content in good:
        content = read_json(content) if isinstance(content, Path) else content
        assert [error.message for error in validator.iter_errors(content)] == []
    assert all(list(validator.iter_errors(content)) for content in bad)
