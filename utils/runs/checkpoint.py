"""Checkpoints that are whole or absent: written beside their place, synced, read back, then renamed.

`model_checkpoints/step-N/` is a standard `save_pretrained` folder plus `trainer_state/` with `state.json`, one `.pt`
for each entry of the tensors and `manifest.json` (size and SHA-256 of every other file). `last` and `best` are
relative symbolic links, or copies where the file system has no links. Names of the form `.tmp-...` are work in
progress: opening the folder clears what a dead writer left and brings back a step whose replacement was cut off.
Only the main process of a run calls this module.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.digest import file_digest
from data.os_errors import OF_DISK, refusal, remedy_of
from utils.files import delete, folder_lock, json_text, sync_folder, sync_tree, write_json
from utils.runs.seal import is_broken, sealed
from utils.text import shorten

FORMAT_VERSION = 1
_STATE = "trainer_state/state.json"
_MANIFEST = "trainer_state/manifest.json"
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"\.tmp-(new|old|gone)-(.+)-[0-9a-f]{8}")
_LOCK_SECONDS = 60.0
_MOST_FILES = 10_000  # of a checkpoint
_ROOM = "free space on that disk (or lift the file size limit) or choose another trainer_kwargs.output_dir"
OTHER = "resume from another checkpoint (trainer_kwargs.resume_from) or start anew"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message is one line with folder, reason and remedy."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Checkpoints:
    """The checkpoints of one run below `root` (`output_dir/model_checkpoints`)."""

    def __init__(self, root: Path, run_id: str | None, keep: int):
        """`keep`: how many of this run's steps stay, at least 1. `run_id` None: for reading those of any run."""
        if keep < 1:
            raise CheckpointError(f"trainer_kwargs.keep_checkpoints is {keep}: at least 1 must be kept")
        self.root, self.run_id, self.keep = Path(root), run_id, keep
        # A folder that may only be read can still be resumed from, so a repair that fails is no error here.
        with contextlib.suppress(OSError), folder_lock(self.root) as held:
            if held:
                self._repair()

    def save(
        self, step: int, write_model: Callable[[Path], object], state: dict, tensors: dict[str, object],
        best: bool = False,
    ) -> Path:
        """Write `step-{step}`, point `last` (and `best`) to it and retire old steps; returns its folder.

        `write_model(folder)` writes the model's files. `state`: JSON values; step, run_id, format_version and
        saved_at are added. `tensors`: file name without `.pt` -> what `torch.load(weights_only=True)` can read back.
        Raises CheckpointError if it cannot be written (earlier checkpoints and links are then as before); what
        `write_model` raises for other reasons than writing passes through.
        """
        added = {"step": step, "run_id": self.run_id, "format_version": FORMAT_VERSION}
        place = self.root / f"step-{step}"
        self._check_arguments(place, added, state, tensors)
        with self._writing(place):
            self._check_space(place)
            new = self._temporary("new", place.name)
            (new / "trainer_state").mkdir(parents=True)
            write_model(new)
            for name, value in tensors.items():
                _save_tensors(value, new / "trainer_state" / f"{name}.pt")
            added["saved_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(new / _STATE, sealed({**state, **added}))
            write_json(new / _MANIFEST, sealed({"format_version": FORMAT_VERSION, "files": _describe(new)}))
            sync_tree(new)
            try:
                verify(new)
                _load_tensors(new, mmap=True)
            except CheckpointError as error:
                raise CheckpointError(f"{place}: not written, it does not read back: {error}") from error
            self._put(new, place)
            for link in ("last", "best") if best else ("last",):
                self._point(link, step)
            self._retire(step)
        return place

    def newest(self) -> tuple[Path | None, list[str]]:
        """The step folder with the highest number that verifies, and a notice for each higher one passed over.

        Only folders of `run_id` count, or of any run if that is None.
        """
        notices = []
        for step in sorted(self._steps(), reverse=True):
            folder = self.root / f"step-{step}"
            try:
                self._check_belongs(folder, step)
                verify(folder)
                return folder, notices
            except CheckpointError as error:
                notices.append(f"passed over {folder.name}: {error}")
        return None, notices

    def settle(self, step: int, best_step: int | None) -> None:
        """What a kill in `save` left undone after `step-{step}` was in its place: `last` points to it, `best` to
        `step-{best_step}` if that is there, and old steps are retired. Raises CheckpointError."""
        own = set(self._own_steps())
        with self._writing(self.root / "last"):
            for link, aim in (("last", step), ("best", best_step)):
                if aim in own and self._linked_step(link) != aim:
                    self._point(link, aim)
            self._retire(step)

    def best_step(self) -> int | None:
        """The step that `best` points to; None if there is none or it is another run's."""
        return self._linked_step("best")

    def _linked_step(self, link: str) -> int | None:
        with contextlib.suppress(CheckpointError):
            state = read_state(self.root / link)
            if self.run_id in (None, state["run_id"]):
                return state["step"]
        return None

    def _check_arguments(self, place: Path, added: dict, state: dict, tensors: dict) -> None:
        if self.run_id is None:
            raise CheckpointError(f"{place}: opened without a run_id, for reading; give one to save")
        if not _STEP_NAME.fullmatch(place.name):
            raise CheckpointError(f"{place}: the step must be a whole number of optimizer steps from 0")
        for key in added.keys() & state.keys():
            if state[key] != added[key]:
                raise CheckpointError(f"{place}: the state has {key} {state[key]!r} of its own; rename that key")
        for name in tensors:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise CheckpointError(f"{place}: {name!r} cannot be a file name; use letters, digits, '_', '-' and '.'")
        try:
            json_text({**state, **added})
        except ValueError as error:
            raise CheckpointError(f"{place}: its state is {error}") from error

    def _check_belongs(self, folder: Path, step: int) -> None:
        state = read_state(folder)
        if state["step"] != step:
            raise CheckpointError(f"{folder / _STATE}: says step {state['step']}; give the folder its right name")
        if self.run_id not in (None, state["run_id"]):
            raise CheckpointError(f"{folder}: is of run {state['run_id']}, not {self.run_id}; {OTHER}")

    def _check_space(self, place: Path) -> None:
        previous = next(self._own_steps(), None)
        if previous is None:
            return
        files = (self.root / f"step-{previous}").rglob("*")
        needed = sum(path.stat().st_size for path in files if path.is_file())
        free = shutil.disk_usage(self.root).free
        if free < needed:
            room = f"{free / 1e6:,.1f} MB free, about {needed / 1e6:,.1f} MB needed"
            raise CheckpointError(f"{place}: not written, {room}; {_ROOM}, or lower trainer_kwargs.keep_checkpoints")

    @contextlib.contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        """Alone in the folder; what goes wrong is cleared away and, if it was the writing, told in one line."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with folder_lock(self.root, _LOCK_SECONDS) as held:
                if not held:
                    raise CheckpointError(f"{place}: another process writes there; give each run its own output_dir")
                try:
                    yield
                except BaseException:
                    with contextlib.suppress(OSError):
                        self._repair()
                    raise
        except CheckpointError:
            raise
        except Exception as error:
            refused = refusal(error) or (OSError(str(error)) if isinstance(error, SafetensorError) else None)
            if refused is None:
                raise
            reason = f"{refused.strerror or error}); the earlier ones are unchanged; {remedy_of(refused) or _ROOM}"
            raise CheckpointError(f"{place}: not written ({reason} (trainer_kwargs.output_dir)") from error

    def _temporary(self, kind: str, name: str) -> Path:
        return self.root / f".tmp-{kind}-{name}-{secrets.token_hex(4)}"

    def _put(self, new: Path, place: Path) -> None:
        """Rename `new` to `place`; what is there is kept aside until then, where `_repair` finds it after a crash."""
        old = self._temporary("old", place.name)
        if os.path.lexists(place):
            place.rename(old)
        new.rename(place)
        sync_folder(self.root)
        if os.path.lexists(old):
            self._discard(old, place.name)

    def _point(self, link: str, step: int) -> None:
        new, place = self._temporary("new", link), self.root / link
        try:
            new.symlink_to(f"step-{step}", target_is_directory=True)
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in OF_DISK:
                raise
            shutil.copytree(self.root / f"step-{step}", new)
            sync_tree(new)
        if new.is_symlink() and (place.is_symlink() or not place.exists()):
            new.replace(place)
            sync_folder(self.root)
        else:
            self._put(new, place)

    def _discard(self, path: Path, name: str) -> None:
        """Delete; renamed first, so that a half-deleted folder is never taken for a checkpoint."""
        gone = self._temporary("gone", name)
        with contextlib.suppress(OSError):
            path.rename(gone)
            delete(gone)

    def _repair(self) -> None:
        """Bring back what was moved aside and not replaced, delete all other temporaries. Needs the folder's lock."""
        for path in list(self.root.iterdir()):
            kind, name = match.groups() if (match := _TEMPORARY.fullmatch(path.name)) else ("", "")
            if kind == "old" and not os.path.lexists(self.root / name):
                path.rename(self.root / name)
            elif kind:
                self._discard(path, name)
        sync_folder(self.root)

    def _steps(self) -> list[int]:
        if not self.root.is_dir():
            return []
        matches = [_STEP_NAME.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir()]
        return [int(match[1]) for match in matches if match]

    def _own_steps(self) -> Iterator[int]:
        """This run's steps, newest first; folders of other runs and unreadable ones are left out."""
        for step in sorted(self._steps(), reverse=True):
            with contextlib.suppress(CheckpointError):
                if read_state(self.root / f"step-{step}")["run_id"] == self.run_id:
                    yield step

    def _retire(self, current: int) -> None:
        """Keep the newest steps up to `current` and those that a link names."""
        linked = {os.path.realpath(self.root / link) for link in ("last", "best")}
        # A later step is left from before the run was set back; it pushes out nothing.
        for step in [step for step in self._own_steps() if step <= current][self.keep :]:
            if os.path.realpath(folder := self.root / f"step-{step}") not in linked:
                self._discard(folder, folder.name)


def verify(folder: Path, model_only: bool = False) -> None:
    """Compare every file with the manifest, sizes first; CheckpointError names the first one that is not as written.
    model_only: but for the files in trainer_state/, which a model does without."""
    with _opened(folder) as folder:
        for name, entry in _check_sizes(folder, model_only).items():
            if file_digest(folder / name) != entry["sha256"]:
                raise CheckpointError(f"{folder / name}: changed since it was written (other SHA-256); {OTHER}")


def load_state(folder: Path) -> tuple[dict, dict]:
    """`(state, tensors)` of a checkpoint folder or of `last`/`best`, all from one step, tensors on the CPU.

    Sizes are checked, hashes are not: `verify` does that. Raises CheckpointError.
    """
    with _opened(folder) as folder:
        _check_sizes(folder)
        return read_state(folder), _load_tensors(folder)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """The real folder: links are followed once, so that all parts are of one step even if `last` moves meanwhile."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; {OTHER}")
    try:
        yield Path(folder).resolve()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); {OTHER}") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so this is no complete checkpoint of a run; {OTHER}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read as JSON ({reason}); {OTHER}") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        found = shorten(repr(version))
        raise CheckpointError(f"{path}: format_version is {found}, this program reads {FORMAT_VERSION}; {OTHER}")
    if is_broken(value):
        raise CheckpointError(f"{path}: changed since it was written (other SHA-256); {OTHER}")
    return {key: each for key, each in value.items() if key != "sha256"}


def read_state(folder: Path) -> dict:
    state = _read_json(folder / _STATE)
    if type(state.get("step")) is not int or not isinstance(state.get("run_id"), str):
        raise CheckpointError(f"{folder / _STATE}: has no step or no run_id; {OTHER}")
    return state


def _describe(folder: Path) -> dict[str, dict]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in names}


def _check_sizes(folder: Path, model_only: bool = False) -> dict[str, dict]:
    """The manifest's entries, each file of them there and as long as it was."""
    manifest = _read_json(folder / _MANIFEST)
    files = manifest.get("files") if manifest.keys() == {"format_version", "files"} else None
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and type(entry.get("bytes")) is int and "sha256" in entry for entry in entries):
        raise CheckpointError(f"{folder / _MANIFEST}: has no list of files; {OTHER}")
    if len(files) > _MOST_FILES:
        raise CheckpointError(f"{folder / _MANIFEST}: lists {len(files):,} files, more than {_MOST_FILES:,}; {OTHER}")
    for name in files:
        # A folder of ours holds no links, and its files lie in it.
        if (folder / name).is_file() and ((folder / name).resolve() != folder / name or Path(name).is_absolute()):
            raise CheckpointError(f"{folder / _MANIFEST}: {shorten(name)} leads out of the folder; {OTHER}")
    if model_only:
        files = {name: entry for name, entry in files.items() if not name.startswith("trainer_state/")}
    for name, entry in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; {OTHER}")
        size, expected = (folder / name).stat().st_size, entry["bytes"]
        if size != expected:
            what = "cut short" if size < expected else "changed"
            raise CheckpointError(f"{folder / name}: {what}, {size} bytes instead of {expected}; {OTHER}")
    return files


def _save_tensors(value: object, path: Path) -> None:
    """`torch.save` whose failure to write is an OSError: its zip writer raises a RuntimeError instead."""
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from error


def _load_tensors(folder: Path, mmap: bool = False) -> dict[str, object]:
    tensors = {}
    for name in _read_json(folder / _MANIFEST)["files"]:
        path = folder / name
        if path.parent != folder / "trainer_state" or path.suffix != ".pt":
            continue
        try:
            tensors[path.stem] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # torch.load raises almost anything for damaged bytes
            raise CheckpointError(f"{path}: not readable with weights_only: it holds more than tensors and plain "
                                  f"values, or is damaged; {OTHER}") from error
    return tensors
