"""JSON that tells by a SHA-256 of its own whether a disk has changed it."""

import hashlib

from utils.files import json_text

KEY = "sha256"


def sealed(content: dict) -> dict:
    """The content, and under the last key the sum of the rest."""
    return {**content, KEY: sha256_of_text(json_text(content))}


def is_broken(content: dict) -> bool:
    """Whether the content is not what was sealed; False where it never was."""
    rest = {key: value for key, value in content.items() if key != KEY}
    try:
        return KEY in content and content[KEY] != sha256_of_text(json_text(rest))
    except (ValueError, RecursionError):  # NaN, half a character, too deep: nothing that was sealed here
        return True


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
