"""Memory that is full, told in one line: what was being computed, and what to write into the config instead."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from model.doing import DECODING, LOADING, LOGITS, MEASURING, ROLLOUTS, TEACHER, TRAINING, UPDATE, Doing
from utils.batch_numbers import TOKENS, instead, smaller_batch, with_batch_size
from utils.config import FineTuneConfig
from utils.config_kd import DistillConfig

# What torch's allocator for the CPU, the C++ library and the GPU's libraries say, in errors that have no class of their
# own.
TEXTS = re.compile(r"DefaultCPUAllocator: |you tried to allocate|bad_alloc|bad allocation|CUDA error: out of memory|"
                   r"CUBLAS_STATUS_ALLOC_FAILED|[Cc]annot allocate memory|\(os error 12\)|can't start new thread")
ASKED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
SEARCH = "or let --find_batch_size look for it"


class OutOfMemory(RuntimeError):
    """One line for the user."""

    exit_code = 1


@contextmanager
def memory_told(remedy: Callable[[list[Doing]], str]) -> Iterator[None]:
    """Turns errors of memory into `OutOfMemory`. remedy: what to do instead, from what was being done, innermost
    first."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        cause = memory_error(error)
        if cause is None:
            raise
        done = what_was_done(error)
        raise OutOfMemory(f"{told(cause, done)}: {remedy(done)}") from error


def memory_error(error: BaseException) -> BaseException | None:
    """The error of memory that this one is, or comes from; None where there is none."""
    for each in chain_of(error):
        if isinstance(each, torch.OutOfMemoryError | MemoryError):
            return each
        if isinstance(each, OSError) and each.errno == errno.ENOMEM:
            return each
        if isinstance(each, RuntimeError | SafetensorError | ImportError) and TEXTS.search(str(each)):
            return each
    return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def what_was_done(error: BaseException) -> list[Doing]:
    """Innermost first."""
    return [each for link in reversed(list(chain_of(error))) for each in getattr(link, "doing", ())]


def told(error: BaseException, done: list[Doing]) -> str:
    """`the GPU's memory is full in training step 3, the teacher (8 rows, ...; 2.00 GiB more were asked for)`."""
    on_gpu = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA|CUBLAS", str(error))
    memory = "the GPU's memory is full" if on_gpu else "memory is full"
    names = dict.fromkeys(" ".join(filter(None, each[:2])) for each in reversed(done))
    names = [name for name in names if not any(other.startswith(f"{name} ") for other in names)]
    batch = next((each for each in done if each.rows), None)
    facts = []
    if batch is not None:
        facts.append(f"{batch.rows} row{'s' * (batch.rows > 1)}, the longest of {batch.longest} tokens: "
                     f"{batch.rows * batch.longest} tokens with padding")
    if asked := ASKED.search(str(error)):
        facts.append(f"{asked[1]} more were asked for")
    where = f" in {', '.join(names)}" if names else ""
    return f"{memory}{where} ({'; '.join(facts)})" if facts else f"{memory}{where}"


# -- what to do instead --------------------------------------------------------------------------------------------


def training_remedy(config: FineTuneConfig | DistillConfig, precision: str) -> Callable[[list[Doing]], str]:
    """Of a training script. precision: of the forward pass."""

    def remedy(done: list[Doing]) -> str:
        kinds = {each.kind for each in done}
        if LOADING in kinds:
            return loading_remedy(config)
        if kinds & {MEASURING, DECODING}:
            return evaluation_remedy(config, done, precision)
        if kinds & {TRAINING, TEACHER, ROLLOUTS}:
            return f"{step_remedy(config, done, precision)}; the checkpoints stay as they are"
        return "end other programs, or take a smaller model"

    return remedy


def loading_remedy(config) -> str:
    if isinstance(config, DistillConfig):
        return ("take a smaller student (model_arch.student_lang_model) or teacher, give the teacher a GPU of its own "
                '(model_arch.teacher_gpu_device_id), or end other programs')
    return "take a smaller model_arch.lang_model, or end other programs"


def step_remedy(config, done: list[Doing], precision: str) -> str:
    """Of a training step: the steps stay the same, where a smaller batch or chunk is enough."""
    kinds = [each.kind for each in done]
    if UPDATE in kinds:
        return "the optimizer's state does not fit: take a smaller model, or an optimizer_kwargs.type with less state"
    distilling = config.distillation_kwargs if isinstance(config, DistillConfig) else None
    batch = next((each for each in done if each.rows), Doing(TRAINING))
    rows = batch.rows or config.dataset_kwargs.train_batch_size
    if kinds[:1] == [ROLLOUTS]:
        if rows > 1:
            values = {"distillation_kwargs.rollout_batch_size": rows // 2}
            return f"set {instead(config, values)}: fewer rows are then drawn at a time"
        return f"lower {LENGTH} or dataset_kwargs.max_length, or take a smaller model"
    chunk = ""
    if LOGITS in kinds and distilling and distilling.chunk_size > 1:
        smaller = instead(config, {"distillation_kwargs.chunk_size": distilling.chunk_size // 2})
        chunk = f"set {smaller}: the result stays the same; or "
    if rows > 1:
        tokens = config.dataset_kwargs.tokens_per_batch
        values = with_batch_size(config, smaller_batch(config.dataset_kwargs.train_batch_size, rows))
        if tokens is not None:
            values = {TOKENS: min(tokens, rows * (batch.longest or tokens)) // 2}
        return f"{chunk}set {instead(config, values)}: the steps stay the same; {SEARCH}"
    return chunk + smaller_rows(batch, precision)


LENGTH = "model_arch.generation_kwargs.max_generation_length"


def smaller_rows(batch: Doing, precision: str) -> str:
    """Where no batch can be smaller."""
    length = f" (such as {batch.longest // 2})" if batch.longest else ""
    half = ', set trainer_kwargs.precision to "bfloat16"' if precision == "float32" else ""
    return f"the batch is one row already: lower dataset_kwargs.max_length{length}{half}, or take a smaller model"


def evaluation_remedy(config, done: list[Doing], precision: str) -> str:
    batch = next((each for each in done if each.rows), Doing(MEASURING))
    most, beams = config.dataset_kwargs.val_batch_size, config.model_arch.generation_kwargs.num_beams
    rows = min(batch.rows or most, most)
    same = "the scores stay the same; the same command goes on from the last checkpoint"
    if rows > 1:
        return f"set {instead(config, {'dataset_kwargs.val_batch_size': rows // 2})}: {same}"
    if done[0].kind == DECODING and beams > 1:
        return f"set {instead(config, {'model_arch.generation_kwargs.num_beams': beams // 2})}"
    return smaller_rows(batch, precision)


def decoding_remedy(options, precision: str) -> Callable[[list[Doing]], str]:
    """Of validate_model.py, by its flags."""

    def remedy(done: list[Doing]) -> str:
        if LOADING in {each.kind for each in done}:
            return "take a smaller model, or end other programs"
        rows = min([options.batch_size, *(each.rows for each in done if each.rows)])
        if rows > 1:
            return f"set --batch_size {rows // 2} (now {options.batch_size}): the predictions stay the same"
        if options.num_beams > 1:
            return f"set --num_beams {options.num_beams // 2} (now {options.num_beams})"
        half = ", set --precision bfloat16" if precision == "float32" else ""
        return f"one row at a time is decoded already: lower --max_generation_length{half}, or take a smaller model"

    return remedy
