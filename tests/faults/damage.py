"""Damages every file of checkpoints, caches and results in turn: is it found before it is used, and named?

    python -m tests.faults.damage [--tries 40] [--seed 1]

Each file is emptied, deleted, replaced by a folder, cut short and has bits flipped, the last two at random places.
Exit code 1 where something damaged was used. `metrics.jsonl` and configs have no checksums and are not looked at here.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from utils.runs.own_checkpoints import check_model_folder

from data.prompts import PromptFormat
from data.teacher_cache import ArrayShape, TeacherCache, is_whole
from data.tokenized import open_token_table
from model.language_model import ModelError
from model.loading import load_tokenizer
from tests.conftest import byte_tokenizer
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import changed, make_project, run
from utils.evaluation.comparison import CompareError, compare, read_evaluation
from utils.runs.checkpoint import CheckpointError, Checkpoints, load_state, verify

ENDINGS = ("found", "older taken", "made anew", "read around", "harmless")


class Used(AssertionError):
    """Something damaged was used, or was found and not named."""


@dataclass(frozen=True)
class Target:
    """A file, and what is done with it once it is damaged: `use` says how that ended, or raises Used."""

    path: Path
    use: Callable[[], str]


# -- damage --------------------------------------------------------------------------------------------------------


def damages(path: Path, tries: int, generator: random.Random) -> Iterator[str]:
    """Damages the file in one way after the other and says how; it is whole again after each."""
    whole = path.read_bytes()
    for what, harm in [("emptied", b""), ("deleted", None), ("replaced by a folder", ...),
                       *(cut(whole, generator) for _ in range(tries)), *flips(whole, tries, generator)]:
        if harm == whole or is_same_json(harm, whole):
            continue
        remove(path)
        if harm is ...:
            path.mkdir()
        elif harm is not None:
            path.write_bytes(harm)
        try:
            yield what
        finally:
            remove(path)
            path.write_bytes(whole)


def is_same_json(one: object, other: bytes) -> bool:
    """Whether the texts mean the same, such as without the last line end."""
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, TypeError):
        return False


def cut(whole: bytes, generator: random.Random) -> tuple[str, bytes]:
    length = generator.randrange(len(whole))
    return f"cut to {length} of {len(whole)} bytes", whole[:length]


def flips(whole: bytes, tries: int, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """A bit of the first byte, one of the last, others anywhere."""
    bits = 8 * len(whole)
    for bit in (generator.randrange(8), bits - 1 - generator.randrange(8), *generator.choices(range(bits), k=tries)):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} flipped", bytes(harmed)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tried(targets: list[Target], tries: int, seed: int, progress=lambda targets: targets) -> tuple[Counter, list[str]]:
    """(how often each ending came, a line for each damage that was used)."""
    endings, used, generator = Counter(), [], random.Random(seed)
    for target in progress(targets):
        for what in damages(target.path, tries, generator):
            try:
                endings[target.use()] += 1
            except Used as error:
                used.append(f"{target.path}, {what}: {error}")
    return endings, used


# -- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint_targets(folder: Path) -> list[Target]:
    """The files of the newest of two checkpoints of a run."""
    config = changed(make_project(folder, rows=4), trainer_kwargs={"n_batch_ckpt_save": 1, "keep_checkpoints": 2})
    completed(run(folder, config))
    root = folder / "run" / "model_checkpoints"
    newest = root / "step-2"
    run_id = load_state(newest)[0]["run_id"]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    return [Target(path, lambda path=path: use_checkpoint(root, run_id, newest, path)) for path in files]


def use_checkpoint(root: Path, run_id: str, damaged: Path, path: Path) -> str:
    """Resumed by itself, by `resume_from`, and named as a model."""
    is_manifest = path.name == "manifest.json"
    name = "" if is_manifest else str(path)  # where the manifest is damaged, any file may be what does not fit it
    found, notices = Checkpoints(root, run_id, 2).newest()
    if found != root / "step-1":
        raise Used(f"{found} is taken for the newest")
    if len(notices) != 1 or damaged.name not in notices[0] or name not in notices[0]:
        raise Used(f"it is not named: {notices}")
    refuses(lambda: verify(damaged), CheckpointError, name or str(damaged))
    of_model = is_manifest or path.parent.name != "trainer_state"
    if of_model:
        refuses(lambda: check_model_folder(str(damaged), "--model_path"), ModelError, name or str(damaged))
    return "older taken"


def refuses(use: Callable[[], object], error: type[Exception], name: str) -> None:
    try:
        use()
    except error as caught:
        if name not in str(caught) or "\n" in str(caught):
            raise Used(f"it is not named in one line: {caught}") from caught
    else:
        raise Used(f"no {error.__name__}")


# -- caches --------------------------------------------------------------------------------------------------------


def token_table_targets(folder: Path) -> list[Target]:
    make_project(folder, rows=6)
    table_of = lambda: open_token_table(  # noqa: E731
        folder / "train.csv", PromptFormat(byte_tokenizer(), max_length=320), folder / "tokens"
    )
    table = table_of()
    whole = read_table(table)

    def use() -> str:
        before = sorted(path.stat().st_ino for path in table.folder.iterdir())
        if read_table(table_of()) != whole:
            raise Used("other rows")
        if before == sorted(path.stat().st_ino for path in table.folder.iterdir()):
            raise Used("it was not made anew")
        return "made anew"

    return [Target(path, use) for path in sorted(table.folder.iterdir())]


def read_table(table) -> list:
    return [[table.ids(row).tolist() for row in range(len(table))], table.boundaries.tolist(), table.numbers.tolist(),
            table.names(range(len(table))), table.skipped]


def teacher_cache_targets(folder: Path, kind: str) -> list[Target]:
    """The files of a filled teacher cache of a distillation."""
    cache = {"kind": kind, **({"top_k": 8} if kind == "top_k" else {})}
    config = make_kd_project(folder, rows=6, kl_div="JS", teacher_cache=cache)
    completed(run_kd(folder, changed(config, trainer_kwargs={"monitor_val": False})))
    [place] = [path.parent for path in (folder / "run" / "teacher_cache").glob("train-*/manifest.json")]
    tokenizer = load_tokenizer(str(folder / "student"))
    table = open_token_table(folder / "train.csv", PromptFormat(tokenizer, max_length=320), folder / "cache")
    manifest = json.loads((place / "manifest.json").read_text())
    arrays = {name: ArrayShape(*shape) for name, shape in manifest["arrays"].items()}
    rows = [row_of(TeacherCache(place, table, arrays), row) for row in range(len(table))]
    if not is_whole(place, table, arrays) or any(row is None for row in rows):
        raise RuntimeError("the cache is not filled")

    def use() -> str:
        if not is_whole(place, table, arrays):
            return "made anew"
        cache = TeacherCache(place, table, arrays)
        read = [row_of(cache, row) for row in range(len(table))]
        if any(found not in (None, row) for found, row in zip(read, rows, strict=True)):
            raise Used("a damaged row was read")
        if None not in read:
            raise Used("no row was found damaged")
        return "read around"

    return [Target(path, restoring(use, place)) for path in sorted(place.iterdir())]


def restoring(use: Callable[[], str], folder: Path) -> Callable[[], str]:
    """`use`, and the other files of the folder afterwards as before."""
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def call() -> str:
        damaged = {path for path, content in whole.items() if not path.is_file() or path.read_bytes() != content}
        try:
            return use()
        finally:
            for path in whole.keys() - damaged:
                path.write_bytes(whole[path])

    return call


def row_of(cache: TeacherCache, row: int) -> dict[str, list] | None:
    found = cache.read(np.array([row]))
    return None if found is None else {name: values.tolist() for name, values in found.items()}


# -- results -------------------------------------------------------------------------------------------------------


def result_targets(folder: Path) -> list[Target]:
    """scores.json and predictions as a training writes them, read by utils.compare."""
    config = changed(make_project(folder, rows=4), trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    completed(run(folder, config))
    output_dir = folder / "run"
    whole = compare([read_evaluation(name, output_dir) for name in "ab"], baseline="a")

    def use(path: Path) -> str:
        try:
            found = compare([read_evaluation(name, output_dir) for name in "ab"], baseline="a")
        except CompareError as error:
            if str(path) not in str(error) or "\n" in str(error):
                raise Used(f"it is not named in one line: {error}") from error
            return "found"
        if found == whole:
            return "harmless"
        if not path.exists() and "no predictions" in str(found[1]):
            return "found"
        raise Used("another comparison")

    paths = [output_dir / "scores.json", *(output_dir / "predictions").iterdir()]
    return [Target(path, lambda path=path: use(path)) for path in paths]


def completed(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"exit code {code} of a run that nothing disturbs")


# -- all -----------------------------------------------------------------------------------------------------------


def make_targets(folder: Path) -> dict[str, list[Target]]:
    for name in ("checkpoint", "tokens", "hidden", "top-k", "results"):
        (folder / name).mkdir(parents=True)
    return {
        "checkpoint": checkpoint_targets(folder / "checkpoint"),
        "token table": token_table_targets(folder / "tokens"),
        "teacher cache, hidden": teacher_cache_targets(folder / "hidden", "hidden"),
        "teacher cache, top-k": teacher_cache_targets(folder / "top-k", "top_k"),
        "results": result_targets(folder / "results"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.damage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=40, help="cuts and flips of each file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of their places (default: %(default)s)")
    options = parser.parse_args(arguments)
    files, endings, used = 0, Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for name, targets in make_targets(Path(scratch)).items():
            bar = lambda targets, name=name: tqdm(targets, desc=name, unit="file", disable=None)  # noqa: E731
            of_kind, wrong = tried(targets, options.tries, options.seed, bar)
            print(f"{name}: {summary(len(targets), of_kind, wrong)}", flush=True)
            files, endings, used = files + len(targets), endings + of_kind, used + wrong
    for line in used:
        print(f"used: {line}")
    print(f"all: {summary(files, endings, used)}")
    return 1 if used else 0


def summary(files: int, endings: Counter, used: list[str]) -> str:
    ended = ", ".join(f"{endings[each]} {each}" for each in ENDINGS if endings[each])
    return f"{files} files, {endings.total() + len(used)} damages: {ended}, {len(used)} used"


if __name__ == "__main__":
    sys.exit(main())
