"""The run folder `output_dir/`: resume what is in it, or set it aside and start anew."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from uuid import uuid4

from data.os_errors import describe
from data.tokenized import TokenizedDataset
from model.language_model import LanguageModel, ModelError
from model.loading import load_language_model
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError, config_json
from utils.evaluation.validation import Validation
from utils.files import write_text
from utils.runs.checkpoint import OTHER, CheckpointError, Checkpoints, load_state, read_state, verify
from utils.runs.earlier_runs import archive_previous_run
from utils.runs.own_checkpoints import check_model_folder, others
from utils.runs.result_folder import check_links, output_folder
from utils.runs.run_lock import hold
from utils.text import shorten
from utils.training.batch_numbers import ACCUMULATION, BATCH, BOUND, TOKENS

RUN_FILES = (  # the checkpoints first: once they are moved, no start goes on from them
    "model_checkpoints", "config.json", "metrics.jsonl", "tensorboard", "predictions", "scores.json",
    "skipped_rows.json",
)
# What a checkpoint of train_kd.py meant that was written before these keys were kept.
OLDER_KEYS = {"distillation_kwargs.method": "divergence", "distillation_kwargs.on_policy_fraction": 0.0}
STEP = re.compile(r"step-[0-9]+")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic", "rouge-score")


@dataclass
class ResumePoint:
    """How a run begins: anew (folder None), or from the checkpoint in `folder`."""

    run_id: str
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def find_checkpoint(config: FineTuneConfig) -> ResumePoint:
    """What to start from. Changes nothing but what an interrupted write left behind.

    Raises:
        CheckpointError: `resume_from` is no whole checkpoint.
    """
    options = config.trainer_kwargs
    notices = check_is_run_folder(Path(options.output_dir))
    root = Path(options.output_dir) / "model_checkpoints"
    folder = None
    if options.resume_from is not None:
        folder = Path(options.resume_from)
        try:
            verify(folder)
        except CheckpointError as error:
            raise CheckpointError(f"trainer_kwargs.resume_from: {error}{others(folder)}") from error
    elif options.load_from_checkpoint:
        Checkpoints(root, None, options.keep_checkpoints)  # brings back what an interrupted write moved aside
        folder, passed_over = Checkpoints(root, newest_run(root), options.keep_checkpoints).newest()
        notices += passed_over
        if folder is None and passed_over:
            raise CheckpointError(
                f"{root}: none of its checkpoints is whole ({'; '.join(passed_over)}); to start anew set "
                "trainer_kwargs.load_from_checkpoint to false (the earlier run is kept)"
            )
    if folder is None:
        return ResumePoint(uuid4().hex, notices=notices)
    state, tensors = load_state(folder)
    notices.append(f"resuming from {folder} (optimizer step {state['step']})")
    return ResumePoint(state["run_id"], folder, state, tensors, notices)


@contextmanager
def claimed(output_dir: Path, is_main: bool) -> Iterator[list[str]]:
    """Makes the run folder and holds it, so that no second run writes into it; yields notices.

    Raises:
        ConfigError: it cannot be made, another run is in it, or a training keeps its checkpoints there.
    """
    if not is_main:
        yield []
        return
    key = "trainer_kwargs.output_dir"
    with output_folder(output_dir, key):
        predictions = [f"predictions/{path.name}" for path in (output_dir / "predictions").glob("*")]
        check_links(output_dir, (*RUN_FILES, *predictions), key)
        with hold(output_dir, key) as notices:
            yield notices


def check_is_run_folder(output_dir: Path) -> list[str]:
    """Notices. Raises ConfigError for a folder with a config.json of something else, such as a model's."""
    path = output_dir / "config.json"
    try:
        if not path.exists() or "_description_environment" in json.loads(path.read_text(encoding="utf-8")):
            return []
    except OSError as error:
        raise ConfigError(f"trainer_kwargs.output_dir: {describe(error, path)}") from error
    except (ValueError, TypeError):
        pass
    if any(STEP.fullmatch(each.name) for each in (output_dir / "model_checkpoints").glob("step-*")):
        return [f"{path} is damaged: it is not needed, and written anew"]
    raise ConfigError(f"trainer_kwargs.output_dir: {path} is not of a run, and would be moved: choose another folder")


def how_to_go_on(config: FineTuneConfig) -> str:
    """What to do after a signal has stopped a run."""
    options = config.trainer_kwargs
    if options.load_from_checkpoint and options.resume_from is None:
        return "the same command goes on from there"
    return "to go on from there, set trainer_kwargs.load_from_checkpoint to true and resume_from to null"


def restore_links(checkpoints: Checkpoints, start: ResumePoint, best_step: int | None) -> None:
    """Mends what a kill left undone after the newest checkpoint, from which the run goes on, was in its place."""
    if is_own(start, checkpoints.root) and not later_checkpoints(checkpoints.root, start.state["step"]):
        with suppress(CheckpointError):
            checkpoints.settle(start.state["step"], best_step)


def is_own(start: ResumePoint, root: Path) -> bool:
    """Whether a run goes on from a checkpoint in its own folder."""
    return start.folder is not None and start.folder.resolve().parent == root.resolve()


def newest_run(root: Path) -> str | None:
    """The run of the checkpoint `last`, so that steps of another run lying beside it are not taken for its own; where
    that one is damaged, of the one written last."""
    states = []
    for folder in (root / "last", *root.glob("step-*")):
        with suppress(CheckpointError):
            states.append(read_state(folder))
        if folder.name == "last" and states:
            break
    return max(states, key=lambda state: str(state.get("saved_at")))["run_id"] if states else None


def identity(config: FineTuneConfig, table: TokenizedDataset, of_objective: dict | None = None) -> dict:
    """What must be the same for a checkpoint to be continued: the model, what decides which rows come next, and what
    the objective adds."""
    data, options, arch = config.dataset_kwargs, config.trainer_kwargs, config.model_arch
    return {
        model_key(config): arch.lang_model,
        "model_arch.from_scratch": arch.from_scratch,
        "model_arch.architecture": arch.architecture,
        "optimizer_kwargs.type": config.optimizer_kwargs.type,
        "optimizer_kwargs.decay_all": config.optimizer_kwargs.decay_all,
        "the training rows (train_dataset, prompt_template, max_length, columns, on_bad_row, tokenizer)":
            table.name,
        BATCH: data.train_batch_size,
        TOKENS: data.tokens_per_batch,
        ACCUMULATION: options.accumulation_steps,
        BOUND: options.batches_per_epoch,
        "trainer_kwargs.seed": options.seed,
        **(of_objective or {}),
    }


def model_key(config: FineTuneConfig) -> str:
    """Where a config names the model that is trained."""
    is_student = "student_lang_model" in type(config.model_arch).model_fields
    return f"model_arch.{'student_' if is_student else ''}lang_model"


def meanings(config: FineTuneConfig, validation: Validation) -> dict[str, str | None]:
    """What the scores that a checkpoint remembers are of; None where they are not measured."""
    options = config.trainer_kwargs
    judged_by = validation.meaning(config.monitored_metric)
    scaled_by = validation.meaning(options.scaling_metric) if options.adaptive_loss_scaling else None
    return {"judged_by": judged_by and f"{config.callbacks_kwargs.kwargs.mode} {judged_by}", "scaled_by": scaled_by}


def load_model(config: FineTuneConfig, start: ResumePoint) -> LanguageModel:
    """The checkpoint's model where one is resumed, else what model_arch asks for."""
    arch = config.model_arch
    if start.folder is not None:
        return load_language_model(str(start.folder), dropout=arch.dropout)
    check_model_folder(arch.lang_model, model_key(config))
    check_model_folder(arch.tokenizer, "model_arch.tokenizer")
    try:
        return load_language_model(
            arch.lang_model, tokenizer=arch.tokenizer, from_scratch=arch.from_scratch, architecture=arch.architecture,
            dropout=arch.dropout,
        )
    except ModelError as error:
        keys = [model_key(config), *(["model_arch.tokenizer"] if arch.tokenizer else [])]
        raise ModelError(f"{' and '.join(keys)}: {error}") from error


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """What is made of a checkpoint's state inside may find it to be something else: CheckpointError."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its state is not one of this kind of run ({shorten(repr(error), 200)}); "
                              f"{OTHER}") from error


def check_resume_compatible(now: dict, state: dict) -> None:
    """Raises ConfigError where what decides the next rows is not what it was when the checkpoint was written."""
    before = state.get("identity", {})
    if not isinstance(before, dict):
        raise ConfigError("cannot resume: the checkpoint's state.json is not one of a run: resume from another one")
    if "distillation_kwargs.kl_div" in before:
        before = {**OLDER_KEYS, **before}
    if has_same_steps(before, now):
        before = {**before, **{key: now[key] for key in (BATCH, ACCUMULATION, TOKENS)}}
    # Keys of another script or method are there on one side alone: told only where nothing else says why.
    common = [key for key in now if key in before and before[key] != now[key]]
    keys = common or [*now, *(key for key in before if key not in now)]
    changed = [f"{shorten(key)} was {shorten(repr(before.get(key)))} and is {now.get(key)!r}" for key in keys
               if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"cannot resume: {'; '.join(changed)}; put it back, or set trainer_kwargs.load_from_checkpoint to false "
            "to start anew (the earlier run is kept), or choose another output_dir"
        )


def has_same_steps(before: dict, now: dict) -> bool:
    """Whether the rows of all steps are the same, in micro-batches that may differ: the rows of a step depend on the
    product, unless epochs are bounded by micro-batches."""
    bounded = any(each.get(BOUND) is not None for each in (before, now))
    products = [(each.get(BATCH) or 0) * (each.get(ACCUMULATION) or 0) for each in (before, now)]
    return not bounded and products[0] == products[1] > 0


def open_run_folder(config: FineTuneConfig, start: ResumePoint) -> Iterator[str]:
    """Make the folder ready and write the resolved config into it; what is there of other runs is set aside. Yields
    notices of what has been done."""
    output_dir = Path(config.trainer_kwargs.output_dir)
    root = output_dir / "model_checkpoints"
    own = is_own(start, root)
    if earlier := archive_previous_run(output_dir, () if own else RUN_FILES):
        yield f"an earlier run was in {output_dir}: moved to {earlier}"
    if own and (later := archive_previous_run(root, later_checkpoints(root, start.state["step"]))):
        yield f"checkpoints after step {start.state['step']}: moved to {later}"
    if not own and (best := start.state.get("best_step")) is not None:
        yield (f"the best checkpoint so far, step {best}, stays in {start.folder.resolve().parent}; {root / 'best'} "
               "will be the next that is better")
    write_text(output_dir / "config.json", with_environment(config))


def later_checkpoints(root: Path, step: int) -> list[str]:
    """Names of the step folders after `step`, and of the links to them."""
    steps = [path for path in root.glob("step-*") if path.name[5:].isdecimal() and int(path.name[5:]) > step]
    links = [path for path in (root / "last", root / "best") if path.is_symlink() and path.resolve() in
             {folder.resolve() for folder in steps}]
    return [path.name for path in (*steps, *links)]


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
