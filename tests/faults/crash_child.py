"""What a child of the fork server does: a script's main, whole, or with a fault in one call of one of its functions."""

import importlib
from pathlib import Path

import train
import train_kd
import validate_model
from tests.faults import operations

MAINS = {"train": train.main, "train_kd": train_kd.main, "validate_model": validate_model.main}


def script(name: str, arguments: list[str]) -> int:
    return MAINS[name](arguments)


def script_with_fault(
    name: str, arguments: list[str], library: str, target: str, call: int, folder: str, excluded: str | None = None,
    log: str | None = None, **fault,
) -> int:
    """The script, with `operations.start(**fault)` during the `call`-th call of `target` (`module:name` or
    `module:class.name`)."""
    calls = 0
    paths = {"folder": Path(folder), "excluded": excluded and Path(excluded), "log": log and Path(log)}

    def faulty(original, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*args, **kwargs)
        with operations.faults(Path(library), **paths, **fault):
            return original(*args, **kwargs)

    replace(target, faulty)
    return script(name, arguments)


def script_counting_calls(name: str, arguments: list[str], target: str, log: str) -> int:
    """The script; the number of its calls of `target` is written to the file `log`."""
    calls = 0

    def counted(original, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    replace(target, counted)
    code = script(name, arguments)
    Path(log).write_text(str(calls), encoding="utf-8")
    return code


def replace(target: str, faulty) -> None:
    """`faulty(original, ...)` in the place of a function or method."""
    module, path = target.split(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: faulty(original, *args, **kwargs))
