"""What the distillation benchmarks share: results compared first, variants that take turns, memory in own processes."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Largest relative difference of the loss and of the gradients' norm from full logits in float32.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (3e-2, 1e-1)}
ALLOCATOR = "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"
HIGH_WATER = "VmHWM:"  # of /proc/self/status: the peak resident set, in KiB

Step = Callable[[], tuple[float, list[Tensor]]]  # one step: its mean loss per label token, and the gradients


class Target(NamedTuple):
    """What a ratio should reach; at_most: a smaller ratio is better."""

    least: float
    goal: float
    at_most: bool = False

    def __str__(self) -> str:
        return f"; reach at {'most' if self.at_most else 'least'} {self.least:.3g}, goal {self.goal:.3g}"


def add_common_options(parser: argparse.ArgumentParser, variants: Sequence[str]) -> None:
    parser.add_argument("--variants", nargs="+", choices=variants, help="default: all that are installed")
    parser.add_argument("--rounds", type=int, default=6, help="the first is dropped (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--skip_memory", action="store_true", help="measure time alone")
    add_device_option(parser)
    parser.add_argument("--memory_of", choices=variants, help=argparse.SUPPRESS)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends with a usage error where there is no such device; products in float32 are in float32 on all."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda: there is no GPU here")
    torch.set_float32_matmul_precision("highest")


def wait_for(device: str) -> None:
    """Until all that a device was given is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def choose_variants(parser: argparse.ArgumentParser, asked: list[str] | None, packages: dict[str, str | None]) -> list:
    """The variants to run, of those whose package (None: our own code) is here; in the order of `packages`."""
    missing = {name: package for name, package in packages.items() if package and not find_spec(package)}
    for name in asked or ():
        if name in missing:
            parser.error(f"{name} needs {missing[name]}: pip install -r benchmarks/requirements.txt")
    return [name for name in packages if name not in missing and (not asked or name in asked)]


def conditions(threads: int, device: str = "cpu") -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    allocator = " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ)
    return f"{threads} threads, torch {torch.__version__}, allocator: {allocator or 'default'}"


# -- equality ------------------------------------------------------------------------------------------------------


def compare(name: str, result: tuple, reference: tuple, precision: str) -> None:
    """Prints how far (loss, gradients) are from the reference.

    Raises:
        SystemExit: further than `TOLERANCES` allow, or not a number.
    """
    (loss, gradients), (expected, expected_gradients) = result, reference
    pairs = list(zip(gradients, expected_gradients, strict=True))
    norm = sum(right.double().square().sum().item() for _, right in pairs) ** 0.5
    distance = sum((left - right).double().square().sum().item() for left, right in pairs) ** 0.5
    largest = max((left - right).abs().max().item() for left, right in pairs)
    of_loss, of_gradients = abs(loss - expected) / abs(expected), distance / norm
    result = (f"{name:<15} loss {loss:.7f}, off by {of_loss:.1e} of it; gradients off by {of_gradients:.1e} of their "
            f"norm, at most {largest:.1e}")
    allowed = TOLERANCES[precision]
    if not (of_loss <= allowed[0] and of_gradients <= allowed[1]):
        raise SystemExit(f"not equal to full logits in float32: {result}")
    print(result)


# -- time ----------------------------------------------------------------------------------------------------------


def take_turns(steps: dict[str, Step], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each variant by round, without the first round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            wait_for(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def print_times(seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    for name, times in seconds.items():
        peak = f"; peak memory above rest {memory[name]:,.0f} MiB" if name in memory else ""
        print(f"{name:<15} median {statistics.median(times):.4f} s, min {min(times):.4f}, max {max(times):.4f}{peak}")


def print_time_ratio(label: str, slow: list[float], fast: list[float], target: Target | None = None) -> None:
    """The ratio of two variants, round by round."""
    ratios = [left / right for left, right in zip(slow, fast, strict=True)]
    print(f"time {label}: {statistics.median(ratios):.2f} (by round {min(ratios):.2f} to {max(ratios):.2f})"
          f"{target or ''}")


def print_memory_ratio(label: str, ours: float, theirs: float, target: Target | None = None) -> None:
    if theirs > 0:
        print(f"memory {label}: {ours / theirs:.3f}{target or ''}")


# -- memory --------------------------------------------------------------------------------------------------------


def memory_of_each(module: str, arguments: list[str], variants: Sequence[str]) -> dict[str, float]:
    """Peak MiB above rest of a step of each variant, in a process of its own, with the default allocator."""
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    peaks = {}
    for variant in variants:
        command = [sys.executable, "-m", module, *arguments, "--memory_of", variant]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"memory of {variant} could not be measured: {done.stderr.strip()[-2000:]}")
        peaks[variant] = float(done.stdout.split()[-1])
    return peaks


def peak_above_rest(step: Step) -> float:
    """MiB that one step needs at its peak, above what the process holds before it.

    Raises:
        SystemExit: this system does not tell (Linux does).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the mark: what making the models took is not in it
        rest = high_water()
    except (OSError, ValueError) as error:
        raise SystemExit(f"peak memory is read from Linux's /proc alone: give --skip_memory ({error})") from None
    step()
    return (high_water() - rest) / 1024


def cuda_peak_of_each(steps: dict[str, Step], parameters: Sequence[Tensor]) -> dict[str, float]:
    """MiB of a GPU's memory that one step of each variant allocates at its peak, above what is held before it.

    parameters: all those that get gradients, which count as memory of the step.
    """
    peaks = {}
    for name, step in steps.items():
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - rest) / 2**20
    return peaks


def high_water() -> int:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(HIGH_WATER) + 1])
