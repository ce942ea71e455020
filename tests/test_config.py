"""The fine-tuning config: which keys there are, what they resolve to, what is refused: utils/config/fine_tune.py."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.config_samples import DEFAULTS, USERS_CONFIG, load, refusal
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import config_json, warnings_of
from utils.config.reference import schema


def set_value(section: str, key: str, value) -> dict:
    return {section: {key: value}}


# -- keys --------------------------------------------------------------------------------------------------------


def test_a_users_config_is_taken_whole(tmp_path):
    """A key that users already have is refused, lost or changed on the way in."""
    config = load(tmp_path, USERS_CONFIG)
    given = {key: value for key, value in USERS_CONFIG.items() if key != "_description"}
    given["model_arch"] = {key: value for key, value in given["model_arch"].items() if key != "_description"}
    assert config.model_dump(exclude_unset=True) == given
    trainer = config.trainer_kwargs
    assert (trainer.accumulation_steps, trainer.clip_norm) == (96, 1.0)
    assert (trainer.checkpoint_every, trainer.batches_per_epoch) == (5000, 10000)
    assert (trainer.loss_scaling_interval, trainer.scaling_metric, trainer.scaling_baseline) == (4096, "rougeL", 0.11)
    assert config.monitored_metric == "rougeL"


def test_the_page_of_keys_has_none_that_is_unknown(shared):
    """A key listed on the page that users read is in neither model (distillation_kwargs excepted)."""
    page = (shared / "config_keys.md").read_text(encoding="utf-8")
    known = set((json.dumps(schema()) + json.dumps(schema(DistillConfig))).replace('"', " ").split())
    lines = [line for line in page.splitlines() if line.startswith("| ") and "distillation_kwargs" not in line]
    rows = [line.split("|") for line in lines]
    cells = [row[2] for row in rows if len(row) >= 5 and row[1].strip() != "section" and "---" not in row[1]]
    keys = set()
    for cell in cells:
        outside, depth = "", 0
        for sign in cell:  # example values stand in brackets
            depth += (sign == "(") - (sign == ")")
            outside += sign if depth == 0 else ""
        keys |= {part.strip().lstrip(".").rsplit(".", 1)[-1] for part in outside.split("`")[1::2]}
    assert len(keys) > 50 and "lm_lr" in keys
    assert keys - known == set()


def test_defaults(tmp_path):
    """A default that is not the documented one, and so a run that is not what the reader of the page expects."""
    assert json.loads(config_json(load(tmp_path, {}))) == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value", "resolved", "expected"),
    [
        ("gradient_accumulation_steps", 0, "accumulation_steps", 1),
        ("gradient_accumulation_steps", None, "accumulation_steps", 1),
        ("gradient_clipping", 0, "clip_norm", None),
        ("gradient_clipping", None, "clip_norm", None),
        ("gradient_clipping", 2, "clip_norm", 2.0),
        ("n_batch_ckpt_save", -1, "checkpoint_every", None),
        ("n_batch_ckpt_save", 0, "checkpoint_every", None),
        ("n_batch_ckpt_save", None, "checkpoint_every", None),
        ("ckpt_training_batch", -1, "batches_per_epoch", None),
        ("ckpt_training_batch", 0, "batches_per_epoch", None),
        ("ckpt_training_batch", None, "batches_per_epoch", None),
        ("ckpt_training_batch", 1, "batches_per_epoch", 1),
        ("loss_scaling_batch", -1, "loss_scaling_interval", 1024),
        ("adaptive_loss_metric", -1, "scaling_metric", "rougeL"),
        ("adaptive_loss_metric", "perplexity", "scaling_metric", "perplexity"),
        ("baseline_threshold", -1, "scaling_baseline", 0.15),
        ("baseline_threshold", 0, "scaling_baseline", 0.0),
    ],
)
def test_sentinels(tmp_path, key, value, resolved, expected):
    """null, 0 or -1 taken as a number: clipping to 0, a step of no micro-batch, a checkpoint every -1."""
    assert getattr(load(tmp_path, set_value("trainer_kwargs", key, value)).trainer_kwargs, resolved) == expected


@pytest.mark.parametrize(
    ("stopping", "expected"),
    [({}, "loss"), ({"mode": "max"}, "rougeL"), ({"metric": "perplexity"}, "perplexity"),
     ({"mode": "max", "metric": "rouge2"}, "rouge2")],
)
def test_monitored_metric(tmp_path, stopping, expected):
    """Best and early stopping follow another metric than the one that was asked for."""
    assert load(tmp_path, {"callbacks_kwargs": {"kwargs": stopping}}).monitored_metric == expected


def test_columns_are_completed(tmp_path):
    """Mapping one column loses the names of the others, or an id of null is taken for a mistake."""
    columns = load(tmp_path, {"dataset_kwargs": {"columns": {"article": "text", "id": None}}}).dataset_kwargs.columns
    assert columns == {"id": None, "article": "text", "highlights": "highlights"}


def test_one_warning_for_keys_without_effect(tmp_path):
    """Keys that do nothing are refused, accepted in silence, or warned of more than once."""
    one, both = {"use_cache": False}, {"use_cache": True, "is_training": False}
    assert warnings_of(load(tmp_path, {})) == []
    assert warnings_of(load(tmp_path, {"trainer_kwargs": one})) == [
        "trainer_kwargs.use_cache has no effect: nothing needs to be set instead: training scripts train, and the KV "
        "cache is always used"
    ]
    assert warnings_of(load(tmp_path, {"trainer_kwargs": both})) == [
        "trainer_kwargs.is_training and trainer_kwargs.use_cache have no effect: nothing needs to be set instead: "
        "training scripts train, and the KV cache is always used"
    ]
    plateau = load(tmp_path, {"lr_scheduler_kwargs": {"increase_batch_size_on_plateau": True}})
    assert ["callbacks_kwargs.kwargs.patience" in line for line in warnings_of(plateau)] == [True]


# -- wrong keys and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"trainer_kwargs": {"epoch": 1}}, "trainer_kwargs.epoch is unknown: did you mean epochs?"),
        ({"trainer_kwarg": {}}, "trainer_kwarg is unknown: did you mean trainer_kwargs?"),
        ({"epochs": 1}, "epochs is unknown: epochs belongs in trainer_kwargs"),
        ({"trainer_kwargs": {"train_dataset": "a"}},
         "trainer_kwargs.train_dataset is unknown: train_dataset belongs in dataset_kwargs"),
        ({"trainer_kwargs": {"type": "a"}},
         "trainer_kwargs.type is unknown: type belongs in optimizer_kwargs or lr_scheduler_kwargs"),
        ({"callbacks_kwargs": {"patience": 3}},
         "callbacks_kwargs.patience is unknown: patience belongs in callbacks_kwargs.kwargs"),
        ({"model_arch": {"generation_kwargs": {"num_beam": 3}}},
         "model_arch.generation_kwargs.num_beam is unknown: did you mean num_beams?"),
        ({"trainer_kwargs": {"max-generation-length": 3}},
         "trainer_kwargs.max-generation-length is unknown: did you mean "
         "model_arch.generation_kwargs.max_generation_length?"),
        ({"model_arch": {"student_lang_model": "gpt2"}},
         "model_arch.student_lang_model is unknown: did you mean model_arch.lang_model?"),
        ({"trainer_kwargs": {"teacher_ckpt_path": "a"}}, "trainer_kwargs.teacher_ckpt_path is unknown: "
         "teacher_ckpt_path belongs in trainer_kwargs of a config of train_kd.py"),
        ({"distillation_kwargs": {}},
         "distillation_kwargs is unknown: distillation_kwargs belongs in a config of train_kd.py"),
        ({"dataset_kwargs": {"columns": {"artcle": "x"}}},
         "dataset_kwargs.columns.artcle is unknown: did you mean article?"),
    ],
)
def test_unknown_keys(tmp_path, content, line):
    """A mistyped or misplaced key is ignored, or refused without the key that was meant."""
    assert refusal(tmp_path, content) == [f"config.json: {line}"]


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("optimizer_kwargs", "lm_lr", "5e-5",
         'is "5e-5" (a string): expected a number greater than 0; write 5e-05 without quotes'),
        ("optimizer_kwargs", "lm_lr", "fast", 'is "fast" (a string): expected a number greater than 0'),
        ("optimizer_kwargs", "lm_lr", "-1", 'is "-1" (a string): expected a number greater than 0'),
        ("optimizer_kwargs", "lm_lr", 0, "is 0: expected a number greater than 0"),
        ("optimizer_kwargs", "lm_lr", True, "is true (a boolean): expected a number greater than 0"),
        ("optimizer_kwargs", "lm_lr", None, "is null: expected a number greater than 0"),
        ("optimizer_kwargs", "kwargs", [1], "is [1] (a list): expected an object"),
        ("trainer_kwargs", "epochs", 3.0, "is 3.0 (a number): expected a whole number of at least 1; write 3"),
        ("trainer_kwargs", "epochs", 0, "is 0: expected a whole number of at least 1"),
        ("trainer_kwargs", "epochs", True, "is true (a boolean): expected a whole number of at least 1"),
        ("trainer_kwargs", "compile", "False",
         'is "False" (a string): expected true or false; write false without quotes'),
        ("trainer_kwargs", "compile", 1, "is 1 (a number): expected true or false; write true"),
        ("trainer_kwargs", "device", "CUDA", 'is "CUDA": expected one of "auto", "cuda", "cpu"; write "cuda"'),
        ("trainer_kwargs", "metrics", "rouge",
         'is "rouge" (a string): expected a list, each entry "rouge"; write ["rouge"]'),
        ("trainer_kwargs", "gradient_clipping", "null",
         'is "null" (a string): expected a number of at least 0, or null; write null without quotes'),
        ("trainer_kwargs", "gradient_clipping", -0.5, "is -0.5: expected a number of at least 0, or null"),
        ("trainer_kwargs", "loss_scaling_batch", 0, "is 0: expected -1, or a whole number of at least 1"),
        ("trainer_kwargs", "loss_scaling_batch", "64",
         'is "64" (a string): expected -1, or a whole number of at least 1; write 64 without quotes'),
        ("trainer_kwargs", "baseline_threshold", -0.5, "is -0.5: expected -1, or a number of at least 0"),
        ("trainer_kwargs", "n_batch_ckpt_save", -2, "is -2: expected a whole number of at least -1, or null"),
        ("trainer_kwargs", "seed", 2**32, "is 4294967296: expected a whole number from 0 to 4294967295"),
        ("trainer_kwargs", "keep_checkpoints", 0, "is 0: expected a whole number of at least 1"),
        ("model_arch", "lang_model", 5, 'is 5 (a number): expected a string that is not empty; write "5"'),
        ("model_arch", "gpu_device_id", -1, "is -1: expected a whole number of at least 0, or null"),
        ("model_arch", "dropout", 1, "is 1: expected a number of at least 0 and below 1, or null"),
        ("model_arch", "generation_kwargs", 3, "is 3 (a number): expected an object"),
        ("lr_scheduler_kwargs", "min_lr_ratio", 1.5, "is 1.5: expected a number from 0 to 1"),
        ("dataset_kwargs", "train_dataset", None, "is null: expected a string that is not empty"),
        ("dataset_kwargs", "prompt_template", "x\ny", 'is "x\\ny": expected the text {article} in it exactly once'),
        ("dataset_kwargs", "prompt_template", "{article}{article}",
         'is "{article}{article}": expected the text {article} in it exactly once'),
        ("dataset_kwargs", "columns", {"article": None},
         'is {"article": null}: article is null: expected the name of a column; only id may be null'),
    ],
)
def test_wrong_values(tmp_path, section, key, value, line):
    """A value of another type is converted in silence, or refused without value, expectation and remedy."""
    assert refusal(tmp_path, set_value(section, key, value)) == [f"config.json: {section}.{key} {line}"]


def test_the_place_in_a_list_or_free_object_is_named(tmp_path):
    """An error inside a list or an object of free keys does not say which entry."""
    content = {"trainer_kwargs": {"multi_gpu_ids": [0, -1]}, "model_arch": {"architecture": {"n_layer": None}}}
    assert refusal(tmp_path, content) == [
        "config.json: model_arch.architecture.n_layer is null: expected a whole number, a number, true or false, or a "
        "string",
        "config.json: trainer_kwargs.multi_gpu_ids[1] is -1: expected a whole number of at least 0",
    ]


def test_all_errors_at_once_each_in_one_line(tmp_path):
    """The user mends one error only to meet the next, or a value with a newline tears an error in two."""
    lines = refusal(tmp_path, {
        "trainer_kwargs": {"epoch\n": 1, "output_dir": ["a\nb\u2028"]}, "optimizer_kwargs": {"lm_lr": "x" * 500},
        "dataset_kwargs": [],
    })
    assert [line.split(" is ")[0] for line in lines] == [
        "config.json: trainer_kwargs.output_dir", 'config.json: trainer_kwargs["epoch\\n"]',
        "config.json: optimizer_kwargs.lm_lr", "config.json: dataset_kwargs",
    ]
    assert all(len(line.splitlines()) == 1 and len(line) < 250 for line in lines)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"trainer_kwargs": {"monitor_test": True}}, ["trainer_kwargs.monitor_test", "dataset_kwargs.test_dataset"]),
        ({"dataset_kwargs": {"validation_dataset": None}},
         ["trainer_kwargs.monitor_val", "dataset_kwargs.validation_dataset"]),
        ({"callbacks_kwargs": {"kwargs": {"mode": "max", "metric": "loss"}}},
         ["callbacks_kwargs.kwargs.mode", "callbacks_kwargs.kwargs.metric", 'set mode to "min"']),
        ({"callbacks_kwargs": {"kwargs": {"mode": "min", "metric": "rouge1"}}},
         ["callbacks_kwargs.kwargs.mode", "callbacks_kwargs.kwargs.metric", 'set mode to "max"']),
        ({"callbacks_kwargs": {"kwargs": {"patience": 2}}, "trainer_kwargs": {"monitor_val": False}},
         ["callbacks_kwargs.kwargs.patience", "trainer_kwargs.monitor_val"]),
        ({"lr_scheduler_kwargs": {"increase_batch_size_on_plateau": True}, "trainer_kwargs": {"monitor_val": False}},
         ["lr_scheduler_kwargs.increase_batch_size_on_plateau", "trainer_kwargs.monitor_val"]),
        ({"callbacks_kwargs": {"kwargs": {"mode": "max"}}, "trainer_kwargs": {"metrics": []}},
         ["callbacks_kwargs.kwargs.mode", "rougeL", "trainer_kwargs.metrics"]),
        ({"trainer_kwargs": {"adaptive_loss_scaling": True, "monitor_val": False}},
         ["trainer_kwargs.adaptive_loss_scaling", "trainer_kwargs.monitor_val"]),
        ({"trainer_kwargs": {"adaptive_loss_scaling": True, "metrics": []}},
         ["trainer_kwargs.adaptive_loss_scaling", "trainer_kwargs.metrics"]),
        ({"trainer_kwargs": {"adaptive_loss_scaling": True, "baseline_threshold": 11}},
         ["trainer_kwargs.baseline_threshold is 11", "trainer_kwargs.adaptive_loss_metric"]),
    ],
)
def test_contradictions(tmp_path, content, keys):
    """Two keys that exclude each other are accepted, and one of them is quietly ignored."""
    lines = refusal(tmp_path, content)
    assert len(lines) == 1 and lines[0].startswith("config.json: ")
    assert [key for key in keys if key not in lines[0]] == []


def test_several_contradictions_are_told_together_and_remedies_work(tmp_path):
    """Only the first contradiction is told, or a remedy that an error names is refused in turn."""
    trainer = {"adaptive_loss_scaling": True, "monitor_test": True}
    stopping = {"kwargs": {"mode": "max", "metric": "perplexity"}}
    data = {"validation_dataset": None}
    both = {"trainer_kwargs": trainer, "callbacks_kwargs": stopping, "dataset_kwargs": data}
    assert len(refusal(tmp_path, both)) == 4
    config = load(
        tmp_path,
        both, "callbacks_kwargs.kwargs.mode=min", "dataset_kwargs.validation_dataset=v.csv",
        "dataset_kwargs.test_dataset=t.csv",
    )
    assert config.monitored_metric == "perplexity"
    without_rouge = {"adaptive_loss_scaling": True, "metrics": [], "adaptive_loss_metric": "perplexity"}
    assert load(tmp_path, {"trainer_kwargs": without_rouge}).trainer_kwargs.scaling_metric == "perplexity"


# -- strictness --------------------------------------------------------------------------------------------------

texts = st.text(max_size=8)
numbers = st.floats(allow_nan=True, allow_infinity=True)
others = st.one_of(st.lists(st.integers(), max_size=2), st.dictionaries(texts, texts, max_size=2))
QUICK = settings(max_examples=60, deadline=None)


def accepts(section: str, key: str, value) -> bool:
    try:
        config = FineTuneConfig.model_validate(set_value(section, key, value))
    except ValidationError:
        return False
    kept = getattr(getattr(config, section), key)
    assert kept == value and (type(kept) is type(value) or (type(value) is int and type(kept) is float))
    return True


@QUICK
@given(st.one_of(texts, numbers, st.integers(), st.none(), others, st.sampled_from(["true", "yes", "1", 0, 1, 1.0])))
def test_only_booleans_are_booleans(value):
    """A string or number is converted to a boolean: "false" is true."""
    assert not accepts("trainer_kwargs", "monitor_train", value)


@QUICK
@given(st.one_of(texts, numbers, st.booleans(), st.none(), others, st.sampled_from(["3", "1e3", 3.0])))
def test_only_whole_numbers_are_whole_numbers(value):
    """"3", 3.0 or true is taken for a count."""
    assert not accepts("trainer_kwargs", "epochs", value)


@QUICK
@given(st.one_of(texts, st.booleans(), st.none(), others, st.sampled_from(["5e-5", math.nan, math.inf, -math.inf])))
def test_only_finite_numbers_are_numbers(value):
    """"5e-5", true, NaN or infinity is taken for a learning rate."""
    assert not accepts("optimizer_kwargs", "lm_lr", value)


@QUICK
@given(st.one_of(st.integers(1, 10**15), st.floats(0, exclude_min=True, allow_infinity=False)))
def test_numbers_are_kept(value):
    """A number in range is refused or rounded; a whole number where a number is expected is refused."""
    assert accepts("optimizer_kwargs", "lm_lr", value)


@QUICK
@given(st.one_of(st.integers(), numbers, st.booleans(), st.none(), others))
def test_only_strings_are_strings(value):
    """A number is written into a file name."""
    assert not accepts("dataset_kwargs", "train_dataset", value)


def test_nan_is_refused_with_its_key(tmp_path):
    """NaN or a number that overflows passes and poisons the weights; or the error does not say where it stands."""
    optimizer = '"optimizer_kwargs": {"lm_lr": NaN, "kwargs": {"eps": [Infinity], "weight_decay": NaN}}'
    assert refusal(tmp_path, f'{{{optimizer}, "trainer_kwargs": {{"gradient_clipping": 1e999}}}}') == [
        "config.json: trainer_kwargs.gradient_clipping is Infinity: expected a finite number of at least 0, or null",
        "config.json: optimizer_kwargs.kwargs.eps[0] is Infinity: expected a finite number",
        "config.json: optimizer_kwargs.kwargs.weight_decay is NaN: expected a finite number",
        "config.json: optimizer_kwargs.lm_lr is NaN: expected a finite number greater than 0",
    ]


def test_a_loaded_config_does_not_change(tmp_path):
    """A part of the program changes a setting that others have already read."""
    with pytest.raises(ValidationError):
        load(tmp_path, {}).trainer_kwargs.epochs = 2
