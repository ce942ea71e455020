"""The run folder `output_dir/`: resume what is in it, or archive it and start a new run."""

import json
import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from uuid import uuid4

from data.tokenized import TokenizedDataset
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import config_json
from utils.errors import UserError, describe
from utils.files import sync, write_text
from utils.manifest import CheckpointError, step_folders, verify
from utils.runs.checkpoint import Checkpoints, load_state
from utils.runs.folder_lock import CHECKPOINTS, is_run_config
from utils.runs.run_log import RunLog
from utils.text import shorten
from utils.training.load_model import arch_key
from utils.training.out_of_memory import ACCUMULATION, BATCH, BOUND, TOKENS

KEY = "trainer_kwargs.output_dir"
RUN_FILES = (  # the checkpoints first: once they are moved, no start resumes from them
    CHECKPOINTS, "config.json", "metrics.jsonl", "tensorboard", "predictions", "scores.json", "skipped_rows.json",
)
# What a checkpoint of train_kd.py meant that was written before these keys were kept.
OLDER_KEYS = {"distillation_kwargs.method": "divergence", "distillation_kwargs.on_policy_fraction": 0.0}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic", "rouge-score")
NEW_RUN = "set trainer_kwargs.load_from_checkpoint to false to start a new run (the earlier one is kept)"


@dataclass
class ResumePoint:
    """Where a run starts: from scratch (folder None), or from the checkpoint in `folder`."""

    run_id: str
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)

    def is_in(self, root: Path) -> bool:
        """Whether the checkpoint is one of those in `root`."""
        return self.folder is not None and self.folder.resolve().parent == root.resolve()


def find_checkpoint(config: FineTuneConfig, log: RunLog) -> ResumePoint:
    """The checkpoint to resume from, read; a run in the folder is not changed.

    Raises:
        UserError: the folder is not of a run.
        CheckpointError: `resume_from` is damaged, or all checkpoints in the folder are.
    """
    options = config.trainer_kwargs
    output_dir = Path(options.output_dir)
    root, config_path, folder = output_dir / CHECKPOINTS, output_dir / "config.json", None
    if config_path.exists() and not is_run_config(config_path) and not step_folders(root):  # of a model, for example
        raise UserError(f"{KEY}: {config_path} was not written by a run, and a run here would move it: choose another "
                        "folder")
    if options.resume_from is not None:
        folder = Path(options.resume_from)
        try:
            verify(folder)
        except CheckpointError as error:
            raise CheckpointError(f"trainer_kwargs.resume_from: {error}; resume from another checkpoint") from error
    elif options.load_from_checkpoint:
        folder, passed_over = Checkpoints(root, None, options.keep_checkpoints).newest()
        for line in passed_over:
            log.info(line)
        if folder is None and passed_over:
            raise CheckpointError(f"{root}: all checkpoints are damaged ({'; '.join(passed_over)}); {NEW_RUN}")
    if folder is None:
        return ResumePoint(uuid4().hex)
    state, tensors = load_state(folder)
    log.info(f"resuming from {folder} (optimizer step {state['step']})")
    return ResumePoint(state["run_id"], folder, state, tensors)


def resume_hint(config: FineTuneConfig) -> str:
    """How to continue a run that a signal has stopped."""
    options = config.trainer_kwargs
    if options.load_from_checkpoint and options.resume_from is None:
        return "run the same command to resume"
    return "to resume, set trainer_kwargs.load_from_checkpoint to true and resume_from to null"


# -- may this config continue that checkpoint? -------------------------------------------------------------------


def resume_fingerprint(config: FineTuneConfig, table: TokenizedDataset, of_objective: dict) -> dict:
    """What must not change for a run to be resumed: the model, what decides which rows come next, and what the
    objective adds."""
    data, options, arch = config.dataset_kwargs, config.trainer_kwargs, config.model_arch
    return {
        arch_key(config, "lang_model"): arch.lang_model,
        "model_arch.from_scratch": arch.from_scratch,
        "model_arch.architecture": arch.architecture,
        "optimizer_kwargs.type": config.optimizer_kwargs.type,
        "optimizer_kwargs.decay_all": config.optimizer_kwargs.decay_all,
        "the training rows (train_dataset, prompt_template, max_length, columns, on_bad_row, tokenizer)":
            table.name,
        BATCH: data.train_batch_size,
        TOKENS: data.tokens_per_batch,
        ACCUMULATION: options.gradient_accumulation_steps,
        BOUND: options.ckpt_training_batch,
        "trainer_kwargs.seed": options.seed,
        **of_objective,
    }


def check_resume_compatible(now: dict, state: dict) -> None:
    """Raises UserError if a `resume_fingerprint` is not the one in a checkpoint's state."""
    before = state.get("identity", {})
    if "distillation_kwargs.kl_div" in before:
        before = {**OLDER_KEYS, **before}
    if has_same_steps(before, now):
        before = {**before, **{key: now[key] for key in (BATCH, ACCUMULATION, TOKENS)}}
    # Keys of another script or method are on one side only: named only if nothing else differs.
    common = [key for key in now if key in before and before[key] != now[key]]
    keys = common or [*now, *(key for key in before if key not in now)]
    changed = [f"{shorten(key)} was {shorten(repr(before.get(key)))} and is {now.get(key)!r}" for key in keys
               if before.get(key) != now.get(key)]
    if changed:
        raise UserError(f"cannot resume: {'; '.join(changed)}; put it back, or {NEW_RUN}, or choose another "
                        "output_dir")


def has_same_steps(before: dict, now: dict) -> bool:
    """Whether all optimizer steps have the same rows, if perhaps in other micro-batches: they depend on the product
    of batch size and accumulation, unless epochs are bounded by micro-batches."""
    bounded = any(fingerprint.get(BOUND) is not None for fingerprint in (before, now))
    products = [(fingerprint.get(BATCH) or 0) * (fingerprint.get(ACCUMULATION) or 0) for fingerprint in (before, now)]
    return not bounded and products[0] == products[1] > 0


# -- the folder of a run that starts -----------------------------------------------------------------------------


def prepare_run_folder(config: FineTuneConfig, start: ResumePoint, log: RunLog) -> None:
    """Archive what is there of other runs and write the resolved config."""
    output_dir = Path(config.trainer_kwargs.output_dir)
    root = output_dir / CHECKPOINTS
    is_own = start.is_in(root)
    if not is_own and (archive := archive_previous_run(output_dir, RUN_FILES)):
        log.info(f"an earlier run was in {output_dir}: moved to {archive}")
    if is_own and (archive := archive_previous_run(root, later_checkpoints(root, start.state["step"]))):
        log.info(f"checkpoints after step {start.state['step']}: moved to {archive}")
    if not is_own and (best := start.state.get("best_step")) is not None:
        log.info(f"the best checkpoint so far, step {best}, stays in {start.folder.resolve().parent}; "
                 f"{root / 'best'} will point to the next better one")
    write_text(output_dir / "config.json", with_environment(config))


def archive_previous_run(folder: Path, names: Iterable[str]) -> Path | None:
    """Move those of `names` that are in `folder` to a new `earlier-run-N` in it, in their order; returns that or None.

    Raises:
        UserError: they cannot be moved.
    """
    present = [name for name in names if os.path.lexists(folder / name)]
    if not present:
        return None
    numbers = [int(path.name[12:]) for path in folder.glob("earlier-run-*") if path.name[12:].isdecimal()]
    archive = folder / f"earlier-run-{max(numbers, default=0) + 1}"
    try:
        archive.mkdir()
        for name in present:
            (folder / name).rename(archive / name)
        sync(archive)
        sync(folder)
    except OSError as error:
        raise UserError(f"{KEY}: the earlier run cannot be moved to {describe(error, archive)}") from error
    return archive


def later_checkpoints(root: Path, step: int) -> list[str]:
    """Names of the step folders after `step`, and of the links to them."""
    later = [folder for number, folder in step_folders(root) if number > step]
    links = [link for link in (root / "last", root / "best") if link.is_symlink() and
             link.resolve() in {folder.resolve() for folder in later}]
    return [path.name for path in (*later, *links)]


def repair_links(checkpoints: Checkpoints, start: ResumePoint, best_step: int | None) -> None:
    """Finish what a kill has cut off after the newest checkpoint, from which the run resumes, was written."""
    if start.is_in(checkpoints.root) and not later_checkpoints(checkpoints.root, start.state["step"]):
        with suppress(CheckpointError):
            checkpoints.repair_links(start.state["step"], best_step)


def with_environment(config: FineTuneConfig) -> str:
    """The config as JSON, with versions and commit in a `_description` key, so that it can be used as a config."""
    found = {"python": python_version(), **{name: version(name) for name in PACKAGES}, "commit": commit()}
    text = {"_description_environment": found, **json.loads(config_json(config))}
    return json.dumps(text, indent=2, ensure_ascii=False) + "\n"


def commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
