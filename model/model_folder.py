"""A model folder of a stranger, looked at before a library opens any of it: nothing endless, nothing that is code."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from model.language_model import ModelError
from untrusted.files import check_json_size, check_json_text, load_json, read_limited
from untrusted.text import shorten

LARGEST_TEXT = 100_000_000  # bytes of a tokenizer.json and the like
LONGEST_TEMPLATE = 100_000  # characters
# Sizes from which lists are made as soon as a config is read, and all others.
MOST_PARTS, LARGEST_SIZE = 100_000, 100_000_000
PARTS = re.compile("layer|label|expert|block|stage|depth|codebook")
SIZES = re.compile("vocab|size|dim|embd|hidden|inner|position|ctx|channel|head|rank|num_|n_")
READ_BY_LIBRARIES = re.compile(
    r".*config\.json|tokenizer.*|vocab\..*|merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template.*"
    r"|.*\.index\.json|.*\.jinja"
)
TEMPLATES = "additional_chat_templates"
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)
REFUSED_KEYS = {
    "quantization_config": "quantised weights cannot be trained: give the ones in floats",
    "transformers_weights": "the weights are expected in model.safetensors: remove that key",
    "distributed_config": "a model is spread over processes by the training script alone: remove that key",
    "fusion_config": "layers are taken as they are: remove that key",
}
REFUSED = {
    "adapter_config.json": "an adapter, whose weights are elsewhere: merge it into its model and save that",
    "custom_generate": "code, which is never run: remove it",
}


def check_folder(folder: Path) -> None:
    """Raises ModelError for what a library would wait for, take too much memory for, or run."""
    for path in entries(folder):
        if reason := REFUSED.get(path.name):
            raise ModelError(f"{path} is {reason}")
        if re.fullmatch(r"shard-.*\.safetensors", path.name):
            raise ModelError(f"{path} is part of a checkpoint of several processes: consolidate it first")
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nowhere: what needs the file will miss it
            continue
        if stat.S_ISREG(mode):
            check_text_file(path)
        elif not stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a pipe or a device, not a file: remove it")
    if (folder / "tokenizer_config.json").is_file():
        check_tokenizer_config(folder / "tokenizer_config.json")


def entries(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir())
    if (folder / TEMPLATES).is_dir():
        yield from sorted((folder / TEMPLATES).iterdir())


def check_text_file(path: Path) -> None:
    """Raises ModelError where a file that the libraries read as text is larger than any of its kind."""
    if not READ_BY_LIBRARIES.fullmatch(path.name):
        return
    try:
        content = read_limited(path, LARGEST_TEXT)
        check_json_size(content)
        check_json_text(content)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def check_tokenizer_config(path: Path) -> None:
    """Raises ModelError for files of another folder, named by `..`, and for chat templates that are no text."""
    values = json_object(path)
    templates = values.get("chat_template") or ""
    templates = templates.values() if isinstance(templates, dict) else templates
    if not isinstance(templates, str) and not (isinstance(templates, Iterable) and all(map(is_template, templates))):
        raise ModelError(f"{path} cannot be loaded: its chat_template is no text: remove it")
    for key, value in values.items():
        names = value if isinstance(value, list) else [value]
        if key.endswith(("_file", "_files")) and any(isinstance(name, str) and ".." in name for name in names):
            raise ModelError(f"{path}: {shorten(key)} names {shorten(str(value))}, outside of the folder: remove it")


def is_template(value) -> bool:
    """One of several, by name: a text, or an object with name and text."""
    texts = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(text, str) for text in texts)


def json_object(path: Path) -> dict:
    try:
        value = load_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} cannot be loaded: it holds no JSON object")
    return value


# -- config.json -----------------------------------------------------------------------------------------------


def check_config_file(path: Path) -> None:
    """Raises ModelError for a config.json that the library cannot be given."""
    config = json_object(path)
    family = config.get("model_type")
    if "auto_map" in config and not (isinstance(family, str) and family in CONFIG_MAPPING):
        raise ModelError(f"{path.parent} cannot be loaded: its family {shorten(str(family))} is code that lies beside "
                         "it, which is never run: name a model of a family that transformers knows")
    for key, reason in REFUSED_KEYS.items():
        if config.get(key) is not None:
            raise ModelError(f"{path}: {key}: {reason}")
    for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        for key in part if isinstance(part, dict) else ():
            if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
                raise ModelError(f"{path}: {shorten(key)} would replace a function of the library: remove that key")
    check_numbers(config, f"{path}: ")
    template, length = config.get("prompt_template"), config.get("prompt_max_length")
    if template is not None and not (isinstance(template, str) and len(template) <= LONGEST_TEMPLATE):
        raise ModelError(f"{path}: prompt_template is {shorten(repr(template))}: expected a text with {{article}}")
    if length is not None and not (type(length) is int and length > 0):
        raise ModelError(f"{path}: prompt_max_length is {shorten(repr(length))}: expected a number of tokens")


def check_numbers(values: dict, place: str) -> None:
    """Raises ModelError (`place` and key) for a size that no model has."""
    for key, value in numbers_in(values):
        most = MOST_PARTS if PARTS.search(key) else LARGEST_SIZE
        if value > most and (PARTS.search(key) or SIZES.search(key)):
            raise ModelError(f"{place}{shorten(key)} is {shorten(str(value), 20)}: expected at most {most:,}")


def numbers_in(value, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, number) of each number, however deep; a list's numbers have the list's key."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from numbers_in(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from numbers_in(child, key)
    elif isinstance(value, (int, float)):
        yield key, value


# -- weights ---------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises ModelError: there are none, or an index names what is not there."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ModelError(
            f"{folder} has no weights (model.safetensors): give a folder that save_pretrained wrote, or train that "
            "architecture from random weights with from_scratch"
        )
    if not name.endswith(".index.json"):
        return [folder / name]
    places = json_object(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ModelError(f"{folder / name} cannot be loaded: it has no weight_map of names")
    files = sorted(set(places.values()))
    for file in files:
        if file != os.path.basename(file) or file in ("", ".", ".."):  # noqa: PTH119 (a Path would mend the name)
            raise ModelError(f"{folder / name} names {shorten(file)}, outside of the folder: that is not read")
        if not (folder / file).is_file():
            raise ModelError(f"{folder} lacks {shorten(file)}, which {name} names: copy it there")
    return [folder / file for file in files]
