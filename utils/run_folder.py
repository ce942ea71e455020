"""The run folder `output_dir/`: resume what is in it, or set it aside and start anew."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from uuid import uuid4

from data.token_cache import TokenTable
from model.language_model import LanguageModel
from model.loading import load_language_model
from utils.checkpoint import CheckpointError, Checkpoints, load_state, read_state, set_aside, verify
from utils.config import FineTuneConfig
from utils.config_files import ConfigError, config_json
from utils.files import folder_lock, write_text

RUN_FILES = (
    "config.json", "metrics.jsonl", "tensorboard", "model_checkpoints", "predictions", "scores.json",
    "skipped_rows.json",
)
# What a checkpoint of train_kd.py meant that was written before these keys were kept.
OLDER_KEYS = {"distillation_kwargs.method": "divergence", "distillation_kwargs.on_policy_fraction": 0.0}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic", "rouge-score")


@dataclass
class Start:
    """How a run begins: anew (folder None), or from the checkpoint in `folder`."""

    run_id: str
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def find_start(config: FineTuneConfig) -> Start:
    """What to start from. Changes nothing but what an interrupted write left behind.

    Raises:
        CheckpointError: `resume_from` is no whole checkpoint.
    """
    options = config.trainer_kwargs
    check_is_run_folder(Path(options.output_dir))
    root = Path(options.output_dir) / "model_checkpoints"
    notices: list[str] = []
    folder = None
    if options.resume_from is not None:
        folder = Path(options.resume_from)
        verify(folder)
    elif options.load_from_checkpoint:
        repaired = Checkpoints(root, None, options.keep_checkpoints)
        run_id = run_of(root / "last")
        folder, notices = (Checkpoints(root, run_id, options.keep_checkpoints) if run_id else repaired).newest()
    if folder is None:
        return Start(uuid4().hex, notices=notices)
    state, tensors = load_state(folder)
    notices.append(f"resuming from {folder} (optimizer step {state['step']})")
    return Start(state["run_id"], folder, state, tensors, notices)


@contextmanager
def claimed(output_dir: Path, is_main: bool) -> Iterator[None]:
    """Makes the run folder and holds it, so that no second run writes into it.

    Raises:
        ConfigError: it cannot be made, or another run is in it.
    """
    if not is_main:
        yield
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"trainer_kwargs.output_dir: {output_dir} cannot be made: {error.strerror}") from error
    with folder_lock(output_dir) as held:
        if not held:
            raise ConfigError(f"trainer_kwargs.output_dir: another run is writing to {output_dir}: choose another one")
        yield


def check_is_run_folder(output_dir: Path) -> None:
    """Raises ConfigError for a folder with a config.json of something else, such as a model's."""
    path = output_dir / "config.json"
    try:
        if not path.exists() or "_description_environment" in json.loads(path.read_text(encoding="utf-8")):
            return
    except (OSError, ValueError):
        pass
    raise ConfigError(f"trainer_kwargs.output_dir: {path} is not of a run, and would be moved: choose another folder")


def how_to_go_on(config: FineTuneConfig) -> str:
    """What to do after a signal has stopped a run."""
    options = config.trainer_kwargs
    if options.load_from_checkpoint and options.resume_from is None:
        return "the same command goes on from there"
    return "to go on from there, set trainer_kwargs.load_from_checkpoint to true and resume_from to null"


def restore_best(checkpoints: Checkpoints, best_step: int | None) -> None:
    """Points `best` to the step that the state names, where a kill or a step back has left it behind."""
    if best_step is not None and checkpoints.best_step() != best_step:
        with suppress(CheckpointError):
            checkpoints.mark_best(best_step)


def run_of(folder: Path) -> str | None:
    """The run of a checkpoint, so that steps of another run lying beside it are not taken for its own."""
    try:
        return read_state(folder)["run_id"]
    except CheckpointError:
        return None


def identity(config: FineTuneConfig, table: TokenTable, of_objective: dict | None = None) -> dict:
    """What must be the same for a checkpoint to be continued: the model, what decides which rows come next, and what
    the objective adds."""
    data, options, arch = config.dataset_kwargs, config.trainer_kwargs, config.model_arch
    name = "student_lang_model" if "student_lang_model" in type(arch).model_fields else "lang_model"
    return {
        f"model_arch.{name}": arch.lang_model,
        "model_arch.from_scratch": arch.from_scratch,
        "model_arch.architecture": arch.architecture,
        "optimizer_kwargs.type": config.optimizer_kwargs.type,
        "optimizer_kwargs.decay_all": config.optimizer_kwargs.decay_all,
        "the training rows (train_dataset, prompt_template, max_length, columns, on_bad_row, tokenizer)":
            table.folder.name,
        "dataset_kwargs.train_batch_size": data.train_batch_size,
        "dataset_kwargs.tokens_per_batch": data.tokens_per_batch,
        "trainer_kwargs.gradient_accumulation_steps": options.accumulation_steps,
        "trainer_kwargs.ckpt_training_batch": options.batches_per_epoch,
        "trainer_kwargs.seed": options.seed,
        **(of_objective or {}),
    }


def judged_by(config: FineTuneConfig) -> str:
    """What the scores that a checkpoint remembers mean."""
    mode, data = config.callbacks_kwargs.kwargs.mode, config.dataset_kwargs
    return f"{mode} {config.monitored_metric} on {data.validation_dataset}, {data.validation_subset}"


def load_model(config: FineTuneConfig, start: Start) -> LanguageModel:
    """The checkpoint's model where one is resumed, else what model_arch asks for."""
    arch = config.model_arch
    if start.folder is not None:
        return load_language_model(str(start.folder), dropout=arch.dropout)
    return load_language_model(
        arch.lang_model, tokenizer=arch.tokenizer, from_scratch=arch.from_scratch, architecture=arch.architecture,
        dropout=arch.dropout,
    )


def check_resumable(now: dict, state: dict) -> None:
    """Raises ConfigError where what decides the next rows is not what it was when the checkpoint was written."""
    before = state.get("identity", {})
    if "distillation_kwargs.kl_div" in before:
        before = {**OLDER_KEYS, **before}
    # Keys of another script or method are there on one side alone: told only where nothing else says why.
    common = [key for key in now if key in before and before[key] != now[key]]
    keys = common or [*now, *(key for key in before if key not in now)]
    changed = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys
               if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"cannot resume: {'; '.join(changed)}; put it back, or set trainer_kwargs.load_from_checkpoint to false "
            "to start anew (the earlier run is kept), or choose another output_dir"
        )


def open_run_folder(config: FineTuneConfig, start: Start) -> list[str]:
    """Make the folder ready and write the resolved config into it; what is there of other runs is set aside."""
    output_dir = Path(config.trainer_kwargs.output_dir)
    root = output_dir / "model_checkpoints"
    notices = []
    if start.folder is None or start.folder.resolve().parent != root.resolve():
        if earlier := set_aside(output_dir, RUN_FILES):
            notices.append(f"an earlier run was in {output_dir}: moved to {earlier}")
    elif later := later_checkpoints(root, start.state["step"]):
        notices.append(f"checkpoints after step {start.state['step']}: moved to {set_aside(root, later)}")
    write_text(output_dir / "config.json", with_environment(config))
    return notices


def later_checkpoints(root: Path, step: int) -> list[str]:
    """Names of the step folders after `step`, and of the links to them."""
    steps = [path for path in root.glob("step-*") if path.name[5:].isdigit() and int(path.name[5:]) > step]
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
