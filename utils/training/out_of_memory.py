"""Out of memory, reported in one line with the settings to change.

The rows of an optimizer step depend on train_batch_size x gradient_accumulation_steps alone (`data/batches.py`): half
the batch and twice the accumulation train on the same rows in the same steps.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

from utils.config.fine_tune import FineTuneConfig
from utils.errors import TrainingError

BATCH, ACCUMULATION = "dataset_kwargs.train_batch_size", "trainer_kwargs.gradient_accumulation_steps"
TOKENS, BOUND = "dataset_kwargs.tokens_per_batch", "trainer_kwargs.ckpt_training_batch"
# Errors of CUDA's libraries and of torch's CPU allocator are plain RuntimeErrors. torch's own class is matched by name,
# so that this module can be imported without torch.
FULL = re.compile("^(OutOfMemory|OutOfMemoryError|MemoryError): |"
                  "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: ")
SHORTER = "lower dataset_kwargs.max_length, or take a smaller model"


class OutOfMemory(TrainingError):
    """The message says what to set."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is of memory."""
    while error is not None:
        if FULL.search(f"{type(error).__name__}: {error}"):
            return True
        error = error.__cause__
    return False


@contextmanager
def out_of_memory_remedy(remedy: str) -> Iterator[None]:
    """Turns errors of memory into OutOfMemory with the remedy."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        gpu = "GPU " if "CUDA" in f"{error} {error.__cause__}" else ""
        raise OutOfMemory(f"{gpu}out of memory: {remedy}") from error


def training_remedy(config: FineTuneConfig) -> str:
    """Smaller micro-batches, with the same optimizer steps."""
    data, distillation = config.dataset_kwargs, getattr(config, "distillation_kwargs", None)
    if data.tokens_per_batch is not None:
        values = {TOKENS: max(1, data.tokens_per_batch // 2)}
    else:
        values = with_batch_size(config, largest_divisor(data.train_batch_size, data.train_batch_size // 2))
    if values.get(TOKENS, data.train_batch_size) == 1:
        return f"the batch is one row already: {SHORTER}"
    changes = " and ".join(f"{key} {value} (now {attrgetter(key)(config)})" for key, value in values.items())
    remedy = f"set {changes}: the optimizer steps stay the same"
    if distillation is not None and (distillation.method == "policy_gradient" or distillation.on_policy_fraction):
        rows = distillation.rollout_batch_size or data.val_batch_size
        remedy += f"; for rollouts set distillation_kwargs.rollout_batch_size {rows // 2 or 1} (now {rows})"
    return f"{remedy}; if that is not enough, {SHORTER}"


def evaluation_remedy(config: FineTuneConfig) -> str:
    rows = config.dataset_kwargs.val_batch_size
    if rows == 1:
        return f"rows are evaluated one by one already: {SHORTER}"
    return (f"set dataset_kwargs.val_batch_size {rows // 2} (now {rows}): the scores stay the same, and the same "
            "command resumes from the last checkpoint")


def decoding_remedy(options) -> str:
    """For validate_model.py, by its flags."""
    for flag, value in (("--batch_size", options.batch_size), ("--num_beams", options.num_beams)):
        if value > 1:
            return f"set {flag} {value // 2} (now {value}), or take a smaller model"
    return "lower --max_generation_length, or take a smaller model"


# -- the same optimizer steps in other micro-batches ---------------------------------------------------------------


def rows_per_step(config: FineTuneConfig) -> int:
    return config.dataset_kwargs.train_batch_size * config.trainer_kwargs.gradient_accumulation_steps


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, but at least 1."""
    return next(size for size in range(max(1, min(number, limit)), 0, -1) if number % size == 0)


def with_batch_size(config: FineTuneConfig, batch_size: int) -> dict[str, int]:
    """The keys to set for the same steps in micro-batches of `batch_size` rows, a divisor of `rows_per_step`.

    Keys that count micro-batches are scaled too, so that they keep meaning the same number of rows.
    """
    options, before = config.trainer_kwargs, config.dataset_kwargs.train_batch_size
    values = {BATCH: batch_size, ACCUMULATION: rows_per_step(config) // batch_size}
    counts = {"n_batch_ckpt_save": options.n_batch_ckpt_save, "ckpt_training_batch": options.ckpt_training_batch,
              "loss_scaling_batch": options.loss_scaling_batch if options.adaptive_loss_scaling else None}
    for key, count in counts.items():
        if count is not None and batch_size != before:
            values[f"trainer_kwargs.{key}"] = max(1, round(count * before / batch_size))
    return values
