"""The JSON Schemas of the configs, and what is generated from them: `config.schema.json`, `config_kd.schema.json` and
the reference in README.md.

    python -m utils.config_reference            writes all
    python -m utils.config_reference --check    exit code 1 where one is out of step

Where README.md is absent, only the schemas. The reference stands between the two marker lines below.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from utils.config import FineTuneConfig
from utils.config_kd import DistillConfig
from utils.files import json_text, write_text

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_FILES, README = {"config.schema.json": FineTuneConfig, "config_kd.schema.json": DistillConfig}, "README.md"
START, END = "<!-- config reference: start -->", "<!-- config reference: end -->"
TABLE_HEAD = ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
FREE_TEXT = {"^_description": {}}
NAMES = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false",
         "null": "null", "object": "an object"}


# -- reading a JSON Schema ---------------------------------------------------------------------------------------


def resolved(schema: dict, node: dict) -> dict:
    """The node with what its `$ref` points to; its own entries win."""
    if "$ref" in node:
        return {**schema["$defs"][node["$ref"].rsplit("/", 1)[1]], **node}
    return node


def node_at(schema: dict, path: tuple) -> dict:
    """The node that describes the value at `path` (keys and list indices); {} where nothing describes it."""
    node = schema
    for key in path:
        choices = [resolved(schema, choice) for choice in node.get("anyOf", [node])]
        inner = [choice.get("items") if isinstance(key, int) else
                 choice.get("properties", {}).get(key, choice.get("additionalProperties")) for choice in choices]
        node = resolved(schema, next((each for each in inner if isinstance(each, dict)), {}))
    return node


def known_keys(node: dict) -> list[str]:
    """The keys that an object may have, where they are fixed: by name, as a list, or by a pattern such as ^(a|b)$."""
    names = node.get("propertyNames", {})
    pattern = re.fullmatch(r"\^\(([\w|]+)\)\$", names.get("pattern", ""))
    own = [*node.get("properties", {}), *names.get("enum", []), *(pattern[1].split("|") if pattern else [])]
    return own + [key for choice in node.get("anyOf", []) for key in known_keys(choice)]


def constants(node: dict) -> list:
    """The values that a node lists."""
    own = [*node.get("enum", []), *([node["const"]] if "const" in node else [])]
    return own + [value for choice in node.get("anyOf", []) for value in constants(choice)]


def leaves(schema: dict, node: dict | None = None, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """(path, node) of every key that is no section."""
    for key, child in (schema if node is None else node).get("properties", {}).items():
        child = resolved(schema, child)
        if "properties" in child:
            yield from leaves(schema, child, (*path, key))
            continue
        yield (*path, key), child
        for choice in child.get("anyOf", []):  # a section that may be null
            yield from leaves(schema, resolved(schema, choice), (*path, key))


def expected(node: dict) -> str:
    """What a value must be, in words: "a number greater than 0"."""
    if "anyOf" in node:
        *most, last = (expected(choice) for choice in node["anyOf"])
        return f"{', '.join(most)}, or {last}"
    if values := constants(node):
        return ("one of " if len(values) > 1 else "") + ", ".join(json.dumps(value) for value in values)
    if node.get("type") == "array":
        return f"a list, each entry {expected(node['items'])}"
    if "$ref" in node:
        return "an object"
    if node.get("minLength"):
        return "a string that is not empty"
    return NAMES.get(node.get("type"), "any JSON value") + bounds(node)


def bounds(node: dict) -> str:
    low, above, high, below = (node.get(key) for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"))
    if low is not None and high is not None:
        return f" from {low} to {high}"
    parts = [(low, "of at least"), (above, "greater than"), (high, "of at most"), (below, "below")]
    return "".join(f" {word} {limit}" for limit, word in parts if limit is not None).replace(" below", " and below")


# -- writing -----------------------------------------------------------------------------------------------------


def schema(model: type[BaseModel] = FineTuneConfig) -> dict:
    """JSON Schema (2020-12) of a config file: with `$schema`, and with free text under `_description...` everywhere."""
    tree = model.model_json_schema()
    for node in (tree, *tree["$defs"].values()):
        allow_free_text(node)
    tree["properties"] = {"$schema": {"type": "string", "description": "for editors"}, **tree["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def allow_free_text(node: dict) -> None:
    """Lets `node` and the objects inside it have `_description...` keys; drops titles, which only repeat the keys."""
    node.pop("title", None)
    if node.get("type") == "object":
        node["patternProperties"] = FREE_TEXT
    if "propertyNames" in node:
        node["propertyNames"] = {"anyOf": [node["propertyNames"], {"pattern": "^_description"}]}
    for child in node.get("properties", {}).values():
        allow_free_text(child)


def markdown_reference(model: type[BaseModel] = FineTuneConfig, besides: type[BaseModel] | None = None) -> str:
    """A table of the keys for each section; with `besides`, only those keys that differ from that model's."""
    tree = model.model_json_schema()
    known = {} if besides is None else dict(leaves(besides.model_json_schema()))
    parts = []
    for name, section in tree["properties"].items():
        section = resolved(tree, section)
        shown = [(path, node) for path, node in leaves(tree, section) if known.get((name, *path)) != node]
        if shown:
            rows = [row(path, node) for path, node in shown]
            parts.append("\n".join([f"### `{name}`", "", section["description"], "", *TABLE_HEAD, *rows]))
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """What stands in README.md between the markers."""
    distillation = ("## Config reference: distillation\n\n`config_kd.json` has the sections and keys of `config.json`,\n"
                    "but `lang_model` and `gpu_device_id`. What it has besides, or with another default:\n")
    return f"{markdown_reference()}\n{distillation}\n{markdown_reference(DistillConfig, FineTuneConfig)}"


def row(path: tuple, node: dict) -> str:
    kind = expected(node).removeprefix("a ").removeprefix("an ").replace(" that is not empty", "")
    default = f"`{json.dumps(node['default'], ensure_ascii=False)}`" if "default" in node else "required"
    cells = (f"`{'.'.join(path)}`", kind, default, node["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def generated(root: Path = ROOT) -> tuple[dict[str, str], list[str]]:
    """({file name: text as it should be}, problems); README.md only where it is there."""
    texts, problems = {name: json_text(schema(model)) for name, model in SCHEMA_FILES.items()}, []
    if (root / README).is_file():
        text = (root / README).read_text(encoding="utf-8")
        if text.count(START) == 1 and text.count(END) == 1 and text.index(START) < text.index(END):
            before, after = text.split(START)[0], text.split(END)[1]
            texts[README] = f"{before}{START}\n\n{reference()}\n{END}{after}"
        else:
            problems.append(f"{README} needs the lines {START} and {END}, once each, where the reference belongs")
    return texts, problems


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("python -m utils.config_reference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is out of step")
    check = parser.parse_args(arguments).check
    texts, problems = generated(root)
    stale = [name for name, text in texts.items() if not same(root / name, text)]
    if check and stale:
        problems.append(f"{' and '.join(stale)} out of step with utils/config.py and utils/config_kd.py: run "
                        "python -m utils.config_reference")
    if not check:
        for name in stale:
            write_text(root / name, texts[name])
        print(f"written: {', '.join(stale)}" if stale else "in step already")
    if problems:
        print("; ".join(problems), file=sys.stderr)
    return 1 if problems else 0


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
