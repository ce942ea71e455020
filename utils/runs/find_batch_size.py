"""`--find_batch_size`: the largest micro-batch that fits into a GPU. Trains and writes nothing but tokenised rows."""

import os
from pathlib import Path

import torch

from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError
from utils.runs.run import Build
from utils.runs.run_folder import ResumePoint
from utils.runs.run_log import RunLog
from utils.training.distributed import init_distributed
from utils.training.load_model import arch_key
from utils.training.memory_probe import MemoryProbe, largest_that_fits
from utils.training.optimization import build_optimizer
from utils.training.out_of_memory import (
    TOKENS,
    OutOfMemory,
    largest_divisor,
    out_of_memory_remedy,
    rows_per_step,
    with_batch_size,
)
from utils.training.random_state import seed_everything


def find_batch_size(config: FineTuneConfig | DistillConfig, build: Build) -> int:
    """Print the largest micro-batch that fits, and the keys to set for it. Returns the exit code.

    Raises:
        ConfigError: there is no GPU to use, or this is one of a group of processes.
        OutOfMemory: not even one row fits.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError("--find_batch_size runs in one process: start it without torchrun")
    options = config.trainer_kwargs
    context = init_distributed(options.device, config.model_arch.gpu_device_id, options.precision,
                               arch_key(config, "gpu_device_id"))
    if context.device.type != "cuda":
        raise ConfigError("--find_batch_size needs a GPU, and this run would use the CPU: if that is out of memory, "
                          "halve dataset_kwargs.train_batch_size and double trainer_kwargs.gradient_accumulation_steps")
    log = RunLog(Path(options.output_dir))
    for line in (*context.notices, context.describe()):
        log.info(line)
    with out_of_memory_remedy("the model does not fit: take a smaller one, or end other programs"):
        probe = make_probe(config, build, context, log)

    def fits(size: int) -> bool:
        torch.cuda.reset_peak_memory_stats(context.device)
        fitting = probe.fits(size)
        peak = torch.cuda.max_memory_reserved(context.device) / 1e9
        log.info(f"train_batch_size {size:,}: {f'fits, peak {peak:.2f} GB' if fitting else 'does not fit'}")
        return fitting

    rows, longest = len(probe.table), int(probe.table.lengths.max())
    log.info(f"trying optimizer steps on the longest of {rows:,} training rows (up to {longest:,} tokens)")
    largest = largest_that_fits(fits, rows)
    if not largest:
        raise OutOfMemory(f"not even one row of {longest:,} tokens fits into {context.device}: lower "
                          f"dataset_kwargs.max_length (such as {longest // 2}), or take a smaller model")
    print("\n".join(report(config, largest, rows, longest)))
    return 0


def make_probe(config: FineTuneConfig | DistillConfig, build: Build, context, log: RunLog) -> MemoryProbe:
    distillation = getattr(config, "distillation_kwargs", None)
    if distillation is not None and distillation.on_policy_fraction:  # try the kind of step that takes most memory
        distillation = distillation.model_copy(update={"on_policy_fraction": 1.0})
        config = config.model_copy(update={"distillation_kwargs": distillation})
    seed_everything(config.trainer_kwargs.seed)
    parts = build(context, config, log, ResumePoint(""), keep=False)
    optimizer = build_optimizer(parts.objective, config.optimizer_kwargs)
    return MemoryProbe(parts.objective, optimizer, parts.train_table, context, rows_per_step(config))


def report(config: FineTuneConfig, largest: int, rows: int, longest: int) -> list[str]:
    """Lines for the user: what fits, and the settings with which the optimizer steps stay the same."""
    all_rows = " (all of them)" if largest == rows else ""
    if config.dataset_kwargs.tokens_per_batch is not None:
        values = {TOKENS: largest * longest}
    else:
        values = with_batch_size(config, largest_divisor(rows_per_step(config), largest))
    return [f"largest batch that fits: {largest:,} of the longest rows{all_rows}",
            f"for the same optimizer steps, of {rows_per_step(config):,} rows, set:",
            *(f"  {key} = {value}" for key, value in values.items()),
            f"or add to the command: {' '.join(f'--set {key}={value}' for key, value in values.items())}"]
