"""Floating-point operations of a distillation step, counted from the shapes that are computed, and a GPU's peak."""

import statistics
from collections.abc import Sequence

import torch


def body_flops(blocks: int, width: int, lengths: Sequence[int], counts: Sequence[int], pruned: bool) -> float:
    """Products of all blocks of a GPT-2, forward; causal attention counts the keys that are seen alone.

    lengths: tokens of each row. pruned: the last block computes keys and values of all, the rest for the last `counts`
    tokens of each row.
    """
    total = 0.0
    for length, count in zip(lengths, counts, strict=True):
        total += (blocks - pruned) * (24 * width**2 * length + 2 * width * length * (length + 1))
        if pruned:
            seen = count * length - count * (count - 1) // 2
            total += 4 * width**2 * length + 20 * width**2 * count + 4 * width * seen
    return total


def head_flops(width: int, vocabulary: int, positions: int) -> float:
    return 2.0 * width * vocabulary * positions


def measured_peak() -> float:
    """The GPU's FLOP/s in a large bfloat16 product of random numbers."""
    size, times = 8192, []
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / statistics.median(times[3:])
