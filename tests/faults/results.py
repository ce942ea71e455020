"""What a run left in its folder, and what is wrong with it; how a run that failed may end."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from tests.faults.runs import Outcome

# What no two runs share, or what a disturbed run may leave: curves, caches, locks, earlier runs.
PASSING = re.compile(r"^(tensorboard|[^/]*cache)(/|$)|(^|/)earlier-run-\d+(/|$)|\block\b")
OWN_VALUES = re.compile(r"run_id|sha256|bytes|_at$|time|second|environment|pid|host|memory", re.IGNORECASE)
TRACES = re.compile(
    r"Traceback \(most|Exception ignored|Fatal Python error|error: (unexpected )?\w+(Error|Exception)\b"
)
LONGEST_LINE = 1500

Results = dict[tuple[str, str], object]  # {(path, key inside it): value}


def read_results(folder: Path) -> Results:
    found: Results = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not PASSING.search(name):
            try:
                found |= {(name, key): value for key, value in content(path)}
            except (ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
                found[name, ""] = f"unreadable: {error}"
    return found


def content(path: Path) -> Iterator[tuple[str, object]]:
    if path.is_symlink() or path.is_dir():
        yield "", f"link to {path.readlink()}" if path.is_symlink() else "folder"
    elif path.suffix == ".safetensors":
        yield from leaves(load(path.read_bytes()))
    elif path.suffix == ".pt":  # equal values may be stored in other bytes: what is the same object is stored once
        yield from leaves(torch.load(path, weights_only=True))
    elif path.suffix == ".jsonl":
        yield from leaves([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    elif path.suffix == ".json" and "tokenizer" not in path.name:
        yield from leaves(json.loads(path.read_bytes()))
    else:
        yield "", path.read_bytes()


def leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """(key, value) of all that is nested in `value`, without what no two runs share; tensors as bytes."""
    if isinstance(value, dict):
        for name, part in value.items():
            if not OWN_VALUES.search(str(name)):
                yield from leaves(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        yield f"{key}.length", len(value)
        for index, part in enumerate(value):
            yield from leaves(part, f"{key}[{index}]")
    elif isinstance(value, torch.Tensor):
        yield key, (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield key, value


def differences(expected: Results, found: Results) -> list[str]:
    """A line for each file that is missing, additional or different."""
    lines = {}
    names, others = ({name for name, _ in results} for results in (expected, found))
    lines |= {name: f"{name}: was not left by the undisturbed run" for name in others - names}
    lines |= {name: f"{name}: missing" for name in names - others}
    for name, key in [*expected, *found]:
        left, right = (results.get((name, key), "nothing") for results in (expected, found))
        if left != right and name not in lines:
            lines[name] = f"{name}: {key}: {right!r:.60} in place of {left!r:.60}"
    return sorted(lines.values())


def torn_files(folder: Path) -> list[str]:
    """Results that a reader would find half written: every JSON and the weights of `last` and `best`."""
    lines = []
    for path in folder.rglob("*.json"):
        parts = path.relative_to(folder).parts
        if not PASSING.search("/".join(parts)) and not any("tmp" in part or part.startswith(".") for part in parts):
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                lines.append(f"{path}: half written: {error}")
    for name in ("last", "best"):
        if (folder / "model_checkpoints" / name).exists():
            try:
                load((folder / "model_checkpoints" / name / "model.safetensors").read_bytes())
            except (OSError, SafetensorError) as error:
                lines.append(f"{name}: {error}")
    return lines


def newest_step(folder: Path) -> int:
    """The step of `last`, 0 if there is none."""
    last = folder / "model_checkpoints" / "last"
    return int(last.resolve().name.removeprefix("step-")) if last.exists() else 0


def resumed_step(outcome: Outcome) -> int:
    """From which step a run says that it resumed; 0 if it began."""
    steps = re.findall(r"(?:resuming from|finished).*?step[- ](\d+)", outcome.errors + outcome.output)
    return int(steps[0]) if steps else 0


def ending_problems(script: str, outcome: Outcome, words: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with how a run ended that may fail: exit code 0, or 1 or 2 and one line for each error.

    words: one of these must be in an error.
    """
    text = outcome.errors + outcome.output
    lines = [line.rsplit("\r", 1)[-1] for line in outcome.errors.rstrip("\r\n").split("\n")]  # behind a progress bar
    start = f"{script}: error: " if script.endswith(".py") else ""
    errors = [line for line in lines if ": error: " in line]
    found = []
    if outcome.hung:
        found.append("hung")
    elif outcome.code not in (0, 1, 2):
        found.append(f"exit code {outcome.code}: {text[-1500:]}")
    if match := TRACES.search(text):
        found.append(f"an error that nobody foresaw: {text[max(match.start() - 100, 0):][-1500:]}")
    if outcome.code == 0 and errors:
        found.append(f"exit code 0 with an error: {errors[0]}")
    if outcome.code in (1, 2):
        if not lines[-1].startswith(start) or ": error: " not in lines[-1]:
            found.append(f"the last line is no error: {lines[-1]!a}")
        if words and not any(word in line for word in words for line in errors):
            found.append(f"none of {words} is in: {errors}")
    for line in errors:
        if len(line) > LONGEST_LINE or not line.isprintable() or len(line.partition(": error: ")[2]) < 10:
            found.append(f"an error that is no readable line: {line[:300]!a}")
    return found
