"""The distillation config: its keys, what is refused, and what has no effect: utils/config/distill.py."""

import json
from pathlib import Path

import pytest

from tests import config_samples
from tests.config_samples import DEFAULTS, KD_ARCH, KD_KWARGS, KD_TRAINER, KL_DIVS, TEACHER, distillation
from utils.config.distill import DistillConfig
from utils.config.load import config_json, warnings_of
from utils.config.reference import END, START, schema

ROOT = Path(__file__).resolve().parent.parent
OF_POLICY = config_samples.POLICY_KWARGS


def load(folder: Path, content: dict | str, *overrides: str) -> DistillConfig:
    return config_samples.load(folder, content, *overrides, model=DistillConfig)


def refusal(folder: Path, content: dict | str, *overrides: str) -> list[str]:
    return config_samples.refusal(folder, content, *overrides, model=DistillConfig)


# -- keys --------------------------------------------------------------------------------------------------------


def test_defaults(tmp_path):
    """Fault: a default that is not the documented one, or a section of config.json that differs or is missing."""
    assert json.loads(config_json(load(tmp_path, TEACHER))) == {
        **DEFAULTS, "model_arch": KD_ARCH, "trainer_kwargs": DEFAULTS["trainer_kwargs"] | KD_TRAINER,
        "distillation_kwargs": KD_KWARGS,
    }


def test_defaults_of_the_teacher_cache(tmp_path):
    """Fault: an empty teacher_cache object is taken for none, or has other defaults than documented."""
    cache = json.loads(config_json(load(tmp_path, distillation(teacher_cache={}))))["distillation_kwargs"]
    assert cache["teacher_cache"] == {"kind": "hidden", "top_k": 64, "dtype": "auto", "dir": None}


def test_the_shared_code_sees_the_student(tmp_path):
    """Fault: code that both scripts share trains the teacher, or on its GPU; or the names can be set as keys."""
    arch = load(tmp_path, {"model_arch": {
        "teacher_lang_model": "a", "student_lang_model": "b", "teacher_gpu_device_id": 2, "student_gpu_device_id": 3,
    }}).model_arch
    assert (arch.lang_model, arch.gpu_device_id) == ("b", 3)
    assert "lang_model" not in arch.model_dump() and "gpu_device_id" not in arch.model_dump()


def test_one_gpu_for_both_and_null(tmp_path):
    """Fault: teacher and student cannot share a GPU, or null is refused."""
    for number in (0, 5, None):
        arch = {"teacher_lang_model": "a", "teacher_gpu_device_id": number, "student_gpu_device_id": number}
        loaded = load(tmp_path, {"model_arch": arch}).model_arch
        assert loaded.teacher_gpu_device_id == loaded.gpu_device_id == number


def test_monitored_metric(tmp_path):
    """Fault: best and early stopping follow another metric than in train.py."""
    stopping = {"callbacks_kwargs": {"kwargs": {"mode": "max"}}}
    assert load(tmp_path, TEACHER).monitored_metric == "loss"
    assert load(tmp_path, TEACHER | stopping).monitored_metric == "rougeL"


@pytest.mark.parametrize("name", KL_DIVS)
def test_every_divergence_is_taken(tmp_path, name):
    """Fault: a documented divergence is refused, or not known to the code that computes it."""
    divergences = pytest.importorskip("model.losses.divergences")
    config = load(tmp_path, distillation(kl_div=name)).distillation_kwargs
    assert config.kl_div == name
    assert callable(divergences.choose_divergence(name, beta=config.beta, lambda_=config.lambda_, mu=config.mu))


@pytest.mark.parametrize("values", config_samples.KD_EDGES)
def test_values_in_range_are_kept(tmp_path, values):
    """Fault: a value at the edge of its range is refused, or changed on the way in."""
    kept = json.loads(config_json(load(tmp_path, distillation(**values))))["distillation_kwargs"]
    assert {key: kept[key] for key in values} == values


# -- lambda ------------------------------------------------------------------------------------------------------


def test_lambda_keeps_its_name_all_the_way(tmp_path):
    """Fault: lambda, a word of Python, is read, set or printed under another name, or lost on the way back."""
    in_file = load(tmp_path, distillation(**{"lambda": 0.3, "kl_div": "skew_forward"}))
    overridden = load(tmp_path, distillation(kl_div="skew_forward"), "distillation_kwargs.lambda=0.3")
    assert in_file == overridden and in_file.distillation_kwargs.lambda_ == 0.3
    text = config_json(in_file)
    assert '"lambda": 0.3' in text and "lambda_" not in text
    assert load(tmp_path, text) == in_file


def test_lambda_is_called_lambda_in_what_users_see(tmp_path):
    """Fault: an error, a warning, the schema or docs/config.md names a key lambda_ that cannot be set."""
    assert refusal(tmp_path, distillation(lambda_=0.3)) == [
        "config.json: distillation_kwargs.lambda_ is unknown: did you mean lambda?"]
    assert warnings_of(load(tmp_path, distillation(**{"lambda": 0.3}))) == [
        "distillation_kwargs.lambda has no effect: it belongs to kl_div skew_forward and skew_reverse, and kl_div is "
        "forward"]
    assert "lambda" in schema(DistillConfig)["$defs"]["DistillationKwargs"]["properties"]
    reference = (ROOT / "docs/config.md").read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert "| `lambda` |" in reference and "lambda_" not in reference + json.dumps(schema(DistillConfig))


@pytest.mark.parametrize("content", [
    TEACHER, json.loads((ROOT / "config_kd.json").read_text(encoding="utf-8")),
    distillation(teacher_cache={"kind": "top_k", "top_k": 5}, student_init="teacher_layers", student_layers=[0, 2]),
    distillation(method="policy_gradient", **OF_POLICY),
])
def test_round_trip(tmp_path, content):
    """Fault: the config.json of a run folder does not repeat the run: a value is lost, changed or refused."""
    config = load(tmp_path, content)
    assert load(tmp_path, config_json(config)) == config


# -- wrong keys and values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"model_arch": {"lang_model": "gpt2"}},
         "model_arch.lang_model is unknown: did you mean model_arch.student_lang_model?"),
        ({"model_arch": {"gpu_device_id": 0}},
         "model_arch.gpu_device_id is unknown: did you mean model_arch.student_gpu_device_id?"),
        ({"lang_model": "gpt2"}, "lang_model is unknown: did you mean model_arch.student_lang_model?"),
        ({"model_arch": {"techer_lang_model": "x"}},
         "model_arch.techer_lang_model is unknown: did you mean teacher_lang_model?"),
        ({"trainer_kwargs": {"teacher_checkpoint_path": "x"}},
         "trainer_kwargs.teacher_checkpoint_path is unknown: did you mean teacher_ckpt_path?"),
        ({"trainer_kwargs": {"temperature": 2}},
         "trainer_kwargs.temperature is unknown: temperature belongs in distillation_kwargs"),
        ({"distillation_kwargs": {"top_k": 2}},
         "distillation_kwargs.top_k is unknown: top_k belongs in distillation_kwargs.teacher_cache"),
        ({"distillation_kwargs": {"kl_dv": "JS"}}, "distillation_kwargs.kl_dv is unknown: did you mean kl_div?"),
        ({"distillation_kwargs": {"teacher_cache": {"knd": "hidden"}}},
         "distillation_kwargs.teacher_cache.knd is unknown: did you mean kind?"),
        ({"distillation_kwargs": {"rollout_temprature": 2}},
         "distillation_kwargs.rollout_temprature is unknown: did you mean rollout_temperature?"),
        ({"distillation_kwargs": {"rolout": "labels"}}, "distillation_kwargs.rolout is unknown: did you mean rollout?"),
        ({"distillation_kwargs": {"importance_weights": "token"}},
         "distillation_kwargs.importance_weights is unknown: did you mean importance_weight?"),
        ({"trainer_kwargs": {"lm_weight": 1}},
         "trainer_kwargs.lm_weight is unknown: lm_weight belongs in distillation_kwargs"),
        ({"distilation_kwargs": {}}, "distilation_kwargs is unknown: did you mean distillation_kwargs?"),
    ],
)
def test_unknown_keys(tmp_path, content, line):
    """Fault: a mistyped key, or one of config.json, is ignored, or refused without the key that was meant."""
    assert refusal(tmp_path, content) == [f"config.json: {line}"]


@pytest.mark.parametrize(("key", "value", "line"), config_samples.KD_WRONG_VALUES)
def test_wrong_values(tmp_path, key, value, line):
    """Fault: a value out of range or of another type is taken, or refused without value, expectation and remedy."""
    assert refusal(tmp_path, distillation(**{key: value})) == [f"config.json: distillation_kwargs.{key} {line}"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (distillation(teacher_cache={"kind": "hiden"}),
         'distillation_kwargs.teacher_cache.kind is "hiden": expected one of "hidden", "top_k"; write "hidden"'),
        (distillation(teacher_cache={"top_k": 0}),
         "distillation_kwargs.teacher_cache.top_k is 0: expected a whole number of at least 1"),
        (distillation(teacher_cache={"dtype": "float16"}), 'distillation_kwargs.teacher_cache.dtype is "float16": '
         'expected one of "auto", "float32", "bfloat16"; write "bfloat16"'),
        (distillation(teacher_cache={"dir": ""}),
         'distillation_kwargs.teacher_cache.dir is "": expected a string that is not empty, or null'),
        (distillation(student_layers=[0, -1]),
         "distillation_kwargs.student_layers[1] is -1: expected a whole number of at least 0"),
        ({"model_arch": {"teacher_lang_model": "x", "teacher_gpu_device_id": -1}},
         "model_arch.teacher_gpu_device_id is -1: expected a whole number of at least 0, or null"),
        ({"model_arch": {"teacher_lang_model": "x", "student_lang_model": None}},
         "model_arch.student_lang_model is null: expected a string that is not empty"),
        ({"model_arch": {"teacher_lang_model": ""}},
         'model_arch.teacher_lang_model is "": expected a string that is not empty, or null'),
        (TEACHER | {"trainer_kwargs": {"student_ckpt_path": ""}},
         'trainer_kwargs.student_ckpt_path is "": expected a string that is not empty, or null'),
    ],
)
def test_wrong_values_elsewhere(tmp_path, content, line):
    """Fault: the place of a wrong value in an inner section or in a list is not named."""
    assert refusal(tmp_path, content) == [f"config.json: {line}"]


def test_errors_name_the_override(tmp_path):
    """Fault: a mistake on the command line is looked for in the file."""
    text = "distillation_kwargs.teacher_cache=hidden"
    assert refusal(tmp_path, TEACHER, text) == [
        f'--set {text}: distillation_kwargs.teacher_cache is "hidden" (a string): expected an object, or null; write '
        '{"kind": "hidden"}']
    assert load(tmp_path, TEACHER, "distillation_kwargs.teacher_cache.kind=top_k").distillation_kwargs.teacher_cache


# -- keys that exclude each other --------------------------------------------------------------------------------

LAYERS = {"student_init": "teacher_layers"}
POLICY = {"method": "policy_gradient"}


def parts(arch: dict | None = None, trainer: dict | None = None, kwargs: dict | None = None) -> dict:
    arch = {"teacher_lang_model": "gpt2-medium"} | (arch or {})
    return {"model_arch": arch, "trainer_kwargs": trainer or {}, "distillation_kwargs": kwargs or {}}


@pytest.mark.parametrize(
    ("content", "keys", "remedies"),
    [
        (parts({"teacher_lang_model": None}), ["model_arch.teacher_lang_model", "trainer_kwargs.teacher_ckpt_path"],
         ["model_arch.teacher_lang_model=x", "trainer_kwargs.teacher_ckpt_path=x"]),
        (parts({"teacher_lang_model": None}, {"teacher_ckpt_path": "old/model.pt"}),
         ["model_arch.teacher_lang_model", "trainer_kwargs.teacher_ckpt_path", ".pt"],
         ["model_arch.teacher_lang_model=gpt2-medium", "trainer_kwargs.teacher_ckpt_path=runs/model"]),
        (parts(None, {"student_ckpt_path": "x"}, LAYERS),
         ["trainer_kwargs.student_ckpt_path", "distillation_kwargs.student_init"],
         ["trainer_kwargs.student_ckpt_path=null", "distillation_kwargs.student_init=null"]),
        (parts({"from_scratch": True}, {"student_ckpt_path": "x"}),
         ["trainer_kwargs.student_ckpt_path", "model_arch.from_scratch"],
         ["trainer_kwargs.student_ckpt_path=null", "model_arch.from_scratch=false"]),
        (parts({"from_scratch": True}, None, LAYERS),
         ["distillation_kwargs.student_init", "model_arch.from_scratch"],
         ["distillation_kwargs.student_init=null", "model_arch.from_scratch=false"]),
        (parts(None, None, {"student_layers": [0]}),
         ["distillation_kwargs.student_layers", "distillation_kwargs.student_init"],
         ["distillation_kwargs.student_layers=null", "distillation_kwargs.student_init=teacher_layers"]),
        (parts({"architecture": {"n_layer": 2}}, {"student_ckpt_path": "x"}),
         ["trainer_kwargs.student_ckpt_path", "model_arch.architecture"],
         ["trainer_kwargs.student_ckpt_path=null", "model_arch.architecture={}"]),
        (parts({"tokenizer": "x"}, None, LAYERS), ["model_arch.tokenizer", "distillation_kwargs.student_init"],
         ["model_arch.tokenizer=null", "distillation_kwargs.student_init=null"]),
        (parts(None, None, POLICY | {"teacher_cache": {}}),
         ["distillation_kwargs.teacher_cache", "distillation_kwargs.method", "highlights"],
         ["distillation_kwargs.teacher_cache=null", "distillation_kwargs.method=divergence"]),
        (parts(None, None, POLICY | {"on_policy_fraction": 0.5}),
         ["distillation_kwargs.on_policy_fraction", "distillation_kwargs.method", "by rollout"],
         ["distillation_kwargs.on_policy_fraction=0", "distillation_kwargs.method=divergence"]),
        (parts(None, None, {"on_policy_fraction": 0.5, "teacher_cache": {}}),
         ["distillation_kwargs.on_policy_fraction", "distillation_kwargs.teacher_cache", "highlights"],
         ["distillation_kwargs.on_policy_fraction=0", "distillation_kwargs.teacher_cache=null"]),
        (parts(None, {"monitor_test": True}), ["trainer_kwargs.monitor_test", "dataset_kwargs.test_dataset"],
         ["trainer_kwargs.monitor_test=false", "dataset_kwargs.test_dataset=x"]),
    ],
)
def test_contradictions(tmp_path, content, keys, remedies):
    """Fault: of two keys that exclude each other one is quietly ignored; or the remedy that is told does not work."""
    lines = refusal(tmp_path, content)
    assert len(lines) == 1 and lines[0].startswith("config.json: ")
    assert [key for key in keys if key not in lines[0]] == []
    for remedy in remedies:
        load(tmp_path, content, remedy)


def test_all_contradictions_at_once_each_in_one_line(tmp_path):
    """Fault: the user mends one contradiction only to meet the next."""
    lines = refusal(tmp_path, parts(
        {"teacher_lang_model": None, "from_scratch": True, "architecture": {"n_layer": 1}, "tokenizer": "a b"},
        {"student_ckpt_path": "a b", "teacher_ckpt_path": "a b.pt", "monitor_test": True},
        LAYERS | POLICY | {"teacher_cache": {}, "on_policy_fraction": 1},
    ))
    assert len(lines) == 9 and all(line.startswith("config.json: ") and ": " in line[13:] for line in lines)


def test_what_goes_together(tmp_path):
    """Fault: a combination that is meant to work is refused: a cache with several GPUs, a .pt of a named teacher."""
    good = [
        parts(None, {"multi_gpu": True}, {"teacher_cache": {"kind": "hidden"}}),
        parts(None, {"teacher_ckpt_path": "old.pt"}),
        parts({"teacher_lang_model": None}, {"teacher_ckpt_path": "runs/x", "student_ckpt_path": "runs/y"}),
        parts({"from_scratch": True, "architecture": {"n_layer": 2}, "tokenizer": "x"}),
        parts({"architecture": {"n_layer": 2}}, None, LAYERS),
        parts(None, {"student_ckpt_path": "old.pt"}),
        parts(None, None, {"on_policy_fraction": 1, "rollout_top_p": 0.9}),
        parts(None, None, POLICY | {"temperature": 2, "chunk_size": 1}),
        parts(None, {"multi_gpu": True}, POLICY | LAYERS | {"rollout": "labels", "rollout_epochs": 2}),
    ]
    assert [warnings_of(load(tmp_path, content)) for content in good] == [[]] * len(good)


# -- what has no effect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [("beta", 0.3, ["generalized_js"]), ("lambda", 0.3, ["skew_forward", "skew_reverse"]), ("mu", 0.3, ["symmetric"])],
)
def test_numbers_of_another_divergence(tmp_path, key, value, theirs):
    """Fault: a number is tuned that the divergence does not have; or one that it has is warned of."""
    for name in KL_DIVS:
        lines = warnings_of(load(tmp_path, distillation(**{key: value, "kl_div": name})))
        assert len(lines) == (name not in theirs)
        for line in lines:
            assert line.startswith(f"distillation_kwargs.{key} has no effect: ")
            assert all(other in line for other in [*theirs, f"kl_div is {name}"])
        assert warnings_of(load(tmp_path, distillation(**{key: KD_KWARGS[key], "kl_div": name}))) == []


def test_temperature_without_divergence(tmp_path):
    """Fault: a temperature is tuned while the divergence has no weight; or is warned of where it has one."""
    assert warnings_of(load(tmp_path, distillation(temperature=2, kd_weight=0))) == [
        "distillation_kwargs.temperature has no effect: it belongs to the divergence, and kd_weight is 0"]
    assert warnings_of(load(tmp_path, distillation(temperature=2, kd_weight=0.1))) == []
    assert warnings_of(load(tmp_path, distillation(kd_weight=0))) == []


def test_warnings_of_both_configs_add_up(tmp_path):
    """Fault: the warnings of train.py's keys are lost in train_kd.py, or the other way round."""
    content = distillation(beta=0.3, mu=0.1) | {"trainer_kwargs": {"use_cache": True}}
    assert [line.split(" ")[0] for line in warnings_of(load(tmp_path, content))] == [
        "trainer_kwargs.use_cache", "distillation_kwargs.beta", "distillation_kwargs.mu"]


DRAWING = {"rollout_temperature", "rollout_top_k", "rollout_top_p", "rollout_batch_size"}
PENALTIES = {"frequency_weight", "diversity_weight", "entropy_weight", "entropy_floor"}
OF_DIVERGENCE = {"kl_div": "JS", "kd_weight": 0, "beta": 0.3, "lambda": 0.3, "mu": 0.3}


@pytest.mark.parametrize(
    ("values", "without_effect"),
    [
        (POLICY | OF_POLICY, {}),
        (OF_POLICY | {"rollout": "student"}, {*OF_POLICY, "rollout"}),
        (OF_POLICY | {"on_policy_fraction": 0.5}, {*OF_POLICY} - DRAWING),
        (POLICY | OF_DIVERGENCE | {"temperature": 2}, OF_DIVERGENCE),
        (POLICY | OF_POLICY | {"rollout": "student"}, {"alpha"}),
        (POLICY | OF_POLICY | {"rollout": "teacher"}, {"alpha"}),
        (POLICY | OF_POLICY | {"rollout": "labels"}, {"alpha", "importance_weight", *DRAWING}),
        (POLICY | OF_POLICY | {"penalty": False}, PENALTIES),
        (POLICY | {"temperature": 2, "lm_weight": 1}, {"temperature"}),
        ({"temperature": 2, "on_policy_fraction": 0.5, "kd_weight": 0}, {"temperature", "on_policy_fraction"}),
    ],
)
def test_keys_of_another_method(tmp_path, values, without_effect):
    """Fault: a key is tuned that the method or its rollouts do not read; one that is read is warned of; or twice."""
    lines = warnings_of(load(tmp_path, distillation(**values)))
    starts = [f"distillation_kwargs.{key} has no effect: " for key in without_effect]
    assert sorted(line.split(": ")[0] + ": " for line in lines) == sorted(starts)


def test_dropout_of_policy_gradient(tmp_path):
    """Fault: dropout that makes drawing and loss differ is not warned of; or null, 0 or another method's dropout is."""
    found = {(method, dropout): warnings_of(load(tmp_path, parts({"dropout": dropout}, None, {"method": method})))
             for method in ("divergence", "policy_gradient") for dropout in (None, 0, 0.1)}
    (line,) = found.pop(("policy_gradient", 0.1))
    assert line.startswith("model_arch.dropout is 0.1: ") and "policy_gradient" in line and "null" in line
    assert all(lines == [] for lines in found.values())
