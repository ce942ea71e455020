"""Means of row scores, their bootstrap intervals, and tests of differences between them."""

import statistics
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over all rows (not over batches)."""
    return {metric: statistics.fmean(row[metric] for row in rows) for metric in rows[0]}


def confidence_intervals(
    rows: list[dict[str, float]], resamples: int = 1000, seed: int = 1234, level: float = LEVEL
) -> dict[str, list[float]]:
    """`{metric: [low, high]}` of each mean: percentile bootstrap over rows (Efron & Tibshirani, 1993, ch. 13).

    With one row both ends equal its value: a single row says nothing about spread.
    """
    values = np.array([[row[metric] for metric in rows[0]] for row in rows], dtype=np.float64)
    ends = _percentiles(_resampled_means(values, resamples, seed), level)
    return {metric: ends[:, index].tolist() for index, metric in enumerate(rows[0])}


def paired_bootstrap(
    scores_a: Sequence[float], scores_b: Sequence[float], resamples: int = 10_000, seed: int = 1234,
    level: float = LEVEL,
) -> dict[str, float | list[float]]:
    """Whether the means of a and b differ, given scores of the same rows in the same order (Koehn, 2004).

    Returns `difference` (mean of a minus mean of b), its `interval` [low, high] and the two-sided `p_value`: twice the
    share of resamples whose difference is on the far side of 0, at least 2 / (resamples + 1). With fewer than about
    twenty rows the interval is too narrow; with one row `p_value` is 1.0.

    Raises:
        ValueError: the lists differ in length.
    """
    differences = np.array([a - b for a, b in zip(scores_a, scores_b, strict=True)], dtype=np.float64)
    means = _resampled_means(differences[:, None], resamples, seed)
    far_side = int(min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0)))
    return {
        "difference": statistics.fmean(differences),
        "interval": _percentiles(means, level)[:, 0].tolist(),
        "p_value": min(1.0, 2 * (far_side + 1) / (resamples + 1)) if len(differences) > 1 else 1.0,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number, in the given order.

    Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples, metrics] of rows drawn with replacement from values [rows, metrics]."""
    rng = np.random.default_rng(seed)
    count = len(values)
    chunk = max(1, (1 << 20) // count)  # about a million drawn rows at a time: 40 MB for four metrics
    means = []
    for start in range(0, resamples, chunk):
        drawn = rng.integers(count, size=(min(chunk, resamples - start), count))
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


def _percentiles(means: np.ndarray, level: float) -> np.ndarray:
    """Low and high ends [2, metrics] of the central `level` of each column of means [resamples, metrics]."""
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
