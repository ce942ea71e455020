"""JSON as people write it by hand, read strictly: errors name the place and what to write there."""

import json
from collections import Counter
from collections.abc import Iterator
from os import PathLike

from utils.text import shorten

DEEPEST = 50
LARGEST = 10_000_000  # bytes of a config
DIGITS = 18  # of a whole number: what 64 bits hold
TOO_DEEP = f"nested deeper than {DEEPEST} levels: make it flatter"
# Beginnings of json's messages, and what to write instead.
SYNTAX = {
    "Expecting value": 'expected a value: "text", a number, true, false, null, [...] or {...}',
    "Expecting property name": 'expected a key in double quotes, "..."',
    "Expecting ',' delimiter": "expected a comma or a closing bracket",
    "Unterminated string": 'a string that is never closed: write " at its end',
    "Invalid control character": "a line end, tab or other control character in a string: write such as \\n or \\t",
    "Invalid \\escape": "a backslash in a string that escapes nothing: write \\\\, or / in paths",
    "Invalid \\u": "\\u in a string takes four hexadecimal digits, such as \\u00e9",
    "Extra data": "text behind the end of the object: remove it",
    "Unexpected UTF-8 BOM": "a second byte order mark: remove it",
}


class ConfigError(ValueError):
    """A config that cannot be used: one line for each error."""

    exit_code = 2


def read_json(path: str | PathLike) -> dict:
    """The object in a JSON file (UTF-8, with or without byte order mark).

    Raises:
        ConfigError: no such file, not UTF-8, wrong JSON (with line and column), a key twice in one object, or a file
            larger or deeper than a config can be.
    """
    place = shorten(str(path), 200)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a text as well as a Path)
            content = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        remedy = "name a config with --config FILE, or run ./demo.sh to see everything without one"
        raise ConfigError(f"{place} does not exist: {remedy}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{place} cannot be read: {reason}: name a JSON file with --config FILE") from error
    if len(content) > LARGEST:
        raise ConfigError(f"{place} is larger than {LARGEST // 10**6} MB: that is no config, name another file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: byte {error.start + 1} is not UTF-8 text: save the file as UTF-8") from error
    try:
        values = parse(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{place}: {where}: {syntax_problem(text, error)}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place} holds {kind(values)}: expected an object, {{...}}")
    return values


def parse(text: str):
    """JSON; ValueError for a key twice in one object, very long numbers and very deep nesting.

    NaN and infinities pass, because the models refuse them and can say under which key.
    """
    try:
        value = json.loads(text, parse_int=whole, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if is_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def is_deep(value) -> bool:
    """Whether lists and objects are nested deeper than DEEPEST levels, told without going deep itself."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for each in level if isinstance(each, (list, dict))
                 for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return True


def whole(text: str) -> int:
    if len(text) > 4000:  # int refuses more than 4300 digits; of shorter ones `unusable` can say under which key
        raise ValueError(f"{shorten(text, 20)} is a number of {len(text)} digits: write a shorter one")
    return int(text)


def unique(pairs: list[tuple[str, object]]) -> dict:
    for name, count in Counter(name for name, _ in pairs if not is_free_text(name)).items():
        if count > 1:
            raise ValueError(f"the key {show(name)} stands twice in one object: keep one of them")
    return dict(pairs)


def is_free_text(key: object) -> bool:
    return isinstance(key, str) and key.startswith("_description")


def syntax_problem(text: str, error: json.JSONDecodeError) -> str:
    """json's message, or for what people often write in JSON, what to write."""
    here, before = text[error.pos :].lstrip(), text[: error.pos].rstrip()
    comma, after = before.endswith(",") or here.startswith(","), here.removeprefix(",").lstrip()
    if comma and after.startswith(("}", "]")):
        return "a comma before the closing bracket: remove it"
    if here.startswith(("//", "/*", "#")):
        return 'JSON has no comments: write a "_description" key instead'
    if here.startswith("'"):
        return 'single quotes: write "..."'
    for word, value in (("True", "true"), ("False", "false"), ("None", "null")):
        if here.startswith(word):
            return f"{word}: write {value}"
    if not text.strip():
        return "the file is empty: write {} for the defaults"
    if not text.lstrip().startswith(("{", "[")):
        return "this is no JSON: expected an object, {...}"
    return next((remedy for start, remedy in SYNTAX.items() if error.msg.startswith(start)), error.msg.lower())


def unusable(value, path: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """(path, problem) of every value that no key can take: text that is none, and numbers beyond 64 bits.

    A file system and UTF-8 take neither NUL nor half of a surrogate pair; JSON's \\u0000 and \\ud800 write them.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            if broken := broken_sign(key):
                yield path, f"holds a key with the character {broken}: remove that character"
            else:
                yield from unusable(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from unusable(each, (*path, index))
    elif isinstance(value, str) and (broken := broken_sign(value)):
        yield path, f"is {show(value)}: it holds the character {broken}, which no text can: remove it"
    elif isinstance(value, int) and abs(value) >= 10**DIGITS:
        digits = len(str(abs(value)))
        yield path, f"is {shorten(str(value), 20)}, a number of {digits} digits: expected at most {DIGITS}"


def broken_sign(text: str) -> str | None:
    """The first NUL or lone surrogate of a text, as JSON would write it."""
    return next((f"\\u{ord(sign):04x}" for sign in text if sign == "\0" or "\ud800" <= sign <= "\udfff"), None)


# -- words -------------------------------------------------------------------------------------------------------


def show(value) -> str:
    return shorten(json.dumps(value, ensure_ascii=False, default=repr))


def kind(value) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
             type(None): "null"}
    return names.get(type(value), type(value).__name__)
