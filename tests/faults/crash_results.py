"""What a run left in its output folder, and where that is not what an uninterrupted one leaves."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

EARLIER = re.compile(r"earlier-run-[0-9]+")
TEMPORARY = re.compile(r"\.(tmp|building)\b.*")
# What no two runs share: names of runs, dates, speeds, versions.
OWN = {"run_id", "sha256", "saved_at", "seconds", "tokens_per_second", "_description_environment"}


def read_results(folder: Path) -> dict[str, object]:
    """The content of every file, link and folder below `folder` by its path, without what no two runs share.

    Curves of TensorBoard, whose files have names of their own, count as one folder.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if "tensorboard" not in name.parts[:-1]:
            try:
                found[name.as_posix()] = content(path)
            except (ValueError, KeyError, SafetensorError) as error:
                found[name.as_posix()] = f"unreadable: {error}"
    return found


def content(path: Path) -> object:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return "folder"
    if path.name == "manifest.json" and path.parent.name == "trainer_state":
        files = json.loads(path.read_bytes())["files"]
        return sorted(files)  # their sizes and digests are those of files that are compared themselves
    if path.suffix == ".json" and "tokenizer" not in path.name:
        return without_own(json.loads(path.read_bytes()))
    if path.name == "metrics.jsonl":
        return [without_own(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".safetensors":
        return {name: in_bytes(tensor) for name, tensor in load(path.read_bytes()).items()}
    if path.suffix == ".pt":  # equal values may be stored in other bytes: what is the same object is stored once
        return plain(torch.load(path, weights_only=True))
    return path.read_bytes()


def plain(value: object) -> object:
    """Nested values with tensors as `in_bytes` gives them."""
    if isinstance(value, torch.Tensor):
        return in_bytes(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def without_own(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_own(each) for key, each in value.items() if key not in OWN}
    return [without_own(each) for each in value] if isinstance(value, list) else value


def in_bytes(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """A line for each difference. What a killed run had begun may be kept as an `earlier-run-N`, without temporaries.
    """
    kept = {top(name) for name in expected}
    own = {name: value for name, value in found.items() if top(name) in kept or not EARLIER.fullmatch(top(name))}
    lines = [f"{name}: was not left by the uninterrupted run" for name in own.keys() - expected.keys()]
    lines += [f"{name}: missing" for name in expected.keys() - own.keys()]
    lines += [f"{name}: other content: {first_difference(expected[name], own[name])}"
              for name in expected.keys() & own.keys() if expected[name] != own[name]]
    lines += [f"{name}: a temporary file" for name in found.keys() - own.keys() if is_temporary(name)]
    return sorted(lines)


def top(name: str) -> str:
    return name.split("/")[0]


def is_temporary(name: str) -> bool:
    return any(TEMPORARY.fullmatch(part) for part in name.split("/"))


def first_difference(expected: object, found: object) -> str:
    """Where two contents differ first, short enough for a line."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *found]:
            if expected.get(key) != found.get(key):
                return f"{key}: {first_difference(expected.get(key), found.get(key))}"
    if isinstance(expected, list) and isinstance(found, list):
        for index, (left, right) in enumerate(zip(expected, found, strict=False)):
            if left != right:
                return f"[{index}]: {first_difference(left, right)}"
        return f"{len(expected)} and {len(found)} entries"
    return f"{expected!r:.60} and {found!r:.60}"
