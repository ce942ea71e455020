"""`--find_batch_size`: the largest micro-batch that fits into a GPU, found by real optimizer steps on the longest rows.

Sizes are doubled until one does not fit, then bisected. Nothing is trained, and nothing written but tokenized rows.
"""

import gc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.batches import load_batches
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import ConfigError
from utils.runs.run import Build
from utils.runs.run_folder import ResumePoint
from utils.runs.run_log import RunLog
from utils.training.batch_numbers import TOKENS, largest_divisor, rows_of_step, with_batch_size
from utils.training.distributed import DistributedContext, group_numbers, init_distributed
from utils.training.optimization import build_optimizer
from utils.training.out_of_memory import OutOfMemory, memory_error, out_of_memory_remedy
from utils.training.random_state import seed_everything
from utils.training.step import accumulate_gradients, add_up, update


def find_batch_size(config: FineTuneConfig | DistillConfig, build: Build, gpu_key: str = "gpu_device_id") -> int:
    """Print the largest micro-batch that fits, and the keys to set for it. Returns the exit code.

    Raises:
        ConfigError: there is no GPU to use, or this is one of a group of processes.
        OutOfMemory: not even one row fits.
    """
    if group_numbers()[0] > 1:
        raise ConfigError("--find_batch_size runs in one process: start it without torch's launcher")
    options = config.trainer_kwargs
    context = init_distributed(options.device, config.model_arch.gpu_device_id, options.precision, key=gpu_key)
    if context.device.type != "cuda":
        raise ConfigError("--find_batch_size needs a GPU, and this run would use the CPU: if memory gets full there, "
                          "halve dataset_kwargs.train_batch_size and double trainer_kwargs.gradient_accumulation_steps")
    log = RunLog(Path(options.output_dir))
    for line in (*context.notices, context.describe()):
        log.info(line)
    with out_of_memory_remedy("the model does not fit: take a smaller one, or end other programs"):
        probe = Probe(config, build, context, log)

    def fits(size: int) -> bool:
        torch.cuda.reset_peak_memory_stats(context.device)
        fitting = probe.fits(size)
        peak = torch.cuda.max_memory_reserved(context.device) / 1e9
        log.info(f"train_batch_size {size:,}: {f'fits, peak {peak:.2f} GB' if fitting else 'does not fit'}")
        return fitting

    rows, longest = len(probe.order), int(probe.table.lengths.max())
    log.info(f"trying optimizer steps on the longest of {rows:,} training rows (up to {longest:,} tokens)")
    largest = largest_that_fits(fits, rows)
    if not largest:
        raise OutOfMemory(f"not even one row of {longest:,} tokens fits into {context.device}: lower "
                          f"dataset_kwargs.max_length (such as {longest // 2}), or take a smaller model")
    print("\n".join(report(config, largest, rows, longest)))
    return 0


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 1 to `most` that fits, 0 if none does. Assumes that whatever is smaller fits as well."""
    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        size = min(max(1, 2 * fitting), most) if failing > most else (fitting + failing) // 2
        if fits(size):
            fitting = size
        else:
            failing = size
    return fitting


def report(config: FineTuneConfig, largest: int, rows: int, longest: int) -> list[str]:
    """Lines for the user: what fits, and the settings with which the optimizer steps stay the same."""
    all_rows = " (all of them)" if largest == rows else ""
    if config.dataset_kwargs.tokens_per_batch is not None:
        values = {TOKENS: largest * longest}
    else:
        values = with_batch_size(config, largest_divisor(rows_of_step(config), largest))
    return [f"largest batch that fits: {largest:,} of the longest rows{all_rows}",
            f"for the same optimizer steps, of {rows_of_step(config):,} rows, set:",
            *(f"  {key} = {value}" for key, value in values.items()),
            f"or add to the command: {' '.join(f'--set {key}={value}' for key, value in values.items())}"]


class Probe:
    """A run's objective and optimizer, to try steps with. The weights do not change, and nothing is saved."""

    def __init__(self, config: FineTuneConfig | DistillConfig, build: Build, context: DistributedContext, log: RunLog):
        distillation = getattr(config, "distillation_kwargs", None)
        if distillation is not None and distillation.on_policy_fraction:  # then every step is one that takes most
            distillation = distillation.model_copy(update={"on_policy_fraction": 1.0})
            config = config.model_copy(update={"distillation_kwargs": distillation})
        seed_everything(config.trainer_kwargs.seed)
        parts, kwargs = build(context, config, log, ResumePoint(""), keep=False), config.optimizer_kwargs
        self.objective, self.table, self.context = parts.objective, parts.train_table, context
        self.optimizer = build_optimizer(self.objective, kwargs.type, kwargs.kwargs, kwargs.lm_lr, kwargs.decay_all)
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.order = np.argsort(-self.table.lengths, kind="stable")  # the longest rows first
        self.step_rows, self.clip_norm = rows_of_step(config), config.trainer_kwargs.clip_norm
        self.objective.train()

    def fits(self, rows: int) -> bool:
        """Whether an optimizer step in micro-batches of the `rows` longest rows fits into memory.

        Of its micro-batches two are computed: the second one meets the gradients of the first. The others are handed
        over as well, since an on-policy step samples for all its rows at once.
        """
        try:
            if not self.optimizer.state:
                self.step([self.order[-1:]])  # so that the moments are there during the step that counts
            step_rows = np.resize(self.order[:rows], max(2 * rows, self.step_rows))
            self.step([step_rows[start : start + rows] for start in range(0, len(step_rows), rows)])
            return True
        except Exception as error:
            if memory_error(error) is None:
                raise
        # Past the except clause no traceback holds the tensors of the failed step any more.
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def step(self, batches: list[np.ndarray]) -> None:
        """An optimizer step with learning rate 0, over the first two of its micro-batches."""
        pad_id = self.objective.language_model.tokenizer.pad_token_id
        self.optimizer.zero_grad(set_to_none=True)
        steps = self.objective.iter_steps(self.table, load_batches(self.table, batches, pad_id), [len(batches)])
        _, sums = accumulate_gradients(self.objective, islice(next(steps), 2), self.context)
        tokens = int(self.table.label_counts[np.concatenate(batches[:2])].sum())
        result = add_up(self.parameters, sums, tokens, 0.0, self.context)
        # A gradient that is not finite would ruin the weights for the next try, even at learning rate 0.
        torch._foreach_zero_([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        result.grad_norm = 0.0
        update(self.optimizer, self.parameters, result, self.clip_norm)
