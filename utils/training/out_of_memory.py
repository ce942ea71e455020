"""Full memory, reported in one line with the settings to change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from utils.config.fine_tune import FineTuneConfig
from utils.training.batch_numbers import TOKENS, instead, largest_divisor, with_batch_size

# Errors of CUDA's libraries and of torch's CPU allocator are plain RuntimeErrors. torch's own class is matched by name,
# so that this module can be imported without torch.
FULL = re.compile("^(OutOfMemory|OutOfMemoryError|MemoryError): |"
                  "CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: ")
REQUESTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
SHORTER = "lower dataset_kwargs.max_length, or take a smaller model"


class OutOfMemory(RuntimeError):
    """One line for the user."""

    exit_code = 1


def memory_error(error: BaseException | None) -> BaseException | None:
    """The error that says that memory is full: this one, or one that it was raised from; None if there is none."""
    while error is not None:
        if FULL.search(f"{type(error).__name__}: {error}"):
            return error
        error = error.__cause__
    return None


@contextmanager
def out_of_memory_remedy(remedy: str) -> Iterator[None]:
    """Raises OutOfMemory, which gives the remedy, in place of errors that say that memory is full."""
    try:
        yield
    except Exception as error:
        cause = memory_error(error)
        if cause is None or isinstance(cause, OutOfMemory):
            raise
        memory = "the GPU's memory is full" if "CUDA" in str(cause) else "memory is full"
        requested = REQUESTED.search(str(cause))
        amount = f" ({requested[1]} more were requested)" if requested else ""
        raise OutOfMemory(f"{memory}{amount}: {remedy}") from error


def training_remedy(config: FineTuneConfig) -> str:
    """For smaller micro-batches; the optimizer steps stay the same."""
    data, distillation = config.dataset_kwargs, getattr(config, "distillation_kwargs", None)
    if data.tokens_per_batch is not None:
        values = {TOKENS: max(1, data.tokens_per_batch // 2)}
    else:
        values = with_batch_size(config, largest_divisor(data.train_batch_size, data.train_batch_size // 2))
    if values.get(TOKENS, data.train_batch_size) == 1:
        return f"the batch is one row already: {SHORTER}"
    remedy = f"set {instead(config, values)}: the optimizer steps stay the same"
    if distillation is not None and (distillation.method == "policy_gradient" or distillation.on_policy_fraction):
        rows = distillation.rollout_batch_size or data.val_batch_size
        remedy += f"; while sampling set {instead(config, {'distillation_kwargs.rollout_batch_size': rows // 2 or 1})}"
    return f"{remedy}; if that is not enough, {SHORTER}"


def evaluation_remedy(config: FineTuneConfig) -> str:
    rows = config.dataset_kwargs.val_batch_size
    if rows == 1:
        return f"rows are evaluated one by one already: {SHORTER}"
    return (f"set {instead(config, {'dataset_kwargs.val_batch_size': rows // 2})}: the scores stay the same, and the "
            "same command resumes from the last checkpoint")


def decoding_remedy(options) -> str:
    """Of validate_model.py, by its flags."""
    for flag, value in (("--batch_size", options.batch_size), ("--num_beams", options.num_beams)):
        if value > 1:
            return f"set {flag} {value // 2} (now {value}), or take a smaller model"
    return "lower --max_generation_length, or take a smaller model"
