"""Whether a run of a mutated case ended as it may: the rules, and what of them was broken."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults.mutations_child import LEFT_THE_FOLDER, Outcome
from utils.cli import training_parser
from utils.config.load import ConfigError, load_config
from utils.config.validate_options import read_options, validate_parser
from utils.runs.checkpoint import CheckpointError, verify
from utils.runs.run_folder import RUN_FILES

LONGEST_LINE = 1500
TRACES = ("Traceback (most recent call last)", "Exception ignored", "Segmentation fault", "Fatal Python error")
# Of an unexpected error told in one line, which is a fault of the program all the same.
LAST_RESORT = "unexpected"
REWRITTEN = ("config.json", "metrics.jsonl", "tensorboard", "scores.json", "skipped_rows.json")
# From a path, a number or a quoted text on, messages of one kind differ.
VARIABLE = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[.*\]|\{.*\}|[\w./~-]*/[\w./~-]*|-?\d[\d.,e+-]*""")


class Verdict(NamedTuple):
    """label: how the run ended. fault: what of it must not be, one line; None where all is well."""

    label: str
    fault: str | None


Snapshot = dict[str, object]


def snapshot(folder: Path) -> Snapshot:
    """{path: bytes of a file, ("link", target), or None for a folder} of all below `folder`."""
    found: Snapshot = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = ("link", str(path.readlink()))
            else:
                found[key] = path.read_bytes() if path.is_file() else None
    return found


def judge(script: str, arguments: list[str], models, folder: Path, outcome: Outcome, before: Snapshot) -> Verdict:
    """models: {script: its config's model}. folder: where it ran; before: what was in it."""
    label = {0: "ran", 2: "code 2", 1: "code 1"}.get(outcome.code, f"code {outcome.code}")
    if outcome.stopped and outcome.code == 143:
        label = "stopped by SIGTERM"
    after = snapshot(folder)
    places = written_places(script, arguments, models, folder)
    faults = (ending_fault(script, outcome), *message_faults(script, arguments, outcome),
              *outside_faults(before, after, places, script))
    if outcome.code in (0, 1, 2) or outcome.stopped:
        faults = (*faults, *earlier_faults(before, after, places, outcome, script))
    if outcome.code == 0:
        faults = (*faults, *result_faults(script, arguments, folder, outcome, places))
    return Verdict(label, next((fault for fault in faults if fault), None))


# -- how it ended ------------------------------------------------------------------------------------------------


def ending_fault(script: str, outcome: Outcome) -> str | None:
    if outcome.killed:
        return f"hangs: still there after SIGTERM; {tail(outcome.stderr)}"
    if outcome.code == LEFT_THE_FOLDER:
        return tail(outcome.stderr)
    if outcome.stopped:
        in_order = outcome.code in (0, 1, 2) or (outcome.code == 143 and "checkpoint written; " in outcome.stderr)
        said = tail(outcome.stderr)
        return None if in_order else f"hangs: SIGTERM after its time ended it with {outcome.code}; {said}"
    return None if outcome.code in (0, 1, 2) else f"exit code {outcome.code}: {place_of_traceback(outcome.stderr)}"


def message_faults(script: str, arguments: list[str], outcome: Outcome) -> Iterator[str]:
    asked_for = "--debug" in arguments
    if any(text in outcome.stderr + outcome.stdout for text in TRACES) and not asked_for:
        yield f"traceback: {place_of_traceback(outcome.stderr)}"
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in outcome.stderr.split("\n")]  # behind a progress bar
    start = f"{script}: error: "
    errors = [line for line in lines if line.startswith(start)]
    if outcome.code in (1, 2):
        last = next((line for line in reversed(lines) if line.strip()), "")
        if not last.startswith(start):
            yield f"the last line is no error: {tail(last)}"
    elif errors:
        yield f"code {outcome.code} with an error: {tail(errors[0])}"
    for line in errors:
        if len(line) > LONGEST_LINE:
            yield f"an error of {len(line)} characters: {line[:150]}"
        if not line.isprintable():
            yield f"an error with control characters: {line[:150]!a}"
        if line.removeprefix(start).startswith(LAST_RESORT):
            yield f"unexpected error: {line}"
        if len(line) < len(start) + 10:
            yield f"an error that says nothing: {line}"
    for line in lines:
        if re.search(r"\w*Warning: ", line) and start not in line:
            yield f"a warning of a library: {line[:200]}"


def place_of_traceback(text: str) -> str:
    """Type of the error and the last place of the product in a traceback."""
    places = re.findall(r'File "[^"]*?/((?:utils|data|model)/\w+\.py|\w+\.py)", line \d+, in (\S+)', text)
    own = [f"{path}:{name}" for path, name in places if "/" in path or path.startswith(("train", "validate"))]
    errors = [line for line in text.splitlines() if re.match(r"\w[\w.]*(Error|Exception|Exit|Warning)\b", line)]
    last = errors[-1] if errors else tail(text)
    return f"{own[-1] if own else '?'}: {last[:200]}"


def tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return ascii(lines[-1][-300:])[1:-1] if lines else "nothing was said"


# -- files -------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Relative to the run's folder: where results go (None: nothing may be written), and where caches may."""

    results: str | None
    caches: tuple[str, ...]


def written_places(script: str, arguments: list[str], models, folder: Path) -> Places:
    """Where the run may write, as its config says; nowhere where that cannot be loaded."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        config = loaded(script, arguments, models)
        if config is None:
            return Places(None, ())
        if script == "validate_model.py":
            return Places(relative(config.output_dir, folder), ())
        output_dir = config.trainer_kwargs.output_dir
        caches = [config.dataset_kwargs.cache_dir]
        if script == "train_kd.py" and config.distillation_kwargs.teacher_cache:
            caches.append(config.distillation_kwargs.teacher_cache.dir)
        return Places(relative(output_dir, folder), tuple(relative(path, folder) for path in caches if path))
    finally:
        os.chdir(here)


def loaded(script: str, arguments: list[str], models):
    """The config of the run, by the product's own reading; None where it has none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(
        Exception, SystemExit
    ):
        if script == "validate_model.py":
            return read_options(validate_parser("").parse_args(arguments))
        options = training_parser(script, "", "", "").parse_args(arguments)
        return load_config(options.config, options.set, models[script])
    return None


def relative(path: str, folder: Path) -> str:
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:
        return "\0"


def is_below(path: str, place: str | None) -> bool:
    return place is not None and (place == "." or path == place or path.startswith(f"{place}/"))


def outside_faults(before: Snapshot, after: Snapshot, places: Places, script: str) -> Iterator[str]:
    """What is new or other than before where nothing may be written."""
    for path in after.keys() | before.keys():
        if path in before and path in after and before[path] == after[path]:
            continue
        allowed = (places.results, *places.caches)
        on_the_way = path in after and after[path] is None and any(
            place is not None and place.startswith(f"{path}/") for place in allowed)
        if not on_the_way and not any(is_below(path, place) for place in allowed):
            what = "new" if path not in before else "gone" if path not in after else "changed"
            yield f"{what} outside of output and cache folders: {path!a}"


def earlier_faults(before: Snapshot, after: Snapshot, places: Places, outcome: Outcome, script: str) -> Iterator[str]:
    """What became of the results that were in the output folder."""
    if places.results is None:
        return
    names = RUN_FILES if script != "validate_model.py" else ("predictions.json", "scores.json")
    start = "" if places.results == "." else f"{places.results}/"
    earlier = {path: value for path, value in before.items()
               if path.startswith(start) and path.removeprefix(start).split("/")[0] in names}
    changed = [path for path in earlier if path not in after or after[path] != earlier[path]]
    if not changed:
        return
    if script == "validate_model.py":
        if outcome.code != 0:
            yield f"code {outcome.code}, and {changed[0]} is not as it was"
        return
    moved = {path.split("/")[0] for path in (path.removeprefix(start) for path in after if path.startswith(start))
             if re.fullmatch(r"earlier-run-\d+", path.split("/")[0]) and f"{start}{path.split('/')[0]}" not in before}
    if outcome.code == 2:
        yield f"code 2, and the earlier run's {changed[0]} is {'changed' if changed[0] in after else 'gone'}"
    elif moved:
        for path, value in earlier.items():
            if after.get(f"{start}{min(moved)}/{path.removeprefix(start)}", "gone") != value:
                yield f"{path} of the earlier run was not moved as it was to {min(moved)}"
    else:
        yield from resumed_faults(earlier, after, changed, start, outcome)


def resumed_faults(
    earlier: Snapshot, after: Snapshot, changed: list[str], start: str, outcome: Outcome
) -> Iterator[str]:
    """Of a run that went on in its folder: older checkpoints may be retired whole, logs only grow."""
    steps = [path for path in after if re.fullmatch(rf"{re.escape(start)}model_checkpoints/step-\d+", path)]
    for path in changed:
        name, *rest = path.removeprefix(start).split("/")
        step = rest[0] if name == "model_checkpoints" and rest else ""
        retired = step.startswith("step-") and f"{start}model_checkpoints/{step}" not in after
        rewritten = path in after and (name in REWRITTEN or step in ("last", "best"))
        if name == "metrics.jsonl" and path in after and not after[path].startswith(earlier[path]):
            yield f"{path} lost lines of the earlier run"
        elif not rewritten and not (retired and steps):
            yield f"code {outcome.code}: the earlier run's {path} is {'changed' if path in after else 'gone'}"


# -- results -----------------------------------------------------------------------------------------------------


def result_faults(script: str, arguments: list[str], folder: Path, outcome: Outcome, places: Places) -> Iterator[str]:
    if "--help" in arguments or "-h" in arguments:
        return
    if "--print_config" in arguments:
        try:
            json.loads(outcome.stdout)
        except ValueError as error:
            yield f"--print_config printed no JSON: {error}"
        return
    if places.results is None:
        yield "it ran, but its config cannot be loaded"
        return
    if script == "validate_model.py":
        try:
            predictions, scores = (json.loads((folder / places.results / name).read_text(encoding="utf-8"))
                                   for name in ("predictions.json", "scores.json"))
            if len(predictions) != scores["rows"] or not predictions:
                yield f"{len(predictions)} predictions, {scores['rows']} rows scored"
        except (OSError, ValueError, KeyError) as error:
            yield f"it ran, but its results cannot be read: {error}"
        return
    try:
        verify(folder / places.results / "model_checkpoints" / "last")
    except (CheckpointError, ConfigError) as error:
        yield f"it ran, but left no checkpoint: {error}"


def kind_of(message: str) -> str:
    """A message without what differs from example to example."""
    return VARIABLE.sub("…", message)[:160]
