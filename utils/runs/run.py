"""A run of a training script: its folder, its components, the loop."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from torch import nn

from data.prompts import PromptFormat
from data.tokenized import TokenizedDataset
from utils.cli import quiet_libraries
from utils.config.checks import warnings_of
from utils.config.fine_tune import FineTuneConfig
from utils.evaluation.splits import TokenizedSplits
from utils.evaluation.validation import Validation, score_identities
from utils.manifest import CheckpointError
from utils.runs.checkpoint import Checkpoints
from utils.runs.folder_lock import lock_folder
from utils.runs.run_folder import (
    KEY,
    NEW_RUN,
    ResumePoint,
    check_resume_compatible,
    find_checkpoint,
    prepare_run_folder,
    repair_links,
    resume_fingerprint,
    resume_hint,
)
from utils.runs.run_log import RunLog
from utils.text import shorten
from utils.training.distributed import DistributedContext, init_distributed, launch_group
from utils.training.load_model import arch_key
from utils.training.optimization import build_optimizer
from utils.training.out_of_memory import out_of_memory_remedy, training_remedy
from utils.training.random_state import seed_everything
from utils.training.signals import StopRequest
from utils.training.trainer import Trainer


class RunComponents(NamedTuple):
    """What a script builds for a run. objective_id: settings of the objective that a resumed run must share."""

    objective: nn.Module
    prompt_format: PromptFormat
    tables: TokenizedSplits
    train_table: TokenizedDataset
    objective_id: dict


# build(context, config, log, start, keep=True); keep=False: write nothing but tokenised rows.
Build = Callable[..., RunComponents]


def run_training(config: FineTuneConfig, build: Build) -> int:
    """Lock the run folder, resume or start, build the components and train them. Returns the exit code."""
    quiet_libraries()
    options = config.trainer_kwargs
    launch_group(options.device, options.multi_gpu, options.multi_gpu_ids)
    context = init_distributed(
        options.device, config.model_arch.gpu_device_id, options.precision, arch_key(config, "gpu_device_id"),
        options.multi_gpu, options.multi_gpu_ids,
    )
    output_dir = Path(options.output_dir)
    lock = lock_folder(output_dir, KEY) if context.is_main else nullcontext()
    with out_of_memory_remedy(training_remedy(config)), lock:
        log = RunLog(output_dir, context.is_main)
        for line in (*warnings_of(config), *context.notices, context.describe()):
            log.info(line)
        start = context.broadcast_object(find_checkpoint(config, log) if context.is_main else None)
        seed_everything(options.seed)
        components = build(context, config, log, start)
        with StopRequest(resume_hint(config)) as stop:  # from here on a signal stops with a checkpoint
            return train(components, config, context, stop, log, start)


def train(
    components: RunComponents, config: FineTuneConfig, context: DistributedContext, stop: StopRequest, log: RunLog,
    start: ResumePoint,
) -> int:
    """Optimizer, validation, checkpoints and loop around an objective. Returns the exit code."""
    objective, prompt_format, tables, train_table, objective_id = components
    output_dir = Path(config.trainer_kwargs.output_dir)
    optimizer = build_optimizer(objective, config.optimizer_kwargs)
    validation = Validation(config, objective, prompt_format, tables, context, log)
    checkpoints = Checkpoints(output_dir / "model_checkpoints", start.run_id, config.trainer_kwargs.keep_checkpoints)
    fingerprint = resume_fingerprint(config, train_table, objective_id)
    trainer = Trainer(
        objective, optimizer, config, train_table, validation, context, log, checkpoints, stop, fingerprint,
        score_identities(config, validation),
    )
    if start.folder is not None:
        check_resume_compatible(fingerprint, start.state)
        try:
            trainer.restore(start.state, start.tensors)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{start.folder}: its state is not one of this kind of run "
                                  f"({shorten(repr(error), 200)}); resume from another checkpoint, or {NEW_RUN}"
                                  ) from error
        trainer.note_weights()  # a kill may have come before it
    ended_by = trainer.ended_by()
    if context.is_main:
        if ended_by is None:
            prepare_run_folder(config, start, log)
            tables.write_skipped(output_dir)
        repair_links(checkpoints, start, trainer.state.best_step)
    if ended_by is not None:
        log.info(f"already finished at step {trainer.state.step}: {output_dir}; to continue, raise {ended_by}; to "
                 "start again, set trainer_kwargs.load_from_checkpoint to false")
        return 0
    context.barrier()
    log.open(trainer.state.step, trainer.state.evaluation_pending)
    try:
        trainer.fit()
    finally:
        log.close()
    skipped = trainer.state.skipped_steps
    note = f" ({skipped} of its steps skipped: not finite)" if skipped else ""
    log.info(f"finished at step {trainer.state.step}{note}: {output_dir / 'model_checkpoints' / 'last'}")
    return 0
