"""Config files: strict JSON, `--set section.key=value`, and errors of one line that name key, value and remedy."""

import json
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from os import PathLike

from pydantic import BaseModel, ValidationError

from utils.config.distill import DistillConfig
from utils.config.distill_checks import distillation_warnings
from utils.config.fine_tune import NO_EFFECT, FineTuneConfig
from utils.config.reference import CLOSE, constants, expected, most_alike, nearest, node_at
from utils.config.strict_json import (
    DEEPEST,
    DIGITS,
    TOO_DEEP,
    ConfigError,
    is_deep,
    is_free_text,
    kind,
    parse,
    read_json,
    shorten,
    show,
    unusable,
)
from utils.files import json_text

MOST_LINES = 20  # of an error: a file of something else would have thousands
# Pydantic's errors about the value itself, and those raised here; all others are about its type.
VALUE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number",
                "string_too_short", "string_pattern_mismatch"}
CUSTOM_ERRORS = {"name", "template", "columns", "layers", "contradiction"}
WORDS = {"true": True, "false": False, "none": None, "null": None}


# -- reading -----------------------------------------------------------------------------------------------------


def load_config(path: str | PathLike, overrides: Sequence[str] = (), model: type[BaseModel] = FineTuneConfig):
    """The config in a JSON file, changed by `section.key=value` texts, as an instance of `model`.

    A value is taken as JSON where it is JSON, else as a string. Later overrides win.

    Raises:
        ConfigError: the file cannot be read, an override has no "=", or keys or values are wrong; all of them at once.
    """
    values, source = read_json(path), shorten(str(path), 200)
    changed, origins, wrong = deepcopy(values), {}, []
    for text in overrides:
        try:
            target = apply_override(changed, text)
            origins.pop(target, None)  # so that the last one comes last
            origins[target] = f"--set {shorten(text)}"
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))

    def origin(place: tuple) -> str:
        """The override that set the value at `place`, or made a section that the file lacks; else the file."""
        in_file = len(reach(values, place)) == len(place)
        for target, name in reversed(origins.items()):
            if target == place[: len(target)] or (place == target[: len(place)] and not in_file):
                return name
        return source

    return validate_model(model, changed, source, origin)


def apply_override(values: dict, text: str) -> tuple:
    """Set what a `section.key=value` text says in `values`; returns its path. Sections that are missing are made."""
    name, sign, raw = text.partition("=")
    if not sign or not all(path := tuple(name.split("."))):
        raise ConfigError(f"--set {shorten(text)}: expected section.key=value, such as trainer_kwargs.epochs=3")
    if len(path) > DEEPEST:
        raise ConfigError(f"--set {shorten(text)}: {TOO_DEEP}")
    node = values
    for depth, key in enumerate(path[:-1]):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            above = dotted(path[: depth + 1])
            raise ConfigError(f"--set {shorten(text)}: {above} is {show(child)}, which has no keys: set {above} itself")
        node = child
    try:
        node[path[-1]] = parse(raw)
    except json.JSONDecodeError:
        node[path[-1]] = raw
    except ValueError as error:
        raise ConfigError(f"--set {shorten(text)}: {error}") from error
    return path


# -- validating --------------------------------------------------------------------------------------------------


def validate_model(model: type[BaseModel], values: dict, source: str = "config.json", origin=None):
    """`values` as an instance of `model`, without `$schema` at the top and `_description...` keys anywhere.

    source: what errors name as the place of the values; origin(path): the same for one value.

    Raises:
        ConfigError: one line for each key or value that is wrong.
    """
    origin = origin or (lambda path: source)
    if is_deep(values):
        raise ConfigError(f"{source}: {TOO_DEEP}")
    data = {key: value for key, value in without_free_text(values).items() if key != "$schema"}
    found = [(path, f"{dotted(path) or 'the top level'} {problem}") for path, problem in unusable(data)]
    try:
        if not found:
            return model.model_validate(data)
    except ValidationError as error:
        found = wrong_values(model, data, error)
    lines = [f"{origin(path)}: {problem}" for path, problem in found[:MOST_LINES]]
    more = [f"{source}: and {len(found) - MOST_LINES} problems more"] if len(found) > MOST_LINES else []
    raise ConfigError("\n".join([*lines, *more]))


def without_free_text(value):
    if isinstance(value, dict):
        return {key: without_free_text(each) for key, each in value.items() if not is_free_text(key)}
    if isinstance(value, list):
        return [without_free_text(each) for each in value]
    return value


def reach(data, path: tuple) -> tuple:
    """The keys and indices of `path` that lead to a value in `data`; names of types, which pydantic adds, drop out."""
    found = ()
    for key in path:
        if key in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            found, data = (*found, key), data[key]
    return found


def value_at(data, path: tuple):
    for key in path:
        data = data[key]
    return data


def wrong_values(model: type[BaseModel], data: dict, error: ValidationError) -> list[tuple[tuple, str]]:
    """(path, problem) of each key or value that is wrong; pydantic has several where a value may be of several types.

    Behind MOST_LINES of them a problem is not told in words, only counted.
    """
    schema = model.model_json_schema()
    found: dict[tuple, list[dict]] = {}
    for each in error.errors(include_url=False):
        path = each["loc"] if each["type"] == "missing" else reach(data, each["loc"])
        found.setdefault(path, []).append(each)
    told: list[tuple[tuple, str]] = []
    for path, errors in found.items():
        of_path = problems(model, schema, data, path, errors) if len(told) < MOST_LINES else [""]
        told += [(path, problem) for problem in of_path]
    return told


def problems(model, schema: dict, data: dict, path: tuple, errors: list[dict]) -> list[str]:
    types = {each["type"] for each in errors}
    if "missing" in types:
        return [f"{dotted(path)} is missing: expected {expected(node_at(schema, path))}"]
    if "extra_forbidden" in types or any(each["loc"][-1:] == ("[key]",) for each in errors):
        return [f"{dotted(path)} is unknown: {nearest(model, schema, path)}"]
    if types & CUSTOM_ERRORS:
        text = errors[0]["msg"].removeprefix("Value error, ")
        return text.split("\n") if not path else [f"{dotted(path)} is {show(value_at(data, path))}: {text}"]
    value, node = value_at(data, path), node_at(schema, path)
    other_types = types - {"literal_error"}
    of_kind = f" ({kind(value)})" if other_types and not other_types & VALUE_ERRORS and value is not None else ""
    if "finite_number" in types:
        return [f"{dotted(path)} is {show(value)}: expected {finite(expected(node))}"]
    return [f"{dotted(path)} is {show(value)}{of_kind}: expected {expected(node)}{remedy(model, data, path, node)}"]


def finite(words: str) -> str:
    """What was expected where a number that is not finite was found: of any JSON value, it can only be that one."""
    return words.replace("a number", "a finite number") if "a number" in words else "a finite number"


def remedy(model, data: dict, path: tuple, node: dict) -> str:
    """What to write instead, where the value as it stands says what was meant."""
    value = value_at(data, path)
    for candidate in candidates(value, node):
        changed = deepcopy(data)
        *parent, key = path
        value_at(changed, tuple(parent))[key] = candidate
        if accepted(model, changed, path):
            quoted = isinstance(value, str) and not isinstance(candidate, str | list | dict)
            return f"; write {json.dumps(candidate)}{' without quotes' if quoted else ''}"
    return ""


def candidates(value, node: dict) -> Iterator:
    if isinstance(value, str):
        if value.strip().lower() in WORDS:
            yield WORDS[value.strip().lower()]
        for convert in (int, float):
            try:
                yield convert(value)
            except ValueError:
                continue
        words = {name: name for name in constants(node) if isinstance(name, str)}
        best, likeness = most_alike(value, words)
        if likeness >= CLOSE:
            yield best
    elif isinstance(value, bool):
        yield json.dumps(value)
    elif isinstance(value, int | float):
        if value in (0, 1):
            yield bool(value)
        if value == value // 1 and abs(value) < 10**DIGITS:
            yield int(value)
        yield json.dumps(value)
    yield from sections_with(value, node)
    yield [value]


def sections_with(value, node: dict) -> Iterator[dict]:
    """For a section that may be null: one with `value` under the key that lists it, else under its default."""
    listing = {key: child for choice in node.get("anyOf", []) for key, child in choice.get("properties", {}).items()
               if constants(child)}
    yield from ({key: value} for key, child in listing.items() if value in constants(child))
    yield from ({key: child["default"]} for key, child in listing.items())


def accepted(model, data: dict, path: tuple) -> bool:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return all(each["loc"][: len(path)] != path for each in error.errors(include_url=False))
    return True


# -- words -------------------------------------------------------------------------------------------------------


def dotted(path: tuple) -> str:
    """`section.key[0]`; keys that are no plain words in quotes, so that blanks and the like are seen."""
    parts = [f".{key}" if isinstance(key, str) and re.fullmatch(r"[\w$-]+", key) else f"[{show(key)}]" for key in path]
    return shorten("".join(parts).removeprefix("."))


# -- out ---------------------------------------------------------------------------------------------------------


def config_json(config: BaseModel) -> str:
    """The resolved config as JSON with a final newline; `load_config` reads it back as the same config."""
    values = config.model_dump(by_alias=True)
    for key in NO_EFFECT:
        if values["trainer_kwargs"][key] is None:
            del values["trainer_kwargs"][key]
    return json_text(values)


def warnings_of(config) -> list[str]:
    """One line for what is set but has no effect."""
    trainer, scheduler = config.trainer_kwargs, config.lr_scheduler_kwargs
    lines = []
    if useless := [f"trainer_kwargs.{key}" for key in NO_EFFECT if getattr(trainer, key) is not None]:
        lines.append(f"{' and '.join(useless)} {'has' if len(useless) == 1 else 'have'} no effect: nothing needs to be "
                     "set instead: training scripts train, and the KV cache is always used")
    if scheduler.increase_batch_size_on_plateau and config.callbacks_kwargs.kwargs.patience is None:
        lines.append("lr_scheduler_kwargs.increase_batch_size_on_plateau has no effect: set "
                     "callbacks_kwargs.kwargs.patience, the epochs without improvement that make a plateau")
    return [*lines, *(distillation_warnings(config) if isinstance(config, DistillConfig) else [])]
