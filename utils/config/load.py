"""Load a config: strict JSON, `--set section.key=value`, and errors of one line that name file, key and remedy."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError

from utils.config.distill import STUDENT_KEYS, DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.errors import UserError
from utils.files import json_text
from utils.text import shorten

FREE_TEXT = "_description"  # keys that start with it
MAX_ERRORS = 20  # a JSON file of something else has thousands
AN_OBJECT = "Input should be an object {...}"  # pydantic's own words name Python's types
MESSAGES = {"dict_type": AN_OBJECT, "model_type": AN_OBJECT}
NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"  # in JSON


class ConfigError(UserError):
    """A config that cannot be used; one line for each mistake."""

    one_line_each = True


# -- reading -----------------------------------------------------------------------------------------------------


def load_config(path: str | PathLike, overrides: Sequence[str] = (), model: type[BaseModel] = FineTuneConfig):
    """The config in a JSON file, changed by `section.key=value` texts, as an instance of `model`.

    Raises:
        ConfigError: the file cannot be read, an override has no "=", or keys or values are wrong.
    """
    values = read_json(path)
    targets = [(apply_override(values, text), f"--set {shorten(text)}") for text in overrides]
    source = shorten(str(path), 200)

    def source_of(key_path: tuple) -> str:
        """The last override that set this value, a part of it or the object around it; else the file."""
        for target, name in reversed(targets):
            if key_path and all(a == b for a, b in zip(target, key_path, strict=False)):
                return name
        return source

    return validate_model(model, values, source_of)


def read_json(path: str | PathLike) -> dict:
    """The object in a JSON file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not JSON (with line and column), or repeats a key.
    """
    name = shorten(str(path), 200)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_duplicates)
    except OSError as error:
        remedy = "name a config with --config FILE, or run ./demo.sh, which needs none"
        raise ConfigError(f"{name} cannot be read: {error.strerror}: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} should hold an object, {{...}} (got {show(values)})")
    return values


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    values = {}
    for key, value in pairs:
        if key in values and not key.startswith(FREE_TEXT):
            raise ValueError(f"the key {show(key)} is twice in one object: remove one")
        values[key] = value
    return values


def apply_override(values: dict, text: str) -> tuple[str, ...]:
    """Apply one `section.key=value` to `values` in place; returns the key's path. What is not JSON is a string."""
    name, equals, raw = text.partition("=")
    *sections, key = path = tuple(name.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {shorten(text)}: expected section.key=value, such as trainer_kwargs.epochs=3")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {shorten(text)}: {section} is {show(values)}, which has no keys")
    try:
        values[key] = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        values[key] = raw
    return path


# -- validation --------------------------------------------------------------------------------------------------


def validate_model(model: type[BaseModel], values: dict, source_of: Callable[[tuple], str]):
    """`values` as an instance of `model`, without `$schema` at the top and `_description...` keys anywhere.

    source_of(key path): name of the file or flag that set a value; the path () is that of all values together.

    Raises:
        ConfigError: one line for each key or value that is wrong.
    """
    try:
        values = {key: value for key, value in without_free_text(values).items() if key != "$schema"}
        return model.model_validate(values)
    except RecursionError as error:
        raise ConfigError(f"{source_of(())}: it is nested too deeply") from error
    except ValidationError as error:
        by_path: dict[tuple, list[dict]] = {}  # several for a key of several types: pydantic reports each type
        for item in error.errors(include_url=False):
            path = item["loc"] if item["type"] == "missing" else path_in(values, item["loc"])
            by_path.setdefault(path, []).append(item)
    raise ConfigError("\n".join(
        f"{source_of(path)}: {line}" for path, errors in [*by_path.items()][:MAX_ERRORS]
        for line in describe_errors(model, path, errors)
    ))


def without_free_text(value):
    if isinstance(value, dict):
        return {key: without_free_text(child) for key, child in value.items() if not key.startswith(FREE_TEXT)}
    return [without_free_text(child) for child in value] if isinstance(value, list) else value


def path_in(values, loc: tuple) -> tuple:
    """The keys and indices of pydantic's `loc` that exist in `values`: without the names of types in it."""
    path = ()
    for key in loc:
        if key in (values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()):
            path, values = (*path, key), values[key]
    return path


def describe_errors(model: type[BaseModel], path: tuple, errors: list[dict]) -> list[str]:
    """The errors at one path: one line, or one for each contradiction between keys."""
    name, value = shorten(".".join(map(str, path))), errors[0]["input"]
    types = {error["type"] for error in errors}
    if "extra_forbidden" in types:
        return [f"{name} is unknown: {nearest(model, path)}"]
    if "missing" in types:
        return [f"{name} is missing"]
    messages = dict.fromkeys(MESSAGES.get(error["type"], error["msg"]) for error in errors)
    text = " or ".join(messages).replace(" or Input should be ", " or ").removeprefix("Value error, ")
    if not path:
        return text.split("\n")
    in_quotes = types & {"int_type", "float_type"} and isinstance(value, str) and re.fullmatch(NUMBER, value)
    remedy = f", write {value} without quotes" if in_quotes else ""
    return [f"{name}: {text} (got {show(value)}{remedy})"]


def nearest(model: type[BaseModel], path: tuple) -> str:
    """The keys of (almost) that name in any section, else the most similar key beside the unknown one."""
    paths = list(key_paths(model))
    names, key = [known[-1] for known in paths], path[-1].lower().replace("-", "_")
    if model is FineTuneConfig and key not in names and key in [known[-1] for known in key_paths(DistillConfig)]:
        return "it belongs in a config of train_kd.py"
    key = STUDENT_KEYS.get(key, key) if model is DistillConfig else key
    if close := get_close_matches(key, names, n=1, cutoff=0.8):
        near = [".".join(known) for known in paths if known[-1] == close[0]]
    else:
        beside = {known[-1]: ".".join(known) for known in paths if known[:-1] == path[:-1]}
        near = [beside[name] for name in get_close_matches(key, beside, n=1, cutoff=0)]
    return f"did you mean {' or '.join(near)}?"


def key_paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key and section."""
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        yield path
        for section in (field.annotation, *get_args(field.annotation)):
            if hasattr(section, "model_fields"):
                yield from key_paths(section, path)


def show(value) -> str:
    return shorten(json.dumps(value, ensure_ascii=False))


def config_json(config: BaseModel) -> str:
    """The resolved config as JSON with a final newline; `load_config` reads it back as the same config."""
    return json_text(config.model_dump(by_alias=True))
