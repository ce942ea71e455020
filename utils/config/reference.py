"""For developers: writes what is generated from the configs' pydantic models: `config.schema.json`,
`config_kd.schema.json` and the tables in docs/config.md, between its two marker lines.

    python -m utils.config.reference            write all three
    python -m utils.config.reference --check    write nothing; exit code 1 if one is out of date
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.files import json_text, write_text

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILES = {"config.schema.json": FineTuneConfig, "config_kd.schema.json": DistillConfig}
PAGE = "docs/config.md"
START, END = "<!-- config reference: start -->", "<!-- config reference: end -->"
TABLE_HEAD = ("| key | type | default | meaning |", "| --- | --- | --- | --- |")
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


# -- JSON Schema -------------------------------------------------------------------------------------------------


def schema(model: type[BaseModel] = FineTuneConfig) -> dict:
    """JSON Schema (2020-12) of a config file: with `$schema`, and with free text under `_description...` everywhere."""
    tree = model.model_json_schema()
    for node in (tree, *tree["$defs"].values()):
        allow_free_text(node)
    tree["properties"] = {"$schema": {"type": "string", "description": "for editors"}, **tree["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def allow_free_text(node: dict) -> None:
    """Let `node` and the objects in it have `_description...` keys; remove titles, which only repeat the keys."""
    node.pop("title", None)
    if node.get("type") == "object":
        node["patternProperties"] = {"^_description": {}}
    if "propertyNames" in node:
        node["propertyNames"] = {"anyOf": [node["propertyNames"], {"pattern": "^_description"}]}
    for child in node.get("properties", {}).values():
        allow_free_text(child)


def resolved(tree: dict, node: dict) -> dict:
    """The node, with what its `$ref` and those of its choices point to; its own entries win."""
    if "anyOf" in node:
        return {**node, "anyOf": [resolved(tree, choice) for choice in node["anyOf"]]}
    return {**tree["$defs"][node["$ref"].rsplit("/", 1)[1]], **node} if "$ref" in node else node


def leaves(tree: dict, node: dict | None = None, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """(path, node) of every key that is no section."""
    for key, child in (tree if node is None else node).get("properties", {}).items():
        child = resolved(tree, child)
        if "properties" not in child:
            yield (*path, key), child
        for section in (child, *child.get("anyOf", [])):  # a section, or one that may be null
            yield from leaves(tree, section, (*path, key))


# -- tables ------------------------------------------------------------------------------------------------------


def type_of(node: dict) -> str:
    """The type and range of a value in words: "number > 0, or null"."""
    if "anyOf" in node:
        return ", or ".join(map(type_of, node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(map(json.dumps, node.get("enum", [node.get("const")])))
    if node["type"] == "array":
        return f"list of {type_of(node['items']).replace('integer', 'integers')}"
    limits = " and ".join(f"{sign} {node[name]}" for name, sign in LIMITS.items() if name in node)
    return f"{'true or false' if node['type'] == 'boolean' else node['type']} {limits}".strip()


def row(path: tuple, node: dict) -> str:
    default = f"`{json.dumps(node['default'], ensure_ascii=False)}`" if "default" in node else "required"
    cells = (f"`{'.'.join(path)}`", type_of(node), default, node["description"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(model: type[BaseModel] = FineTuneConfig, shown: type[BaseModel] | None = None) -> str:
    """A table of the keys for each section.

    shown: a model whose tables are above these. Sections that are the same are left out, and of a section that has all
    keys of the one above, only the keys that differ are listed.
    """
    tree = model.model_json_schema()
    above = {} if shown is None else dict(leaves(shown.model_json_schema()))
    parts = []
    for name, section in tree["properties"].items():
        section = resolved(tree, section)
        own, meaning = {(name, *path): node for path, node in leaves(tree, section)}, section["description"]
        theirs = {path for path in above if path[0] == name}
        if theirs and theirs <= own.keys():
            own = {path: node for path, node in own.items() if above.get(path) != node}
            meaning = "As above, except:"
        if own:
            rows = [row(path[1:], node) for path, node in own.items()]
            parts.append("\n".join([f"### `{name}`", "", meaning, "", *TABLE_HEAD, *rows]))
    return "\n\n".join(parts) + "\n"


# -- command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("python -m utils.config.reference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    page = (root / PAGE).read_text(encoding="utf-8")
    texts = {name: json_text(schema(model)) for name, model in SCHEMA_FILES.items()}
    texts[PAGE] = (
        f"{page.split(START)[0]}{START}\n\n{tables()}\n## `config_kd.json` (`train_kd.py`)\n\nSections that are not "
        f"listed here are those of `config.json` above.\n\n{tables(DistillConfig, FineTuneConfig)}\n"
        f"{END}{page.split(END)[1]}"
    )
    texts = {name: text for name, text in texts.items()
             if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text}
    if check and texts:
        print(f"out of date: {', '.join(texts)}; run python -m utils.config.reference", file=sys.stderr)
        return 1
    for name, text in texts.items():
        write_text(root / name, text)
    print(f"written: {', '.join(texts)}" if texts else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
