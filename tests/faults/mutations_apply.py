"""What a mutation does to a project: to the config's values, then to its text, then to arguments and files.

Each takes what is there: a mutation whose place an earlier one has removed changes nothing.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from tests.faults.mutations_cases import CASES, CONFIG_FILE
from tests.faults.mutations_strategy import Example

ABSENT = object()


def prepare(example: Example, folder: Path) -> list[str]:
    """Applies the example's mutations in `folder`, a copy of its case's project. The arguments of the run."""
    case = CASES[example.case]
    config, extra = deepcopy(case.config), []
    text_changes = []
    for kind, *of_change in example.mutations:
        if kind in OF_CONFIG and config is not None:
            OF_CONFIG[kind](config, *of_change)
        elif kind.startswith("text") or kind == "twice":
            text_changes.append((kind, of_change))
        elif kind in OF_ARGUMENTS:
            extra += OF_ARGUMENTS[kind](*of_change)
        elif kind in OF_FILES:
            OF_FILES[kind](folder / of_change[0], *of_change[1:])
    arguments = list(case.arguments)
    if config is not None:
        content = config_text(config).encode("utf-8", "surrogatepass")
        for kind, of_change in text_changes:
            content = OF_TEXT[kind](content, *of_change)
        (folder / CONFIG_FILE).write_bytes(content)
        arguments = ["--config", CONFIG_FILE, *arguments]
    return [as_argument(text) for text in (*arguments, *extra)]


def config_text(config) -> str:
    """JSON with NaN and infinities as Python writes them, and lone surrogates escaped."""
    return json.dumps(config, indent=1)


def as_argument(text: str) -> str:
    """What a shell can pass: no NUL, and no lone surrogate but those that stand for a byte."""
    fit = "".join("?" if sign == "\0" or "\ud800" <= sign <= "\udc7f" or "\udd00" <= sign <= "\udfff" else sign
                  for sign in text)
    return fit[:100_000]


# -- the config's values -----------------------------------------------------------------------------------------


def get(config, path: tuple):
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return ABSENT
        config = config[key]
    return config


def put(config: dict, path: tuple, value) -> None:
    """Sections on the way are made; where a value that is none is in the way, nothing is done."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
        if not isinstance(config, dict):
            return
    config[path[-1]] = deepcopy(value)


def remove(config: dict, path: tuple) -> None:
    parent = get(config, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def rename(config: dict, path: tuple, name: str) -> None:
    value = get(config, path)
    remove(config, path)
    put(config, (*path[:-1], name), None if value is ABSENT else value)


def move(config: dict, path: tuple, target: tuple) -> None:
    """The key, with its value, into the section that holds `target`."""
    value = get(config, path)
    remove(config, path)
    put(config, (*target[:-1], path[-1]), None if value is ABSENT else value)


def swap(config: dict, left: tuple, right: tuple) -> None:
    values = get(config, left), get(config, right)
    for path, value in zip((left, right), reversed(values), strict=True):
        remove(config, path) if value is ABSENT else put(config, path, value)


def merge(config: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict) and key != "columns":
            merge(config[key], value)
        else:
            config[key] = deepcopy(value)


OF_CONFIG: dict[str, Callable] = {
    "value": put, "delete": remove, "rename": rename, "move": move, "swap": swap, "together": merge,
}

# -- the config's text -------------------------------------------------------------------------------------------


def damaged(content: bytes, operation: str, first: int, second: int, inserted: bytes) -> bytes:
    """first, second: places in millionths of the length."""
    start, end = sorted(place * len(content) // 10**6 for place in (first, second))
    end = min(end, start + 8) if operation in ("drop", "replace") and second % 2 else end
    flipped = bytes([content[start] ^ (1 << second % 8)]) if start < len(content) else b""
    return {
        "drop": content[:start] + content[end:],
        "flip": content[:start] + flipped + content[start + 1 :],
        "insert": content[:start] + inserted + content[start:],
        "cut": content[:start],
        "repeat": content[:end] + content[start:],
        "replace": content[:start] + inserted + content[end:],
    }[operation]


def recoded(content: bytes, encoding: str) -> bytes:
    try:
        return content.decode("utf-8", "surrogatepass").encode(encoding, "replace")
    except UnicodeError:
        return content


def key_twice(content: bytes, path: tuple, value) -> bytes:
    """The key a second time, first in its section (which is found by its name)."""
    text = content.decode("utf-8", "surrogatepass")
    start = text.find(f'"{path[-2]}": {{') if len(path) > 1 else -1
    start = text.find("{", max(start, 0)) + 1
    new = f"{json.dumps(path[-1])}: {json.dumps(value)},"
    return (text[:start] + new + text[start:]).encode("utf-8", "surrogatepass")


OF_TEXT: dict[str, Callable] = {
    "text": lambda content, target, *of_damage: damaged(content, *of_damage),
    "text encoding": lambda content, target, encoding: recoded(content, encoding),
    "twice": key_twice,
}

# -- arguments ---------------------------------------------------------------------------------------------------


def set_value(name: str, value, as_json: bool) -> list[str]:
    return ["--set", f"{name}={json.dumps(value) if as_json else value}"]


OF_ARGUMENTS: dict[str, Callable] = {
    "set": lambda text: ["--set", text], "set value": set_value, "flag": lambda texts: list(texts),
}

# -- files -------------------------------------------------------------------------------------------------------


def change_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    if path.is_file():
        path.write_bytes(change(path.read_bytes()))


def change_table(path: Path, change: Callable[[list[list[str]]], list[list[str]] | None]) -> None:
    """Reads the CSV as rows, and writes what `change` returns, or the rows that it has changed."""
    if not path.is_file():
        return
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8", errors="surrogateescape"), newline="")))
    except csv.Error:
        return
    rows = change(rows) or rows
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))


def change_columns(path: Path, operation: str, column: int, name: str) -> None:
    def change(rows: list[list[str]]) -> list[list[str]]:
        if operation == "rename":
            return [[*row[:column], name, *row[column + 1 :]] if index == 0 else row for index, row in enumerate(rows)]
        cut = {"drop": lambda row: row[:column] + row[column + 1 :],
               "double": lambda row: row[: column + 1] + row[column:],
               "first": lambda row: row[column:] + row[:column], "reverse": lambda row: row[::-1]}
        return [cut[operation](row) for row in rows]

    change_table(path, change)


def change_rows(path: Path, operation: str, number: int) -> None:
    def change(rows: list[list[str]]) -> list[list[str]]:
        number_in = number % max(1, len(rows))
        row = rows[number_in] if rows else []
        new = {"drop": [], "double": [row, row], "empty": [[""] * len(row)], "header": [row, rows[0] if rows else []],
               "short": [row[:-1]], "long": [[*row, "more"]]}
        return [rows[0], row] if operation == "only" and rows else rows[:number_in] + new.get(operation, [row]) + rows[
            number_in + 1 :]

    change_table(path, change)


def change_cell(path: Path, row: int, column: int, text: str) -> None:
    def change(rows: list[list[str]]) -> None:
        if row < len(rows) and column < len(rows[row]):
            rows[row][column] = text

    change_table(path, change)


def change_quoting(path: Path, style: str) -> None:
    def change(content: bytes) -> bytes:
        if style == "escaped":
            return content.replace(b'""', b'\\"')
        if style == "single":
            return content.replace(b'"', b"'")
        if style == "none":
            return content.replace(b'"', b"")
        return b"\n".join(b'"' + line.replace(b",", b'","') + b'"' for line in content.split(b"\n"))

    change_bytes(path, change)


def change_file(path: Path, operation: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if operation == "empty":
        path.touch()
    elif operation == "folder":
        path.mkdir()
    elif operation == "dangling link":
        path.symlink_to("nowhere")


def change_model_key(path: Path, key: str, value) -> None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(values, dict):
        path.write_text(json.dumps({**values, key: value}), encoding="utf-8")


OF_FILES: dict[str, Callable] = {
    "csv bytes": lambda path, *of_damage: change_bytes(path, lambda content: damaged(content, *of_damage)),
    "csv encoding": lambda path, encoding: change_bytes(path, lambda content: recoded(content, encoding)),
    "csv line ends": lambda path, end: change_bytes(path, lambda content: content.replace(b"\n", end.encode())),
    "csv separator": lambda path, sign: change_bytes(path, lambda content: content.replace(b",", sign.encode())),
    "csv content": lambda path, content: change_bytes(path, lambda old: content),
    "csv columns": change_columns, "csv rows": change_rows, "csv cell": change_cell, "csv quoting": change_quoting,
    "file": change_file, "model key": change_model_key,
    "file bytes": lambda path, *of_damage: change_bytes(path, lambda content: damaged(content, *of_damage)),
}
