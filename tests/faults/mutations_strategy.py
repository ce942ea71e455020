"""Hypothesis strategies: 1 to 3 mutations of a valid case. A mutation is a tuple (kind, where and what, in plain
values), so that a failing example can be read, repeated and made smaller.

Bounded, because a run that takes them at their word has no end: whole numbers that are a count of work to do are huge
or small, where the other bound of the run (epochs and max_steps) stays; architectures have at most a few blocks;
num_workers is at most 2, or beyond what is accepted; `compile` (minutes of compilation) and --find_batch_size (which
needs a GPU) are left out. A run that is still going on after its time is stopped by SIGTERM, which
must end it in order.
"""

import string
from functools import cache
from typing import NamedTuple

from hypothesis import strategies as st

from tests.faults.mutations_cases import CASES, CONFIG_FILE, SCRIPTS, TOGETHER
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.reference import constants, leaves
from utils.config.validate_options import ValidateOptions

MODELS = dict(zip(SCRIPTS, (FineTuneConfig, DistillConfig, ValidateOptions), strict=True))
LEFT_OUT = {"compile"}
DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]

NUMBERS = [
    0, 1, -1, 2, 3, 7, 0.5, 1.0, 1.5, -0.5, -0.0, 1e-9, 5e-324, 1e30, 1e308, -1e308, float("nan"), float("inf"),
    float("-inf"), 2**31, 2**32, 2**53 + 1, 2**63, -(2**63) - 1, 10**18, 10**30, 10**399, 10**500,
]
NAMES_OF_FILES = [
    ".", "..", "~", "data", "model", "teacher", "run", "cache", "data/train.csv", "data/subset.csv", "train.csv",
    "test.csv", "legacy.pt", "model/config.json", "model/model.safetensors", "missing", "missing/folder",
    "data/train.csv/below", "run/model_checkpoints", "run/model_checkpoints/last", "config.json", "/proc/self",
    "/proc/none", "/dev/null", "/dev/null/below", "/dev/full", "x" * 300, "d/" * 2500, "a b", "Ünï/cødé", "-x",
    "--debug",
]
TEXTS = [
    "", " ", "\n", "\t", "a", "null", "true", "True", "none", "1", "-1", "1e5", "nan", "0x10", "١٢", "1_000", "gpt2",
    "cuda", "auto", "AdamW", "Optimizer", "lr_scheduler", "rouge", "{article}", "{article}{article}", "a{article}",
    "{article}" + "b" * 5000,
    "\ud800{article}", "\0{article}", "x" * 5000, "中文", "e\u0301", "👩\u200d👧",
    "\u202eabc", "\ufeff", "\ud800", "a\udcff",
    "a\0b", "a\nb", "train.py: error: x\ny", "\x1b[31mred\x1b[0m", "\x07", "%s", "{}",
    "$HOME", "'", '"', "\\", "../other", "a/b/c", "org/name", "file:///x", "s3://b/k",
]
OTHERS = [
    None, True, False, [], {}, [1], [None], ["rouge"], ["rouge", "rouge"], [[]], [0, 0], [-1], {"a": 1}, {"": ""},
    {"_description": "x"}, {"kind": "top_k"}, {"kind": "hidden", "dir": "data"}, {"id": None}, {"article": "id"},
    {"n_layer": 1}, {"n_layer": 2, "n_embd": 12}, {"n_embd": 7}, {"n_embd": 10**9}, {"n_head": 3}, {"n_layer": 0},
    {"vocab_size": 10}, {"n_positions": 5}, {"activation_function": "none"}, {"n_layer": "two"}, {"n_layer": 1.5},
    {"model_type": "bert"}, {"resid_pdrop": 2}, {"weight_decay": "0.1"}, {"lr": 1}, {"betas": [0.9, 1.5]},
    {"fused": True, "foreach": True}, {"eps": 0}, {"maximize": True}, {"params": []}, {"momentum": 0.9},
    {"differentiable": True}, {"weight_decay": 1e30}, {"weight_decay": [0.1]}, DEEP,
]
VALUES = st.one_of(*map(st.sampled_from, (NUMBERS, NAMES_OF_FILES, TEXTS, OTHERS)))
WEIRD_OVERRIDES = [
    "", "=", "a", "a=", "=1", ".=1", "..=", "a.b=1", "trainer_kwargs", "trainer_kwargs=", "trainer_kwargs={}",
    "trainer_kwargs=null", "trainer_kwargs.epochs", "trainer_kwargs.epochs=", "trainer_kwargs.epochs=1=2",
    " trainer_kwargs.epochs=1", "trainer_kwargs.epochs =1", "trainer_kwargs.epochs= 1", "--epochs=1",
    "trainer_kwargs.epochs.x=1", "trainer_kwargs..epochs=1", "trainer_kwargs.epochs='2'", "x." * 3000 + "y=1",
    "$schema=x", "_description=x", "trainer_kwargs._description.a=1", "model_arch.architecture.n_layer=2",
    "a" * 5000 + "=1", "trainer_kwargs.seed=" + "9" * 5000, "trainer_kwargs.seed=[" * 500, "ä.ö=ü",
    "trainer_kwargs.output_dir=a\nb", "trainer_kwargs.output_dir=\udcff", 'trainer_kwargs={"a":1,"a":2}',
]
WEIRD_FLAGS = [
    ["--help"], ["--print_config"], ["--debug"], ["--unknown"], ["--unknown=1"], ["positional"], ["--config"],
    ["--set"], ["--config="], ["--config", "missing.json"], ["--config", "data"], ["--config", "data/train.csv"],
    ["--config", "/dev/null"], ["--config", "x" * 5000], ["--config", "a\nb"],
    ["--confg", "config.json"], ["--con", "config.json"], ["-x"], ["--"], [""], ["--\udcff"], ["--a\nb"],
    ["--set", "trainer_kwargs.epochs=1", "--set", "trainer_kwargs.epochs=0"],
]
INSERTED = [
    b"", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b'"', b"'", b",", b":", b"}", b"{", b"[", b"\\", b"\\u", b"\n",
    b"\r", b"\r\n", b"\t", b" ", b"\xef\xbb\xbf", b"\x1b[2J", b"//", b"/* x */", b"#", b"NaN", b"True", b"-",
    b"1e999", b";", b'""', b'"""', b"\\ud800", "é".encode(), "\u2028".encode(), b"[" * 3000, b"9" * 400,
    b'{"a":' * 200,
]
ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1252"]
CELLS = [
    "", " ", "\u00a0", "x", "x" * 30_000, "word " * 4000, "\0", "\x1b[31m", "\x07\x08", "\n\n\n", '"', '""', ",",
    "\u202e", "\ud800", "=1+1", "<script>alert(1)</script>", "<|endoftext|>", "NaN", "null", "train-0", "a\rb",
    "\ufeff", "[" * 9000, "[1]", '["storm"', "{}", "9" * 5000, "1e999", "{article}", "%s%n", "../../x", "𝔘𝔫𝔦",
    "é" * 3000,
]
FILES = ["data/train.csv", "data/validation.csv", "data/test.csv", "data/subset.csv"]
MODEL_FILES = [f"{folder}/{name}" for folder in ("model", "student", "teacher") for name in (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]
MODEL_KEYS = [
    "model_type", "architectures", "n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "eos_token_id",
    "bos_token_id", "activation_function", "attn_pdrop", "layer_norm_epsilon", "tie_word_embeddings", "dtype",
    "torch_dtype", "prompt_template", "prompt_max_length", "auto_map", "quantization_config", "n_inner",
    "scale_attn_weights", "transformers_version", "eos_token", "pad_token", "model_max_length", "tokenizer_class",
    "added_tokens_decoder", "chat_template",
]


class Example(NamedTuple):
    """case: key of CASES. earlier: whether a finished run is in the output folder. mutations: in the order of KINDS."""

    case: str
    earlier: bool
    mutations: tuple[tuple, ...]


@cache
def paths_of(case: str) -> list[tuple]:
    """Dotted paths of the keys and sections of a case's config, those that it does not set too."""
    model = MODELS[CASES[case].script]
    known = [path for path, _ in leaves(model.model_json_schema()) if path[-1] not in LEFT_OUT]
    return known + sorted({path[:depth] for path in known for depth in range(1, len(path))})


@cache
def listed_values(case: str) -> dict[tuple, list]:
    """The values that the schema lists, and those at the ends of ranges, for each key."""
    found: dict[tuple, list] = {}
    for path, node in leaves(MODELS[CASES[case].script].model_json_schema()):
        values = constants(node)
        for choice in (node, *node.get("anyOf", [])):
            for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
                if name in choice:
                    values = [*values, choice[name], choice[name] - 1, choice[name] + 1]
        if values and path[-1] not in LEFT_OUT:
            found[path] = values
    return found


def is_bounded(path: tuple, value) -> bool:
    """False for a value that would be taken at its word and is too much work to test."""
    if path[-1:] == ("num_workers",):
        return not isinstance(value, int) or value <= 2 or value > 10**6
    return not (path[-1:] == ("n_layer",) and isinstance(value, (int, float)) and value > 4)


@st.composite
def new_value(draw, case: str) -> tuple:
    path = draw(st.sampled_from(paths_of(case)))
    listed = listed_values(case).get(path)
    values = st.one_of(st.sampled_from(listed), VALUES) if listed else VALUES
    return "value", path, draw(values.filter(lambda value: is_bounded(path, value)))


@st.composite
def other_key(draw, case: str) -> tuple:
    path = draw(st.sampled_from(paths_of(case)))
    name = path[-1]
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_letters + "_-. é\0\n"))
    new = draw(st.sampled_from([
        name[:place] + name[place + 1 :], name[:place] + letter + name[place:], name.upper(), name.replace("_", "-"),
        f" {name}", f"_description_{name}", name * 400, name[::-1], "\ud800", "",
    ]))
    return "rename", path, new


def of_two(case: str, kind: str):
    places = st.sampled_from(paths_of(case))
    return st.tuples(st.just(kind), places, places)


def damage(kind: str, target):
    """(kind, target, operation, two places in millionths of the length, bytes)."""
    places = st.integers(0, 10**6)
    operations = st.sampled_from(["drop", "flip", "insert", "cut", "repeat", "replace"])
    return st.tuples(st.just(kind), target, operations, places, places, st.sampled_from(INSERTED))


def encoded(kind: str, target):
    return st.tuples(st.just(kind), target, st.sampled_from(ENCODINGS))


@st.composite
def override(draw, case: str) -> tuple:
    path = draw(st.sampled_from(paths_of(case)))
    value = draw(VALUES.filter(lambda value: is_bounded(path, value)))
    as_json = draw(st.booleans())
    text = draw(st.sampled_from(WEIRD_OVERRIDES)) if draw(st.integers(0, 2)) == 0 else None
    return ("set", text) if text is not None else ("set value", ".".join(path), value, as_json)


def flag(case: str):
    values = VALUES.map(lambda value: "" if isinstance(value, (list, dict)) else str(value))
    if CASES[case].script == "validate_model.py":
        names = st.sampled_from(list(ValidateOptions.model_fields))
        return st.one_of(st.tuples(st.just("flag"), st.sampled_from(WEIRD_FLAGS)),
                         st.builds(lambda name, value: ("flag", [f"--{name}={value}"]), names, values))
    return st.tuples(st.just("flag"), st.sampled_from(WEIRD_FLAGS))


def csv_changes():
    target, column, row = st.sampled_from(FILES), st.integers(0, 5), st.integers(0, 4)
    return st.one_of(
        damage("csv bytes", target),
        encoded("csv encoding", target),
        st.tuples(st.just("csv line ends"), target, st.sampled_from(["\r", "\r\n", "\n\n", "\n\r", "", "\u2028"])),
        st.tuples(st.just("csv columns"), target, st.sampled_from(["drop", "double", "first", "reverse"]), column,
                  st.just("")),
        st.tuples(st.just("csv columns"), target, st.just("rename"), column,
                  st.sampled_from([*CELLS, "ID", "Article "])),
        st.tuples(st.just("csv rows"), target, st.sampled_from(["drop", "double", "empty", "only", "header", "short",
                                                                "long"]), row),
        st.tuples(st.just("csv cell"), target, row, column, st.sampled_from(CELLS)),
        st.tuples(st.just("csv quoting"), target, st.sampled_from(["all", "none", "single", "escaped"])),
        st.tuples(st.just("csv separator"), target, st.sampled_from([";", "\t", "|", " "])),
        st.tuples(st.just("csv content"), target, st.sampled_from([
            b"", b"\n", b"{}", b"\0" * 100, b"\x89PNG\r\n\x1a\n", b"id,article,highlights", b"id,article,highlights\n",
        ])),
    )


def file_changes():
    target = st.sampled_from([*MODEL_FILES, *FILES, "legacy.pt"])
    return st.one_of(
        st.tuples(st.just("file"), target, st.sampled_from(["delete", "empty", "folder", "dangling link"])),
        damage("file bytes", target),
        st.tuples(st.just("model key"), st.sampled_from([name for name in MODEL_FILES if name.endswith(".json")]),
                  st.sampled_from(MODEL_KEYS), VALUES.filter(lambda value: value is not DEEP)).filter(
                      lambda change: is_bounded((change[2],), change[3])),
    )


@cache
def mutations(case: str) -> dict[str, tuple[int, st.SearchStrategy]]:
    """{group: (how often, its mutations)} for a case."""
    groups = {"argument": (2, flag(case)), "csv": (3, csv_changes()), "file": (2, file_changes())}
    if CASES[case].config is None:
        return groups
    places = st.sampled_from(paths_of(case))
    groups |= {
        "value": (7, new_value(case)),
        "key": (3, st.one_of(
            other_key(case), of_two(case, "move"), of_two(case, "swap"), st.tuples(st.just("delete"), places),
            st.tuples(st.just("twice"), places, VALUES),
        )),
        "text": (2, st.one_of(damage("text", st.just(CONFIG_FILE)), encoded("text encoding", st.just(CONFIG_FILE)))),
    }
    if CASES[case].script != "validate_model.py":
        groups |= {"override": (2, override(case)), "together": (3, st.tuples(st.just("together"),
                                                                              st.sampled_from(TOGETHER)))}
    return groups


@st.composite
def examples(draw) -> Example:
    case = draw(st.sampled_from(list(CASES)))
    groups = mutations(case)
    weighted = [name for name, (often, _) in groups.items() for _ in range(often)]
    names = draw(st.lists(st.sampled_from(weighted), min_size=1, max_size=3))
    return Example(case, draw(st.booleans()), tuple(draw(groups[name][1]) for name in names))
