"""`--find_batch_size`: the largest micro-batch that fits into memory, by trying whole steps on the longest rows.

Sizes are doubled until one does not fit, then the gap is bisected. On a GPU all tries are in this process. On a CPU
each is in a process of its own, which the system may refuse memory, or end, without harm; this process builds nothing.
Nothing is trained and nothing written but tokenised rows that are not in the cache yet.
"""

import json
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.console import put
from model.doing import TRAINING, Doing
from utils.batch_numbers import TOKENS, largest_divisor, rows_of_step, with_batch_size
from utils.config import FineTuneConfig
from utils.config_files import ConfigError
from utils.config_kd import DistillConfig
from utils.devices import Place, find_place, group_numbers
from utils.memory_limit import Limit, impose, memory_limit, peak_of_this_process
from utils.out_of_memory import OutOfMemory, memory_error, memory_told, smaller_rows, training_remedy, what_was_done
from utils.run_log import RunLog
from utils.signals import cleaning_up
from utils.step_trial import free, make_trial, peak_on_gpu, try_step
from utils.training_run import Build


class Answer(NamedTuple):
    """Of one try. peak: bytes that were taken; None where it did not fit, and then `reason`."""

    peak: int | None
    reason: str = ""


class Tries(NamedTuple):
    """lengths: of all training rows, the longest first. of: how much memory there is, and what says so."""

    lengths: np.ndarray
    of: str
    attempt: Callable[[int], Answer]


def find_batch_size(config: FineTuneConfig | DistillConfig, build: Build, gpu_key: str = "gpu_device_id") -> int:
    """Prints what fits and what to write for it; the exit code. build: the script's function that makes the parts.

    Raises:
        OutOfMemory: not even one row fits.
        ConfigError: started in a group of processes.
    """
    if group_numbers()[0] > 1:
        raise ConfigError("--find_batch_size tries in one process: start it without torch's launcher")
    options = config.trainer_kwargs
    place = find_place(options.device, config.model_arch.gpu_device_id, options.precision, key=gpu_key)
    log = RunLog(Path(options.output_dir))
    for line in (*place.notices, place.describe()):
        log.say(line)
    config = with_most_work(config)
    with (in_this_process if place.device.type == "cuda" else in_child_processes)(config, build, place, log) as tries:
        rows, longest = len(tries.lengths), int(tries.lengths[0])
        log.say(f"trying steps on the longest of {rows:,} training rows (up to {longest:,} tokens); memory: {tries.of}")
        peaks: dict[int, int] = {}

        def fits(size: int) -> bool:
            rows_told = f"{size:,} row{'s' * (size > 1)}"
            log.say(f"trying {rows_told} ...")
            answer = tries.attempt(size)
            told = f"does not fit ({answer.reason})" if answer.peak is None else f"fits, peak {gigabytes(answer.peak)}"
            log.say(f"{rows_told}: {told}")
            if answer.peak is not None:
                peaks[size] = answer.peak
            return answer.peak is not None

        largest = largest_that_fits(fits, rows)
    if not largest:
        one_row = Doing(TRAINING, rows=1, longest=longest)
        raise OutOfMemory(f"not even one row of {longest:,} tokens fits into {tries.of}: "
                          f"{smaller_rows(one_row, place.precision)}")
    put("\n".join(report(config, largest, peaks[largest], tries)))
    return 0


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 1 to `most` that fits, or 0; a size fits where a larger one does."""
    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        size = min(max(1, 2 * fitting), most) if failing > most else (fitting + failing) // 2
        if fits(size):
            fitting = size
        else:
            failing = size
    return fitting


def with_most_work(config: FineTuneConfig | DistillConfig) -> FineTuneConfig | DistillConfig:
    """The config in which every step is one of those that take most."""
    kwargs = getattr(config, "distillation_kwargs", None)
    if kwargs is None or not kwargs.on_policy_fraction:
        return config
    return config.model_copy(update={"distillation_kwargs": kwargs.model_copy(update={"on_policy_fraction": 1.0})})


def report(config: FineTuneConfig, largest: int, peak: int, tries: Tries) -> list[str]:
    """Lines for the user."""
    all_rows = " (all of them)" if largest == len(tries.lengths) else ""
    lines = [f"largest batch that fits: {largest:,} of the longest rows{all_rows}, peak {gigabytes(peak)}; memory: "
             f"{tries.of}"]
    if config.dataset_kwargs.tokens_per_batch is not None:
        values: dict[str, int] = {TOKENS: largest * int(tries.lengths[0])}
    else:
        step = rows_of_step(config)
        values = with_batch_size(config, largest_divisor(step, largest))
    lines.append(f"write into the config (the steps stay the same, of {rows_of_step(config):,} rows):")
    sections: dict[str, dict[str, int]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    lines += [f'  in "{section}": {json.dumps(pairs)[1:-1]}' for section, pairs in sections.items()]
    return [*lines, f"or add to the command: {' '.join(f'--set {key}={value}' for key, value in values.items())}"]


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# -- on a GPU ------------------------------------------------------------------------------------------------------


@contextmanager
def in_this_process(config: FineTuneConfig, build: Build, place: Place, log: RunLog) -> Iterator[Tries]:
    with memory_told(training_remedy(config, place.precision)):
        trial = make_trial(config, build, place, log)
    size = torch.cuda.get_device_properties(place.device).total_memory

    def attempt(rows: int) -> Answer:
        answer = answer_of(lambda: peak_on_gpu(place.device, lambda: try_step(trial, rows)))
        free(trial)  # here, where no traceback holds the tensors of a step that failed any more
        return answer

    yield Tries(trial.table.lengths[trial.order], f"{gigabytes(size)} on {place.device}", attempt)


def answer_of(work: Callable[[], int]) -> Answer:
    try:
        return Answer(work())
    except Exception as error:
        if memory_error(error) is None:
            raise
        kinds = [each.kind for each in what_was_done(error)]
        return Answer(None, f"memory is full in {kinds[0]}" if kinds else "memory is full")


# -- on a CPU ------------------------------------------------------------------------------------------------------


@contextmanager
def in_child_processes(config: FineTuneConfig, build: Build, place: Place, log: RunLog) -> Iterator[Tries]:
    limit = memory_limit()

    def ask(rows: int) -> Answer | np.ndarray:
        return in_child(answer_in_child, config, build, place, log.path.parent, rows, limit)

    with cleaning_up():
        lengths = ask(0)
        if isinstance(lengths, Answer):
            raise OutOfMemory(f"the model does not fit ({lengths.reason}): take a smaller one, or end other programs")
        of = "no limit known" if limit is None else f"{gigabytes(limit.size)} {limit.name}"
        yield Tries(lengths, of, ask)


def in_child(function: Callable, *arguments):
    """What the function returns in a process of its own, or raises there; an `Answer` where that process was ended."""
    context = start_method()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_in_child, args=(sender, function, arguments), daemon=True)
    try:
        process.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            return Answer(None, f"its process was ended by {ending(process.exitcode)}")
        process.join()
    finally:
        if process.is_alive():
            process.kill()
        receiver.close()
    if isinstance(result, Exception):
        raise result
    return result


def start_method():
    """No fork of this process, whose threads might leave it hanging, but of one that has only imported, where the
    system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def run_in_child(sender, function: Callable, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes: the other one ends this one
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error if can_be_sent(error) else RuntimeError(f"{type(error).__name__}: {error}"))


def can_be_sent(error: Exception) -> bool:
    """Many that take other arguments than their message can be taken apart, but not put together again."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def ending(exit_code: int) -> str:
    if exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def answer_in_child(
    config: FineTuneConfig, build: Build, place: Place, output_dir: Path, rows: int, limit: Limit | None
) -> Answer | np.ndarray:
    """A step of `rows` rows in this process; rows 0: only the lengths of all rows, the longest first."""
    from utils.command_line import quiet_libraries

    quiet_libraries()
    impose(limit)

    def work() -> int:
        try_step(make_trial(config, build, place, RunLog(output_dir, is_main=False)), rows)
        return peak_of_this_process()

    if rows:
        with redirect_stderr(StringIO()):  # of the same bars again
            return answer_of(work)
    found: list[np.ndarray] = []

    def look() -> int:
        trial = make_trial(config, build, place, RunLog(output_dir))
        found.append(trial.table.lengths[trial.order])
        return 0

    answer = answer_of(look)
    return found[0] if found else answer
