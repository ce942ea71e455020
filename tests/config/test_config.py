"""Both configs: their keys, defaults and ranges, and what is refused or has no effect: utils/config/."""

import json
import re

import pytest

from tests.config_samples import (
    DEFAULTS,
    KD_ARCH,
    KD_KWARGS,
    KD_TRAINER,
    POLICY_KWARGS,
    TEACHER,
    USERS_CONFIG,
    distillation,
    load,
    refusal,
)
from utils.config.checks import warnings_of
from utils.config.distill import DistillConfig, without_dropout
from utils.config.load import config_json
from utils.config.reference import schema

POLICY = {"method": "policy_gradient"}
LAYERS = {"student_init": "teacher_layers"}


def load_kd(folder, content, *overrides) -> DistillConfig:
    return load(folder, content, *overrides, model=DistillConfig)


def refusal_kd(folder, content, *overrides) -> list[str]:
    return refusal(folder, content, *overrides, model=DistillConfig)


def nested(key: str, value) -> dict:
    """{"a": {"b": value}} for the key a.b."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def parts(arch: dict | None = None, trainer: dict | None = None, kwargs: dict | None = None) -> dict:
    arch = TEACHER["model_arch"] | (arch or {})
    return {"model_arch": arch, "trainer_kwargs": trainer or {}, "distillation_kwargs": kwargs or {}}


# -- keys --------------------------------------------------------------------------------------------------------


def test_a_users_config_is_accepted(tmp_path):
    """Fault: a key that users already have is refused, lost or changed."""
    config, given = load(tmp_path, USERS_CONFIG), json.loads(json.dumps(USERS_CONFIG))
    del given["_description"], given["model_arch"]["_description"]
    assert given["trainer_kwargs"].pop("is_training") and given["trainer_kwargs"].pop("use_cache")
    assert config.model_dump(exclude_unset=True) == given
    assert config.monitored_metric == "rougeL"


def test_the_page_of_keys_has_none_that_is_unknown(shared):
    """Fault: a key on the page that users read is in neither model (distillation_kwargs excepted)."""
    page = (shared / "config_keys.md").read_text(encoding="utf-8")
    known = set((json.dumps(schema()) + json.dumps(schema(DistillConfig))).replace('"', " ").split())
    lines = [line for line in page.splitlines() if line.startswith("| ") and "distillation_kwargs" not in line]
    cells = [re.sub(r"\([^()]*\)", "", line.split("|")[2]) for line in lines]  # without example values
    keys = {name.rpartition(".")[2] for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert len(keys) > 50 and "lm_lr" in keys
    assert keys - known == set()


def test_defaults(tmp_path):
    """Fault: a default that is not the documented one."""
    assert json.loads(config_json(load(tmp_path, {}))) == DEFAULTS
    assert json.loads(config_json(load_kd(tmp_path, TEACHER))) == {
        **DEFAULTS, "model_arch": KD_ARCH, "trainer_kwargs": DEFAULTS["trainer_kwargs"] | KD_TRAINER,
        "distillation_kwargs": KD_KWARGS,
    }
    cache = load_kd(tmp_path, distillation(teacher_cache={})).distillation_kwargs.teacher_cache
    assert cache.model_dump() == {"kind": "hidden", "top_k": 64, "dtype": "auto", "dir": None}


@pytest.mark.parametrize(("key", "values", "expected"), [
    ("gradient_accumulation_steps", [0, None], 1),
    ("gradient_clipping", [0, None], None),
    ("gradient_clipping", [2], 2.0),
    ("n_batch_ckpt_save", [-1, 0, None], None),
    ("ckpt_training_batch", [-1, 0, None], None),
    ("ckpt_training_batch", [1], 1),
    ("loss_scaling_batch", [-1], 1024),
    ("adaptive_loss_metric", [-1], "rougeL"),
    ("adaptive_loss_metric", ["perplexity"], "perplexity"),
    ("baseline_threshold", [-1], 0.15),
    ("baseline_threshold", [0], 0.0),
])
def test_sentinels(tmp_path, key, values, expected):
    """Fault: null, 0 or -1 used as a number: clipping to 0, a step of no micro-batch, a checkpoint every -1."""
    for value in values:
        assert getattr(load(tmp_path, {"trainer_kwargs": {key: value}}).trainer_kwargs, key) == expected


@pytest.mark.parametrize(
    ("stopping", "expected"),
    [({}, "loss"), ({"mode": "max"}, "rougeL"), ({"metric": "perplexity"}, "perplexity"),
     ({"mode": "max", "metric": "rouge2"}, "rouge2")],
)
def test_monitored_metric(tmp_path, stopping, expected):
    """Fault: best and early stopping follow another metric than the one in the config."""
    content = {"callbacks_kwargs": {"kwargs": stopping}}
    assert load(tmp_path, content).monitored_metric == load_kd(tmp_path, TEACHER | content).monitored_metric == expected


def test_columns_are_completed(tmp_path):
    """Fault: mapping one column loses the names of the others, or an id of null is refused."""
    columns = load(tmp_path, {"dataset_kwargs": {"columns": {"article": "full\ntext", "id": None}}}).dataset_kwargs
    assert columns.columns == {"id": None, "article": "full\ntext", "highlights": "highlights"}


def test_shared_code_sees_the_student(tmp_path):
    """Fault: code that both scripts share trains the teacher, or on its GPU; or these names are keys."""
    arch = load_kd(tmp_path, {"model_arch": {
        "teacher_lang_model": "a", "student_lang_model": "b", "teacher_gpu_device_id": 2, "student_gpu_device_id": 3,
    }}).model_arch
    assert (arch.lang_model, arch.gpu_device_id) == ("b", 3)
    assert "lang_model" not in arch.model_dump() and "gpu_device_id" not in arch.model_dump()


def test_lambda_keeps_its_name(tmp_path):
    """Fault: lambda, a keyword of Python, is read, set, printed or reported under another name."""
    in_file = load_kd(tmp_path, distillation(**{"lambda": 0.3}))
    assert in_file == load_kd(tmp_path, TEACHER, "distillation_kwargs.lambda=0.3")
    assert in_file.distillation_kwargs.lambda_ == 0.3
    assert warnings_of(in_file)[0].startswith("distillation_kwargs.lambda has no effect")
    assert "did you mean distillation_kwargs.lambda?" in refusal_kd(tmp_path, distillation(lambda_=0.3))[0]
    assert "lambda_" not in config_json(in_file) + json.dumps(schema(DistillConfig))


# -- wrong keys and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refuse", "key", "nearest"), [
    (refusal, "trainer_kwargs.epoch", "trainer_kwargs.epochs"),
    (refusal, "epochs", "trainer_kwargs.epochs"),
    (refusal, "trainer_kwargs.train_dataset", "dataset_kwargs.train_dataset"),
    (refusal, "trainer_kwargs.type", "optimizer_kwargs.type or lr_scheduler_kwargs.type"),
    (refusal, "model_arch.generation_kwargs.num_beam", "model_arch.generation_kwargs.num_beams"),
    (refusal, "trainer_kwargs.max-generation-length", "model_arch.generation_kwargs.max_generation_length"),
    (refusal, "trainer_kwargs.dataset_kwargs", "dataset_kwargs"),
    (refusal_kd, "model_arch.lang_model", "model_arch.student_lang_model"),
    (refusal_kd, "model_arch.gpu_device_id", "model_arch.student_gpu_device_id"),
    (refusal_kd, "trainer_kwargs.teacher_checkpoint_path", "trainer_kwargs.teacher_ckpt_path"),
    (refusal_kd, "trainer_kwargs.temperature", "distillation_kwargs.temperature"),
    (refusal_kd, "distillation_kwargs.top_k", "distillation_kwargs.teacher_cache.top_k"),
])
def test_unknown_keys(tmp_path, refuse, key, nearest):
    """Fault: a key that is mistyped, misplaced or of the other config is ignored, or the key that was meant is not
    named."""
    assert refuse(tmp_path, nested(key, 1)) == [f"config.json: {key} is unknown: did you mean {nearest}?"]


@pytest.mark.parametrize("key", ["distillation_kwargs", "trainer_kwargs.teacher_ckpt_path",
                                 "model_arch.student_lang_model"])
def test_keys_of_the_other_script(tmp_path, key):
    """Fault: train.py with config_kd.json proposes keys that have nothing to do with it."""
    assert refusal(tmp_path, nested(key, "x")) == [f"config.json: {key} is unknown: it belongs in a config of "
                                                   "train_kd.py"]


WRONG = {
    "optimizer_kwargs.lm_lr": ["fast", 0, True, None], "optimizer_kwargs.kwargs": [[1]],
    "trainer_kwargs.epochs": [3.0, 0, True, None], "trainer_kwargs.compile": ["false", 1, 0.0, None],
    "trainer_kwargs.device": ["CUDA"], "trainer_kwargs.metrics": ["rouge"],
    "trainer_kwargs.gradient_clipping": ["null", -0.5], "trainer_kwargs.loss_scaling_batch": [0, -2, "x"],
    "trainer_kwargs.adaptive_loss_metric": [1, "rouge"], "trainer_kwargs.baseline_threshold": [-0.5],
    "trainer_kwargs.n_batch_ckpt_save": [-2], "trainer_kwargs.seed": [-1, 2**32],
    "trainer_kwargs.keep_checkpoints": [0], "trainer_kwargs.output_dir": ["", "a\nb", "a\0b", "\ud800"],
    "model_arch.lang_model": [5, "", "\x1b[31m"], "model_arch.gpu_device_id": [-1], "model_arch.dropout": [1, -0.1],
    "model_arch.generation_kwargs": [3], "model_arch.generation_kwargs.num_beams": [0, 1001],
    "lr_scheduler_kwargs.min_lr_ratio": [1.5, -0.1], "lr_scheduler_kwargs.num_training_steps": [0],
    "callbacks_kwargs.kwargs.patience": [-1, 1.5], "dataset_kwargs": [[]], "dataset_kwargs.train_dataset": [None],
    "dataset_kwargs.prompt_template": ["x\ny", "{article}{article}"], "dataset_kwargs.num_workers": [-1, 257],
    "dataset_kwargs.columns": [{"article": None}],
}
WRONG_KD = {
    "method": ["divergance"], "kl_div": ["js"], "on_policy_fraction": [1.1, None], "rollout": ["teachers"],
    "alpha": [-0.1, 1.1], "rollout_temperature": [0, 1001], "rollout_top_k": [0], "rollout_top_p": [0, 1.1],
    "rollout_batch_size": [0], "rollout_epochs": [0, 1001], "importance_weight": ["tokens"], "lm_weight": [-0.1, 1.1],
    "clip_epsilon": [0, 1], "whiten": [1], "penalty": ["true"], "frequency_weight": [-0.1], "diversity_weight": [-0.1],
    "entropy_weight": [-0.1, None], "entropy_floor": [0], "temperature": [0, 1001], "kd_weight": [-0.1, 1.1],
    "beta": [0, 1], "lambda": [0, 1, None], "mu": [-0.1, 1.1], "chunk_size": [0, 64.0, 1_000_001],
    "student_init": ["teacher_layer"], "student_layers": [3, [], [0, 4, 4]], "teacher_cache": ["hidden", True],
    "teacher_cache.kind": ["hiden"], "teacher_cache.top_k": [0], "teacher_cache.dtype": ["float16"],
    "teacher_cache.dir": [""],
}


def cases(table: dict[str, list]) -> list[tuple]:
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), [
    *cases(WRONG), *((f"distillation_kwargs.{key}", value) for key, value in cases(WRONG_KD)),
])
def test_wrong_values(tmp_path, key, value):
    """Fault: a value of another type is converted, one out of range accepted, or key or value are not named."""
    by_distillation = key.startswith("distillation_kwargs")
    (line,) = refusal_kd(tmp_path, TEACHER | nested(key, value)) if by_distillation else refusal(
        tmp_path, nested(key, value))
    assert line.startswith(f"config.json: {key}: ") and " should " in line and "(got " in line
    assert not isinstance(value, int | float) or f"(got {json.dumps(value)}" in line
    assert line.isprintable()


def test_nan_is_refused_with_its_key(tmp_path):
    """Fault: NaN or a number that overflows passes and poisons the weights; or its key is not named."""
    optimizer = '"optimizer_kwargs": {"lm_lr": NaN, "kwargs": {"eps": [Infinity], "weight_decay": NaN}}'
    lines = refusal(tmp_path, f'{{{optimizer}, "trainer_kwargs": {{"gradient_clipping": 1e999}}}}')
    assert [line.split(": ")[1] for line in lines] == [
        "trainer_kwargs.gradient_clipping", "optimizer_kwargs.kwargs.eps.0", "optimizer_kwargs.kwargs.weight_decay",
        "optimizer_kwargs.lm_lr",
    ]
    assert all("finite number" in line for line in lines)


def test_all_errors_at_once_each_in_one_line(tmp_path):
    """Fault: the user corrects one error only to meet the next, or a newline in a value breaks an error in two."""
    lines = refusal(tmp_path, {
        "trainer_kwargs": {"epoch\n": 1, "output_dir": ["a\nb\u2028"]}, "optimizer_kwargs": {"lm_lr": "x" * 500},
        "dataset_kwargs": [],
    })
    assert len(lines) == 4
    assert all(line.startswith("config.json: ") and line.isprintable() and len(line) < 250 for line in lines)
    assert len(refusal(tmp_path, {f"key {number}": number for number in range(5000)})) <= 20


# -- keys that exclude each other --------------------------------------------------------------------------------


STOPPING, ARCH, TRAINER = "callbacks_kwargs.kwargs", "model_arch", "trainer_kwargs"
KWARGS, DATA = "distillation_kwargs", "dataset_kwargs"


@pytest.mark.parametrize(("settings", "words", "remedies"), [
    (["trainer_kwargs.monitor_test=true"], [f"{DATA}.test_dataset"],
     ["trainer_kwargs.monitor_test=false", f"{DATA}.test_dataset=x"]),
    ([f"{DATA}.validation_dataset=null"], ["trainer_kwargs.monitor_val"], ["trainer_kwargs.monitor_val=false"]),
    ([f"{STOPPING}.mode=max", f"{STOPPING}.metric=loss"], [], [f"{STOPPING}.mode=min", f"{STOPPING}.metric=rougeL"]),
    ([f"{STOPPING}.mode=min", f"{STOPPING}.metric=rouge1"], [], [f"{STOPPING}.mode=max", f"{STOPPING}.metric=loss"]),
    ([f"{STOPPING}.patience=2", f"{TRAINER}.monitor_val=false"], [],
     [f"{STOPPING}.patience=null", f"{TRAINER}.monitor_val=true"]),
    ([f"{TRAINER}.metrics=[]", f"{STOPPING}.mode=max"], ["rougeL"],
     [f'{TRAINER}.metrics=["rouge"]', f"{STOPPING}.mode=min"]),
    ([f"{TRAINER}.adaptive_loss_scaling=true", f"{TRAINER}.metrics=[]"], ["perplexity"],
     [f'{TRAINER}.metrics=["rouge"]', f"{TRAINER}.adaptive_loss_metric=perplexity"]),
    ([f"{TRAINER}.adaptive_loss_metric=rouge1", f"{TRAINER}.baseline_threshold=11",
      f"{TRAINER}.adaptive_loss_scaling=true"], ["0.15"], [f"{TRAINER}.baseline_threshold=0.15"]),
    ([f"{ARCH}.teacher_lang_model=null"], [f"{TRAINER}.teacher_ckpt_path"],
     [f"{TRAINER}.teacher_ckpt_path=x", f"{ARCH}.teacher_lang_model=x"]),
    ([f"{ARCH}.teacher_lang_model=null", f"{TRAINER}.teacher_ckpt_path=old/model.pt"], ["gpt2-medium"],
     [f"{ARCH}.teacher_lang_model=gpt2-medium"]),
    ([f"{TRAINER}.student_ckpt_path=x", f"{KWARGS}.student_init=teacher_layers"], [],
     [f"{TRAINER}.student_ckpt_path=null", f"{KWARGS}.student_init=null"]),
    ([f"{TRAINER}.student_ckpt_path=x", f"{ARCH}.from_scratch=true"], [],
     [f"{TRAINER}.student_ckpt_path=null", f"{ARCH}.from_scratch=false"]),
    ([f"{KWARGS}.student_layers=[0]"], [f"{KWARGS}.student_init"],
     [f"{KWARGS}.student_layers=null", f"{KWARGS}.student_init=teacher_layers"]),
    ([f"{TRAINER}.student_ckpt_path=x", f"{ARCH}.architecture={{\"n_layer\": 2}}"], [],
     [f"{TRAINER}.student_ckpt_path=null", f"{ARCH}.architecture={{}}"]),
    ([f"{KWARGS}.student_init=teacher_layers", f"{ARCH}.tokenizer=x"], [],
     [f"{KWARGS}.student_init=null", f"{ARCH}.tokenizer=null"]),
    ([f"{KWARGS}.teacher_cache={{}}", f"{KWARGS}.method=policy_gradient"], ["highlights"],
     [f"{KWARGS}.teacher_cache=null", f"{KWARGS}.method=divergence"]),
    ([f"{KWARGS}.on_policy_fraction=0.5", f"{KWARGS}.teacher_cache={{}}"], ["highlights"],
     [f"{KWARGS}.on_policy_fraction=0", f"{KWARGS}.teacher_cache=null"]),
])
def test_contradictions(tmp_path, settings, words, remedies):
    """Fault: of two keys that exclude each other one is ignored; or a proposed remedy does not work."""
    (line,) = refusal_kd(tmp_path, TEACHER, *settings)
    keys = [setting.partition("=")[0].removeprefix(f"{KWARGS}.") for setting in settings]
    assert line.startswith("config.json: ") and [word for word in (*keys, *words) if word not in line] == []
    for remedy in remedies:
        load_kd(tmp_path, TEACHER, *settings, remedy)
    if not any(name in "".join(settings) for name in ("teacher", "student", KWARGS)):
        assert refusal(tmp_path, {}, *settings) == [line]


@pytest.mark.parametrize("content", [
    parts(None, {"multi_gpu": True}, {"teacher_cache": {"kind": "hidden"}}),
    parts(None, {"teacher_ckpt_path": "old.pt"}),
    parts({"teacher_lang_model": None}, {"teacher_ckpt_path": "runs/x", "student_ckpt_path": "runs/y"}),
    parts({"from_scratch": True, "architecture": {"n_layer": 2}, "tokenizer": "x"}),
    parts({"architecture": {"n_layer": 2}}, None, LAYERS),
    parts({"teacher_gpu_device_id": None, "student_gpu_device_id": None}, {"student_ckpt_path": "old.pt"}),
    parts({"teacher_gpu_device_id": 5, "student_gpu_device_id": 5}, None,
          {"on_policy_fraction": 1, "rollout_top_p": 0.9}),
    parts(None, None, POLICY | {"temperature": 2, "chunk_size": 1}),
    parts(None, None, POLICY | POLICY_KWARGS),
    parts(None, {"multi_gpu": True}, POLICY | LAYERS | {"rollout": "labels", "rollout_epochs": 2}),
])
def test_what_goes_together(tmp_path, content):
    """Fault: a combination that is meant to work is refused or warned of."""
    assert warnings_of(load_kd(tmp_path, content)) == []


# -- keys without effect -----------------------------------------------------------------------------------------


SAMPLING = {"rollout_temperature", "rollout_top_k", "rollout_top_p", "rollout_batch_size"}
PENALTIES = {"frequency_weight", "diversity_weight", "entropy_weight", "entropy_floor"}
OF_DIVERGENCE = {"kl_div": "JS", "kd_weight": 0, "beta": 0.3, "lambda": 0.3, "mu": 0.3}


@pytest.mark.parametrize(
    ("values", "without_effect"),
    [
        (POLICY_KWARGS | {"rollout": "student"}, {*POLICY_KWARGS, "rollout"}),
        (POLICY_KWARGS | {"on_policy_fraction": 0.5}, {*POLICY_KWARGS} - SAMPLING),
        (POLICY | OF_DIVERGENCE | {"temperature": 2}, OF_DIVERGENCE),
        (POLICY | POLICY_KWARGS | {"rollout": "student"}, {"alpha"}),
        (POLICY | POLICY_KWARGS | {"rollout": "teacher"}, {"alpha"}),
        (POLICY | POLICY_KWARGS | {"rollout": "labels"}, {"alpha", "importance_weight", *SAMPLING}),
        (POLICY | POLICY_KWARGS | {"penalty": False}, PENALTIES),
        (POLICY | {"temperature": 2, "lm_weight": 1}, {"temperature"}),
        ({"temperature": 2, "on_policy_fraction": 0.5, "kd_weight": 0}, {"temperature", "on_policy_fraction"}),
        ({"temperature": 2, "kd_weight": 0.1}, {}),
    ],
)
def test_keys_of_another_method(tmp_path, values, without_effect):
    """Fault: a key is tuned that the method does not read, without a warning; or one that it reads is warned of."""
    lines = warnings_of(load_kd(tmp_path, distillation(**values)))
    assert sorted(line.split(":")[0] for line in lines) == sorted(
        f"distillation_kwargs.{key} has no effect" for key in without_effect)


@pytest.mark.parametrize(("method", "dropout", "resolved"), [
    ("policy_gradient", None, 0.0), ("policy_gradient", 0.1, 0.1), ("divergence", None, None)])
def test_dropout_of_policy_gradient(tmp_path, method, dropout, resolved):
    """Fault: sampling and loss see different probabilities, without a warning; or another method loses its dropout."""
    config = load_kd(tmp_path, parts({"dropout": dropout}, None, {"method": method}))
    assert without_dropout(config).model_arch.dropout == resolved
    assert ["model_arch.dropout is 0.1" in line for line in warnings_of(config)] == [True] * (dropout == 0.1)
