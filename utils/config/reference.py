"""The JSON Schemas of the configs, and what is generated from them: `config.schema.json`, `config_kd.schema.json` and
the key reference in docs/config.md.

    python -m utils.config.reference            write all three
    python -m utils.config.reference --check    write nothing; exit code 1 if one is out of date

The reference stands between the two marker lines below. Without docs/config.md, only the schemas are written.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

from pydantic import BaseModel

from utils.config.distill import STUDENT_KEYS, DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.files import json_text, write_text

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILES = {"config.schema.json": FineTuneConfig, "config_kd.schema.json": DistillConfig}
PAGE = "docs/config.md"
OTHER_SCRIPT = {FineTuneConfig: ("train_kd.py", DistillConfig), DistillConfig: ("train.py", FineTuneConfig)}
LONGEST = 200  # characters of a key that are compared: it takes as many steps as it has characters
CLOSE = 0.6  # of SequenceMatcher.ratio, as difflib.get_close_matches has it
START, END = "<!-- config reference: start -->", "<!-- config reference: end -->"
TABLE_HEAD = ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
FREE_TEXT = {"^_description": {}}
NAMES = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false",
         "null": "null", "object": "an object"}


# -- reading a JSON Schema ---------------------------------------------------------------------------------------


def resolved(schema: dict, node: dict) -> dict:
    """The node with what its `$ref`, and those of its choices, point to; its own entries win."""
    if "anyOf" in node:
        return {**node, "anyOf": [resolved(schema, choice) for choice in node["anyOf"]]}
    if "$ref" in node:
        return {**schema["$defs"][node["$ref"].rsplit("/", 1)[1]], **node}
    return node


def node_at(schema: dict, path: tuple) -> dict:
    """The node that describes the value at `path` (keys and list indices); {} where nothing describes it."""
    node = schema
    for key in path:
        inner = [choice.get("items") if isinstance(key, int) else
                 choice.get("properties", {}).get(key, choice.get("additionalProperties"))
                 for choice in node.get("anyOf", [node])]
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
            yield from leaves(schema, choice, (*path, key))


def nearest(model: type[BaseModel], schema: dict, path: tuple) -> str:
    """Where an unknown key belongs, or the known key that it resembles most."""
    *parent, key = path
    if not key.strip():
        return "remove it"
    known = [other for other, _ in leaves(schema)]
    if places := places_of(key, schema):
        return f"{key} belongs in {' or '.join('.'.join(place) or 'the top level' for place in places)}"
    if hint := key_of_other_script(model, path):
        return hint
    beside = {name: name for name in known_keys(node_at(schema, tuple(parent)))}
    if not beside:
        return "remove it, or see --help"
    best, likeness = most_alike(key, beside)
    if likeness < CLOSE:
        far, likeness = most_alike(key, {".".join(other): other[-1] for other in known})
        best = far if likeness >= CLOSE + 0.1 else best
    return f"did you mean {best}?"


def places_of(key: str, schema: dict) -> list[tuple]:
    """The sections, and objects of fixed keys, that have such a key or section."""
    found = {}  # an ordered set
    for path, node in leaves(schema):
        found |= {path[:depth]: None for depth, name in enumerate(path) if name == key}
        found |= {path: None} if key in known_keys(node) else {}
    return list(found)


def key_of_other_script(model: type[BaseModel], path: tuple) -> str | None:
    """What to write instead of a key of the other script's config; None for any other key."""
    if model not in OTHER_SCRIPT:
        return None
    renamed = STUDENT_KEYS if model is DistillConfig else {new: old for old, new in STUDENT_KEYS.items()}
    if path[-1] in renamed:
        return f"did you mean model_arch.{renamed[path[-1]]}?"
    *parent, key = path
    script, other = OTHER_SCRIPT[model]
    if key not in known_keys(node_at(other.model_json_schema(), tuple(parent))):
        return None
    return f"{key} belongs in {'.'.join(parent)}{' of ' if parent else ''}a config of {script}"


def most_alike(key: str, names: dict[str, str]) -> tuple[str, float]:
    """(the name whose last part is most like `key`, how alike from 0 to 1)."""
    plain = key[:LONGEST].lower().replace("-", "_")
    alike = {name: SequenceMatcher(None, plain, last.lower()).ratio() for name, last in names.items()}
    best = max(alike, key=alike.get, default="")
    return best, alike.get(best, 0.0)


def expected(node: dict) -> str:
    """What a value must be, in words: "a number greater than 0"."""
    if "anyOf" in node:
        *most, last = (expected(choice) for choice in node["anyOf"])
        return f"{', '.join(most)}, or {last}"
    if values := constants(node):
        return ("one of " if len(values) > 1 else "") + ", ".join(json.dumps(value) for value in values)
    if node.get("type") == "array":
        return f"a list, each entry {expected(node['items'])}"
    if "$ref" in node and node.get("type") == "object":
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


def markdown_reference(model: type[BaseModel] = FineTuneConfig, above: type[BaseModel] | None = None) -> str:
    """A table of the keys for each section.

    above: a model whose reference stands above. Sections that are the same are omitted; of a section that has all the
    keys of `above`, only those that differ are shown.
    """
    tree = model.model_json_schema()
    known = {} if above is None else dict(leaves(above.model_json_schema()))
    parts = []
    for name, section in tree["properties"].items():
        section = resolved(tree, section)
        own, meaning = {(name, *path): node for path, node in leaves(tree, section)}, section["description"]
        theirs = {path for path in known if path[0] == name}
        if theirs and theirs <= own.keys():
            own = {path: node for path, node in own.items() if known.get(path) != node}
            meaning = "As above, except:"
        if own:
            rows = [row(path[1:], node) for path, node in own.items()]
            parts.append("\n".join([f"### `{name}`", "", meaning, "", *TABLE_HEAD, *rows]))
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """What stands in docs/config.md between the markers: config.json in full, then what differs in config_kd.json."""
    heading = ("## `config_kd.json` (`train_kd.py`)\n\n"
               "Sections that are not listed here are those of `config.json` above.\n")
    return f"{markdown_reference()}\n{heading}\n{markdown_reference(DistillConfig, FineTuneConfig)}"


def row(path: tuple, node: dict) -> str:
    kind = expected(node).removeprefix("a ").removeprefix("an ").replace(" that is not empty", "")
    default = f"`{json.dumps(node['default'], ensure_ascii=False)}`" if "default" in node else "required"
    cells = (f"`{'.'.join(path)}`", kind, default, node["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def generated(root: Path = ROOT) -> tuple[dict[str, str], list[str]]:
    """({file name: text as it should be}, problems); docs/config.md only if it exists."""
    texts, problems = {name: json_text(schema(model)) for name, model in SCHEMA_FILES.items()}, []
    if (root / PAGE).is_file():
        text = (root / PAGE).read_text(encoding="utf-8")
        if text.count(START) == 1 and text.count(END) == 1 and text.index(START) < text.index(END):
            before, after = text.split(START)[0], text.split(END)[1]
            texts[PAGE] = f"{before}{START}\n\n{reference()}\n{END}{after}"
        else:
            problems.append(f"{PAGE} needs the lines {START} and {END}, once each, where the reference belongs")
    return texts, problems


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("python -m utils.config.reference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    texts, problems = generated(root)
    stale = [name for name, text in texts.items() if not same(root / name, text)]
    if check and stale:
        problems.append(f"out of date: {', '.join(stale)}; run python -m utils.config.reference")
    if not check:
        for name in stale:
            write_text(root / name, texts[name])
        print(f"written: {', '.join(stale)}" if stale else "up to date")
    if problems:
        print("; ".join(problems), file=sys.stderr)
    return 1 if problems else 0


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
