"""Checkpoints that are complete or absent: written to a temporary folder, flushed to the disk, then renamed.

`model_checkpoints/step-N/` is a standard `save_pretrained` folder plus `trainer_state/` with `state.json`, one `.pt`
for each entry of `tensors` and `manifest.json` (see utils/manifest.py). `last` and `best` are relative symbolic links,
or copies if the file system has no links. Names `.tmp-...` are work in progress; `newest` removes what a killed process
left of them, and restores a step that was being replaced. Only the main process of a run, which holds the lock of the
run folder, calls these methods.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError

from utils.errors import REMEDIES
from utils.files import sync, sync_tree, write_json
from utils.manifest import (
    FORMAT_VERSION,
    STATE,
    TRAINER_STATE,
    CheckpointError,
    read_json,
    step_folders,
    verify,
    write_manifest,
)

_OLD = re.compile(r"\.tmp-old-(.+)-[0-9a-f]{8}")


class Checkpoints:
    """The checkpoints of one run below `root` (`output_dir/model_checkpoints`)."""

    def __init__(self, root: Path, run_id: str | None, keep: int):
        """keep: how many steps of this run to keep, at least 1. run_id: None to read those of the latest run."""
        self.root, self.run_id, self.keep = Path(root), run_id, keep

    def save(
        self, step: int, write_model: Callable[[Path], object], state: dict, tensors: dict[str, object],
        best: bool = False,
    ) -> Path:
        """Write `step-{step}`, point `last` (and `best`) to it and delete old steps. Returns its folder.

        `write_model(folder)` writes the model's files. state: JSON values; step, run_id, format_version and saved_at
        are added. tensors: file name without `.pt` -> a value that `torch.load(weights_only=True)` reads back.
        Raises CheckpointError if it cannot be written; earlier checkpoints and links are then as before.
        """
        folder = self.root / f"step-{step}"
        added = {"step": step, "run_id": self.run_id, "format_version": FORMAT_VERSION,
                 "saved_at": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._writing(folder):
            new = self._temporary("new", folder.name)
            (new / TRAINER_STATE).mkdir(parents=True)
            write_model(new)
            for name, value in tensors.items():
                with (new / TRAINER_STATE / f"{name}.pt").open("wb") as file:
                    torch.save(value, file)
            write_json(new / STATE, {**state, **added})
            write_manifest(new)
            sync_tree(new)
            self._replace(new, folder)
            for link in ("last", "best") if best else ("last",):
                self._link(link, step)
            self._prune(step)
        return folder

    def newest(self) -> tuple[Path | None, list[str]]:
        """The undamaged step folder with the highest number, and a notice for each higher one that was passed over.

        Only folders of `run_id` count; if that is None, of the run that wrote last.
        """
        with contextlib.suppress(OSError):  # a folder without write permission can still be resumed from
            self._repair()
        run_id, notices = self.run_id or self._latest_run(), []
        for step, folder in step_folders(self.root):
            try:
                state = read_state(folder)
                if state["step"] != step:
                    raise CheckpointError(f"{folder / STATE}: is of step {state['step']}")
                if state["run_id"] != run_id:
                    raise CheckpointError(f"{folder}: is of run {state['run_id']}, not {run_id}")
                verify(folder)
                return folder, notices
            except CheckpointError as error:
                notices.append(f"passed over {folder.name}: {error}")
        return None, notices

    def repair_links(self, step: int, best_step: int | None) -> None:
        """Finish a `save` of `step` that a kill cut off after its folder was in place. Raises CheckpointError."""
        own = set(self._own_steps())
        with self._writing(self.root / "last"):
            for link, target in (("last", step), ("best", best_step)):
                if target in own and self._linked_step(link) != target:
                    self._link(link, target)
            self._prune(step)

    def _linked_step(self, link: str) -> int | None:
        with contextlib.suppress(CheckpointError):
            return read_state(self.root / link)["step"]
        return None

    def _latest_run(self) -> str | None:
        """The run of `last`; if that is damaged, of the highest step that can be read."""
        for folder in (self.root / "last", *(folder for _, folder in step_folders(self.root))):
            with contextlib.suppress(CheckpointError):
                return read_state(folder)["run_id"]
        return None

    @contextlib.contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """If it fails, remove the temporary folders; what the disk refuses becomes a CheckpointError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._repair()
            if (cause := disk_error(error)) is None:
                raise
            remedy = REMEDIES.get(getattr(cause, "errno", None), REMEDIES[errno.ENOSPC])
            raise CheckpointError(f"{folder}: not written ({getattr(cause, 'strerror', None) or cause}); the earlier "
                                  f"ones are unchanged; {remedy} (trainer_kwargs.output_dir)") from error

    def _temporary(self, purpose: str, name: str) -> Path:
        return self.root / f".tmp-{purpose}-{name}-{secrets.token_hex(4)}"

    def _replace(self, new: Path, folder: Path) -> None:
        """Rename `new` to `folder`. An earlier one is moved aside until then, where `_repair` finds it after a kill."""
        old = self._temporary("old", folder.name)
        if os.path.lexists(folder):
            folder.rename(old)
        new.rename(folder)
        sync(self.root)
        if os.path.lexists(old):
            self._remove(old)

    def _link(self, name: str, step: int) -> None:
        new, link = self._temporary("new", name), self.root / name
        try:
            new.symlink_to(f"step-{step}", target_is_directory=True)
        except (OSError, NotImplementedError):  # Windows has none without a privilege, some file systems neither
            shutil.copytree(self.root / f"step-{step}", new)
            sync_tree(new)
        if new.is_symlink() and (link.is_symlink() or not link.exists()):
            new.replace(link)
            sync(self.root)
        else:
            self._replace(new, link)

    def _remove(self, path: Path) -> None:
        """Delete a folder or link; renamed first, so that a half-deleted folder is never taken for a checkpoint."""
        gone = self._temporary("gone", "checkpoint")
        with contextlib.suppress(OSError):  # it stays, and costs space only
            path.rename(gone)
            gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)

    def _repair(self) -> None:
        """Restore what was moved aside and not replaced; delete all other temporaries."""
        for path in list(self.root.glob(".tmp-*")):
            old = _OLD.fullmatch(path.name)
            if old and not os.path.lexists(self.root / old[1]):
                path.rename(self.root / old[1])
            else:
                self._remove(path)
        sync(self.root)

    def _own_steps(self) -> Iterator[int]:
        """The steps of this run, newest first; folders of other runs and unreadable ones are skipped."""
        for step, folder in step_folders(self.root):
            with contextlib.suppress(CheckpointError):
                if read_state(folder)["run_id"] == self.run_id:
                    yield step

    def _prune(self, current: int) -> None:
        """Keep the newest steps up to `current`, and those that a link points to."""
        linked = {(self.root / link).resolve() for link in ("last", "best")}
        # Later steps are from before the run was set back to an earlier one; they do not count.
        for step in [step for step in self._own_steps() if step <= current][self.keep :]:
            folder = self.root / f"step-{step}"
            if folder.resolve() not in linked:
                self._remove(folder)


def disk_error(error: BaseException | None) -> BaseException | None:
    """The error by which the disk refused a write, if this is one or was raised because of one."""
    while error is not None:
        # safetensors and tokenizers, written in Rust, raise classes of their own.
        if isinstance(error, OSError) or "(os error " in str(error) or isinstance(error, SafetensorError):
            return error
        error = error.__context__  # torch.save raises a RuntimeError while it handles the error of its file
    return None


def read_state(folder: Path) -> dict:
    """`state.json` of a checkpoint folder. Raises CheckpointError."""
    state = read_json(folder / STATE)
    if type(state.get("step")) is not int or not isinstance(state.get("run_id"), str):
        raise CheckpointError(f"{folder / STATE}: has no step or no run_id")
    return state


def load_state(folder: Path) -> tuple[dict, dict]:
    """`(state, tensors)` of a checkpoint folder, or of `last` or `best`; tensors on the CPU. Raises CheckpointError."""
    folder = folder.resolve()  # once: all parts are of one step, even if a link moves meanwhile
    state, tensors = read_state(folder), {}
    for path in sorted((folder / TRAINER_STATE).glob("*.pt")):
        try:
            tensors[path.stem] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises almost anything for damaged bytes
            raise CheckpointError(f"{path}: not readable with weights_only ({type(error).__name__})") from error
    return state, tensors
