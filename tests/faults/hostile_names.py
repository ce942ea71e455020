"""Names and links in configs, data sets, checkpoints and run folders that lead out of the folder they belong to."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from data import cnn_dailymail
from data.prompts import PromptFormat
from data.scratch import clear_dead
from data.teacher_cache import ArrayShape, TeacherCache, is_whole, make_cache
from data.token_cache import open_token_table
from model.loading import load_language_model
from tests.conftest import byte_tokenizer, write_rows
from tests.faults.hostile_attack import Attack
from tests.faults.hostile_pickles import ROWS, checkpoint, model_folder, recompute_manifest, write_manifest
from utils.checkpoint import Checkpoints, load_state, verify
from utils.config import FineTuneConfig
from utils.run_folder import claimed, find_start, later_checkpoints
from validate_model import main as validate

PRECIOUS = b"the only copy"


def precious(folder: Path, name: str = "precious.txt") -> Path:
    """A file outside of what the program was given, which must stay as it is."""
    (folder / "outside").mkdir(exist_ok=True)
    (folder / "outside" / name).write_bytes(PRECIOUS)
    return folder / "outside" / name


def assert_untouched(*paths: Path) -> None:
    for path in paths:
        assert path.read_bytes() == PRECIOUS
        assert sorted(path.parent.iterdir()) == sorted({path, *paths})


# -- checkpoints -----------------------------------------------------------------------------------------------


def manifest_name(name: str):
    """An entry of a manifest; {outside}: the file outside."""

    def run(folder: Path) -> None:
        step, outside = checkpoint(folder), precious(folder)
        path = step / "trainer_state/manifest.json"
        manifest = json.loads(path.read_text())
        entry = {"bytes": len(PRECIOUS), "sha256": "0" * 64}
        manifest["files"][name.replace("{outside}", str(outside))] = entry
        write_manifest(step, manifest)
        verify(step)

    return run


def linked_file(folder: Path) -> None:
    step, outside = checkpoint(folder), precious(folder, "optimizer.pt")
    torch.save({}, outside)
    (step / "trainer_state/optimizer.pt").unlink()
    (step / "trainer_state/optimizer.pt").symlink_to(outside)
    recompute_manifest(step)
    load_state(step)


def linked_folder(folder: Path) -> None:
    step = checkpoint(folder)
    (step / "trainer_state").rename(folder / "elsewhere")
    (step / "trainer_state").symlink_to(folder / "elsewhere")
    verify(step)


def save_again(folder: Path, steps: range) -> None:
    from tests.conftest import tiny_language_model

    checkpoints = Checkpoints(folder / "run/model_checkpoints", "a" * 32, 1)
    for step in steps:
        checkpoints.save(step, tiny_language_model().save, {"identity": {}, "judged_by": ""}, {})


def retired_with_links(folder: Path) -> None:
    """The step that is retired holds links to a file and a folder outside, and another step is a link itself."""
    step, outside = checkpoint(folder), precious(folder)
    (step / "link").symlink_to(outside)
    (step / "folder").symlink_to(outside.parent)
    step.rename(folder / "moved")
    (step.parent / "step-0").symlink_to(folder / "moved")
    (folder / "moved").rename(step)
    save_again(folder, range(2, 5))
    assert sorted(path.name for path in step.parent.glob("step-*") if path.is_dir()) == ["step-4"]
    assert_untouched(outside)


def dead_writers_links(folder: Path) -> None:
    """Names of work in progress that are links, or whose inner name leads out of the folder."""
    root, outside = checkpoint(folder).parent, precious(folder)
    (root / ".tmp-gone-x-00000000").symlink_to(outside.parent)
    (root / ".tmp-new-step-9-00000001").symlink_to(outside)
    for number, name in enumerate(("..", ".", "outside", "step-1")):
        (root / f".tmp-old-{name}-0000001{number}").mkdir()
        (root / f".tmp-old-{name}-0000001{number}/inside").symlink_to(outside.parent)
    (folder / "run/.building-aaaaaaaa").symlink_to(outside.parent)
    Checkpoints(root, None, 1)
    clear_dead(folder / "run")
    assert_untouched(outside)


def odd_steps(folder: Path) -> None:
    """Folders that are nearly called like a step."""
    root = checkpoint(folder).parent
    for name in ("step-²", "step-٣", "step--1", "step-1e3", "step-" + "9" * 240, "step-"):
        (root / name).mkdir()
    assert set(later_checkpoints(root, 5)) <= {"step-" + "9" * 240, "step-٣"}
    assert Checkpoints(root, "a" * 32, 1).newest()[0] == root / "step-1"


def run_id_of_dots(folder: Path) -> None:
    before = precious(folder)
    root = folder / "run/model_checkpoints"
    from tests.conftest import tiny_language_model

    Checkpoints(root, "../../outside", 1).save(1, tiny_language_model().save, {}, {})
    assert_untouched(before)
    assert sorted(path.name for path in folder.iterdir()) == ["outside", "run"]


CHECKPOINTS = [
    Attack("a manifest that names a file by ..", manifest_name("../../../outside/precious.txt"), "leads out of"),
    Attack("a manifest that names an absolute path", manifest_name("{outside}"), "leads out of the folder"),
    Attack("a manifest that names a device", manifest_name("/dev/zero"), "/dev/zero: missing"),
    Attack("a manifest that names a NUL character", manifest_name("a\0b"), "missing"),
    Attack("a state file that is a link", linked_file, "optimizer.pt leads out of the folder"),
    Attack("a trainer_state that is a link", linked_folder, "leads out of the folder"),
    Attack("links in a step that is retired", retired_with_links),
    Attack("links and dots among the names of work in progress", dead_writers_links),
    Attack("folders that are nearly called like a step", odd_steps),
    Attack("a run_id of dots", run_id_of_dots),
]


# -- run folders -----------------------------------------------------------------------------------------------


def run_folder_link(name: str):
    def run(folder: Path) -> None:
        outside, output_dir = precious(folder), folder / "run"
        (output_dir / name).parent.mkdir(parents=True)
        (output_dir / name).symlink_to(outside)
        try:
            with claimed(output_dir, True):
                find_start(FineTuneConfig.model_validate({"trainer_kwargs": {"output_dir": str(output_dir)}}))
        finally:
            assert_untouched(outside)

    return run


def link_to_nowhere(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/scores.json").symlink_to(folder / "not-yet")
    with claimed(folder / "run", True):
        pass


def validate_into(output_dir: Path, csv_path: Path) -> int:
    return validate(["--csv_path", str(csv_path), "--model_path", "lead-3", "--output_dir", str(output_dir),
                     "--device_id", "-1"])


def result_link(folder: Path) -> None:
    outside = precious(folder)
    (folder / "results").mkdir()
    (folder / "results/predictions.json").symlink_to(outside)
    assert validate_into(folder / "results", write_rows(folder / "rows.csv", ROWS)) == 2
    assert_untouched(outside)


def ids_of_dots(folder: Path) -> None:
    """Ids, columns and a file's name that could be paths: they stay what they are."""
    rows = [{**row, "id": f"../../outside/{row['id']}", "../x": "/etc/passwd"} for row in ROWS]
    path = write_rows(folder / "..rows..csv", rows)
    output_dir = folder / "..odd $HOME; \\ \" ' *name"
    assert validate_into(output_dir, path) == 0
    for each in (path, folder / "..\n\x1b[2J"):
        path = path.rename(each)
        open_token_table(path, PromptFormat(byte_tokenizer(), max_length=64), folder / "cache")
    predictions = json.loads((output_dir / "predictions.json").read_text())
    assert [row["id"] for row in predictions] == [row["id"] for row in rows]
    assert len(list(folder.iterdir())) == 3 and len(list((folder / "cache").iterdir())) == 2


def table_record(*more: str):
    """The record of earlier tables names a file elsewhere, with its right sum, as one that is no longer needed."""

    def run(folder: Path) -> None:
        outside, output_dir = precious(folder), folder / "tables"
        output_dir.mkdir()
        (folder / "outside/precious.txt").rename(folder / "outside/precious.csv")
        outside = folder / "outside/precious.csv"
        names = {name: cnn_dailymail.file_digest(outside) for name in ("../outside/precious.csv", str(outside))}
        (output_dir / cnn_dailymail.RECORD).write_text(json.dumps({"settings": {"a": 1}, "sha256": names}))
        source = write_rows(folder / "rows.csv", ROWS)
        arguments = ["--from_csv", str(source), "--output_dir", str(output_dir), "--fraction", "1", *more]
        assert cnn_dailymail.main(arguments) == (0 if more else 2)
        assert_untouched(outside)

    return run


RUN_FOLDERS = [
    *(Attack(f"{name} of a run folder is a link", run_folder_link(name), f"{name} is a link to .*, outside")
      for name in ("config.json", "metrics.jsonl", "scores.json", "skipped_rows.json", "predictions/a.json")),
    Attack("a file of a run folder is a link to what is not there", link_to_nowhere, "scores.json is a link to"),
    Attack("predictions.json of an output_dir is a link", result_link),
    Attack("ids, columns, file and folder of odd names", ids_of_dots),
    Attack("a record of tables that names a file elsewhere", table_record()),
    Attack("a record of tables that names a file elsewhere, with --overwrite", table_record("--overwrite")),
]


# -- caches and models -----------------------------------------------------------------------------------------

ARRAYS = {"hidden": ArrayShape(2, "float32")}


def teacher_cache(change):
    """A teacher cache in which something was changed is not taken as whole."""

    def run(folder: Path) -> None:
        csv_path = write_rows(folder / "rows.csv", ROWS)
        table = open_token_table(csv_path, PromptFormat(byte_tokenizer(), max_length=64), folder / "tables")
        cache = folder / "caches/cache"
        make_cache(cache, table, ARRAYS, lambda place: (place / "head.safetensors").write_bytes(b"head"))
        assert is_whole(cache, table, ARRAYS)
        outside = change(cache, folder)
        assert not is_whole(cache, table, ARRAYS)
        make_cache(cache, table, ARRAYS)
        TeacherCache(cache, table, ARRAYS).write(np.array([0]), {"hidden": np.ones((table.label_counts[0], 2))})
        if outside is not None:
            assert outside.read_bytes() == bytes(outside.stat().st_size)

    return run


def linked_array(cache: Path, folder: Path) -> Path:
    outside = precious(folder)
    outside.write_bytes((cache / "hidden.bin").read_bytes())
    (cache / "hidden.bin").unlink()
    (cache / "hidden.bin").symlink_to(outside)
    return outside


def cache_manifest(name: str):
    def change(cache: Path, folder: Path) -> None:
        if name == "pipe":
            os.mkfifo(cache / name)
        path = cache / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"][name] = "0" * 64
        path.write_text(json.dumps(manifest))

    return change


def linked_weights(folder: Path) -> None:
    """As the hub's own cache is made: a link to a file is read."""
    model = model_folder(folder)
    (model / "model.safetensors").rename(folder / "blob")
    (model / "model.safetensors").symlink_to(folder / "blob")
    load_language_model(str(model))


def device_weights(folder: Path) -> None:
    model = model_folder(folder)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    load_language_model(str(model))


CACHES = [
    Attack("an array of a teacher cache is a link to a file of that size", teacher_cache(linked_array)),
    Attack("a teacher cache's manifest names a file by ..", teacher_cache(cache_manifest("../../rows.csv"))),
    Attack("a teacher cache's manifest names a device", teacher_cache(cache_manifest("/dev/zero"))),
    Attack("a teacher cache's manifest names a pipe", teacher_cache(cache_manifest("pipe"))),
    Attack("weights that are a link to a file", linked_weights),
    Attack("weights that are a link to a device", device_weights, "model.safetensors is a pipe or a device"),
]
ATTACKS = [*CHECKPOINTS, *RUN_FOLDERS, *CACHES]
