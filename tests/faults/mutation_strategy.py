"""Valid runs, and hypothesis strategies that change them: configs, arguments, tables and model folders.

A mutation is a tuple (kind, what, ...) of plain values, so that a failing example can be read, repeated and made
smaller. The keys and their ranges come from the JSON Schemas that users have. Left out, since they are taken at their
word and have no end: many workers, large architectures, `compile`, --find_batch_size.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from tests.conftest import ROOT, tiny_gpt2, write_rows
from tests.small_kd_runs import save_model
from tests.small_runs import WORDS, changed

SCHEMAS = {"train.py": "config.schema.json", "train_kd.py": "config_kd.schema.json"}
TABLES = ("data/train.csv", "data/validation.csv", "data/test.csv")
MODEL_FILES = tuple(f"{folder}/{name}" for folder in ("model", "student", "teacher")
                    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))


class Start(NamedTuple):
    """A valid run: its script, the content of its --config file if it has one, its other arguments."""

    script: str
    config: dict | None
    arguments: tuple[str, ...] = ()


class Example(NamedTuple):
    """start: key of STARTS. earlier: whether a finished run is in the output folder."""

    start: str
    earlier: bool
    mutations: tuple[tuple, ...]


# -- valid runs ----------------------------------------------------------------------------------------------------


def write_project(folder: Path) -> None:
    """Models and tables that every run uses."""
    for name, seed, width, layers in (("model", 1, 8, 1), ("student", 2, 8, 1), ("teacher", 3, 16, 2)):
        network = tiny_gpt2(seed=seed, width=width, layers=layers, positions=320, std=0.2)
        save_model(folder / name, network)
    torch.save({f"module.{key}": value for key, value in network.state_dict().items()}, folder / "legacy.pt")
    (folder / "data").mkdir()
    for name, count in (("train", 4), ("validation", 2), ("test", 2)):
        write_rows(folder / f"data/{name}.csv", [
            {"id": f"{name}-{row}", "article": " ".join(WORDS[row : 4 + 2 * row]), "highlights": f"{WORDS[row]}, café",
             "category": "news", "facts": f'["{WORDS[row]}"]'} for row in range(count)])


def sections(**changes: dict) -> dict:
    return changed({
        "_description": "a small run",
        "model_arch": {"lang_model": "model", "generation_kwargs": {"max_generation_length": 4}},
        "trainer_kwargs": {"output_dir": "run", "metrics": [], "device": "cpu", "precision": "float32", "epochs": 1,
                           "max_steps": 2, "log_every": 1, "keep_checkpoints": 1},
        "optimizer_kwargs": {"type": "AdamW", "lm_lr": 0.01, "kwargs": {"weight_decay": 0.1}},
        "lr_scheduler_kwargs": {"num_warmup_steps": 1},
        "callbacks_kwargs": {"kwargs": {"mode": "min"}},
        "dataset_kwargs": {"data_dir": "data", "train_dataset": "train.csv", "validation_dataset": "validation.csv",
                           "train_batch_size": 2, "val_batch_size": 2, "cache_dir": "cache"},
    }, **changes)


def distilling(**distillation) -> dict:
    arch = {"student_lang_model": "student", "generation_kwargs": {"max_generation_length": 4}}
    config = sections(trainer_kwargs={"teacher_ckpt_path": "teacher", "max_steps": 1})
    return {**config, "model_arch": arch, "distillation_kwargs": distillation}


VALIDATE = {"csv_path": "data/test.csv", "model_path": "model", "output_dir": "run", "max_generation_length": 4,
            "batch_size": 2, "precision": "float32", "device_id": -1}
MEASURED = {
    "trainer_kwargs": {"metrics": ["rouge"], "save_predictions": True, "monitor_train": True, "monitor_test": True,
                       "n_batch_ckpt_save": 1, "adaptive_loss_scaling": True, "loss_scaling_batch": 1},
    "dataset_kwargs": {"test_dataset": "test.csv", "on_bad_row": "skip", "columns": {"id": "id"}},
}
STARTS = {
    "fine-tuning": Start("train.py", sections()),
    "fine-tuning, all measured": Start("train.py", sections(**MEASURED)),
    "from scratch": Start("train.py", sections(model_arch={"from_scratch": True, "architecture": {"n_layer": 1},
                                                           "tokenizer": "model", "dropout": 0.1})),
    "divergence": Start("train_kd.py", distilling(kl_div="generalized_js", beta=0.3, chunk_size=8)),
    "top-k cache": Start("train_kd.py", distilling(teacher_cache={"kind": "top_k", "top_k": 5}, kl_div="JS")),
    "on-policy": Start("train_kd.py", distilling(on_policy_fraction=1.0, rollout_temperature=0.9)),
    "policy gradient": Start("train_kd.py", distilling(method="policy_gradient", rollout_batch_size=2, penalty=True)),
    "evaluation by flags": Start("validate_model.py", None,
                                 tuple(f"--{name}={value}" for name, value in VALIDATE.items())),
    "evaluation by file": Start("validate_model.py", {**VALIDATE, "num_beams": 2, "on_bad_row": "skip"}),
    "evaluation of a legacy file": Start("validate_model.py",
                                         {**VALIDATE, "model_path": "legacy.pt", "model_name": "teacher"}),
}

# -- values --------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 1.0, -0.5, 1e-9, 5e-324, 1e30, 1e308, float("nan"), float("inf"), 2**31, 2**63,
           10**18, 10**30]
TEXTS = [
    "", " ", "a", "null", "true", "1", "-1", "1e5", "nan", "1_000", "gpt2", "cuda", "auto", "AdamW", "SGD", "Muon",
    "Adafactor", "rouge", "JS", "reverse", "policy_gradient", "{article}", "a{article}", "x" * 5000, "\u202eabc",
    "\ufeff", "a\nb", "train.py: error: x\ny", "\x1b[31mred\x1b[0m", "%s", "{}", "$HOME", "'", "../other", "org/name",
    ".", "data", "model", "teacher", "run", "cache", "data/train.csv", "test.csv", "legacy.pt", "model/config.json",
    "missing", "data/train.csv/below", "run/model_checkpoints/last", "/dev/null", "/dev/full", "x" * 300, "a b", "-x",
]
OTHERS = [
    None, True, False, [], {}, [1], [None], ["rouge"], ["rouge", "rouge"], [[]], {"a": 1}, {"": ""},
    {"_description": "x"}, {"kind": "top_k"}, {"kind": "hidden"}, {"id": None}, {"article": "id"}, {"n_layer": 2},
    {"n_embd": 7}, {"n_head": 3}, {"n_layer": 0}, {"vocab_size": 10}, {"n_positions": 5}, {"n_layer": "two"},
    {"model_type": "bert"}, {"weight_decay": "0.1"}, {"lr": 1}, {"betas": [0.9, 1.5]}, {"eps": 0}, {"params": []},
    {"momentum": 0.9}, {"weight_decay": 1e30}, {"max_generation_length": 10**6}, {"mode": "max"},
]
ARGUMENTS = [
    ["--help"], ["--print_config"], ["--unknown"], ["positional"], ["--config"], ["--set"], ["--set", ""],
    ["--set", "="], ["--set", "a=1"], ["--set", "trainer_kwargs"], ["--set", "trainer_kwargs={}"],
    ["--set", "trainer_kwargs=null"], ["--set", "trainer_kwargs.epochs.x=1"], ["--set", "trainer_kwargs..epochs=1"],
    ["--config", "missing.json"], ["--config", "data"], ["--config", "data/train.csv"], ["--config", "/dev/null"],
    ["--confg", "config.json"], [""], ["--set", "trainer_kwargs.load_from_checkpoint=false"],
    ["--set", "trainer_kwargs.resume_from=run/model_checkpoints/last", "--set", "trainer_kwargs.output_dir=other"],
    ["--set", "trainer_kwargs.seed=5"], ["--set", "trainer_kwargs.epochs=2", "--set", "trainer_kwargs.max_steps=3"],
]
CELLS = ["", " ", "x", "word " * 4000, "\x1b[31m", "\n\n", '"', ",", "=1+1", "<|endoftext|>", "NaN", "train-0", "a\rb",
         "[1]", '["storm"', "{article}", "𝔘𝔫𝔦"]
INSERTED = [b"", b"\0", b"\xff", b'"', b"'", b",", b":", b"}", b"[", b"\\", b"\n", b"\r\n", b"\t", b"\xef\xbb\xbf",
            b"\x1b[2J", b"# x", b"NaN", b"1e999", b'""', "é".encode(), "\u2028".encode()]
MODEL_VALUES = {"model_type": ["bert", "", 5], "n_layer": [0, 2, "two"], "n_embd": [7, 12], "n_head": [0, 3],
                "vocab_size": [10, -1], "eos_token_id": [None, 10**6], "prompt_template": ["", 5, "x"],
                "auto_map": [{"AutoConfig": "x.Y"}], "quantization_config": [{"quant_method": "fp8"}]}


@cache
def keys(script: str) -> dict[tuple[str, ...], list]:
    """{path of a key or section: the values that its schema lists, and those around the ends of its range}."""
    if script not in SCHEMAS:
        return {(name,): [] for name in (*VALIDATE, "model_name", "num_beams", "on_bad_row", "prompt_template")}
    schema = json.loads((ROOT / SCHEMAS[script]).read_text(encoding="utf-8"))
    found: dict[tuple[str, ...], list] = {}

    def walk(node: dict, path: tuple[str, ...]) -> None:
        for choice in (node, *node.get("anyOf", [])):
            if "$ref" in choice:
                choice = schema["$defs"][choice["$ref"].rsplit("/", 1)[1]]
            bounds = [choice[name] for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
                      if name in choice]
            values = [*choice.get("enum", []), *([choice["const"]] if "const" in choice else []),
                      *(bound + add for bound in bounds for add in (-1, 0, 1))]
            if path:
                found.setdefault(path, []).extend(values)
            for name, part in choice.get("properties", {}).items():
                if name not in ("compile", "num_workers"):
                    walk(part, (*path, name))

    walk(schema, ())
    return found


# -- mutations -----------------------------------------------------------------------------------------------------


@st.composite
def of_config(draw, script: str) -> tuple:
    path = draw(st.sampled_from(sorted(keys(script))))
    listed, anything = keys(script)[path], st.sampled_from([*NUMBERS, *TEXTS, *OTHERS])
    value = st.sampled_from(listed) | anything if listed else anything
    name = path[-1]
    names = st.sampled_from([name[1:], f"{name}x", name.upper(), name.replace("_", "-"), f"_description_{name}", "é"])
    paths = st.sampled_from(sorted(keys(script)))
    return draw(st.one_of(
        st.tuples(st.just("value"), st.just(path), value), st.tuples(st.just("value"), st.just(path), value),
        st.tuples(st.just("delete"), st.just(path)), st.tuples(st.just("rename"), st.just(path), names),
        st.tuples(st.just("swap"), st.just(path), paths), st.tuples(st.just("override"), st.just(path), value),
    ))


def damaged(files: tuple[str, ...]):
    """(kind, file, operation, two places in millionths of its length, bytes)."""
    places = st.integers(0, 10**6)
    return st.tuples(st.just("bytes"), st.sampled_from(files), st.sampled_from(["drop", "flip", "insert", "cut"]),
                     places, places, st.sampled_from(INSERTED))


def of_tables():
    table, row, column = st.sampled_from(TABLES), st.integers(0, 4), st.integers(0, 4)
    return st.one_of(
        damaged(TABLES), st.tuples(st.just("cell"), table, row, column, st.sampled_from(CELLS)),
        st.tuples(st.just("rows"), table, st.sampled_from(["drop", "double", "short", "long", "header only"]), row),
        st.tuples(st.just("column"), table, st.sampled_from(["drop", "double", "rename"]), column),
        st.tuples(st.just("encoding"), table, st.sampled_from(["utf-16", "utf-8-sig", "latin-1"])),
        st.tuples(st.just("content"), table, st.sampled_from([b"", b"\n", b"{}", b"\x89PNG\r\n\x1a\n", b"\0" * 100])),
    )


def of_files():
    model_values = [(key, value) for key, values in MODEL_VALUES.items() for value in values]
    return st.one_of(
        st.tuples(st.just("file"), st.sampled_from([*MODEL_FILES, *TABLES, "legacy.pt"]),
                  st.sampled_from(["delete", "empty", "folder"])),
        damaged((*MODEL_FILES, "legacy.pt")),
        st.tuples(st.just("model key"), st.sampled_from(MODEL_FILES[::4]), st.sampled_from(model_values)),
    )


@st.composite
def examples(draw) -> Example:
    name = draw(st.sampled_from(list(STARTS)))
    start = STARTS[name]
    groups = [st.tuples(st.just("arguments"), st.sampled_from(ARGUMENTS)), of_tables(), of_tables(), of_files()]
    if start.config is not None:
        groups += [of_config(start.script)] * 6 + [damaged(("experiment.json",))]
    return Example(name, draw(st.booleans()), tuple(draw(st.lists(st.one_of(groups), min_size=1, max_size=3))))
