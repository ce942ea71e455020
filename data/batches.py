"""Which rows form which optimizer step, and their collation: seeded, bucketed by length, resumable."""

import signal
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.tokenized import TokenizedDataset

IGNORED = -100
WINDOW = 256  # rows sorted by length together: enough for batches of similar length, few enough to stay random

Step = list[np.ndarray]  # row indices of each micro-batch of one optimizer step


def plan_epoch(
    lengths: np.ndarray,
    batch_size: int,
    accumulation: int,
    seed: int,
    epoch: int,
    tokens_per_batch: int | None = None,
    max_micro_batches: int | None = None,
    passes: int = 1,
) -> list[Step]:
    """All optimizer steps of an epoch.

    The rows of a step depend on batch_size * accumulation alone, so that 1 x 8, 2 x 4, 4 x 2 and 8 x 1 train alike.
    Rows are shuffled, sorted by length within windows (of WINDOW rows, or of a quarter of all rows if that is less),
    cut into steps, and the steps shuffled; the rows that do not fill a step form a smaller last one. Inside a step
    rows are sorted by length and cut into micro-batches: of `batch_size` rows, or, with `tokens_per_batch`, of as many
    rows as fit with padding (at least one).
    The result is a function of the arguments alone: a run can resume at any step of it.

    passes: consecutive steps that take the same rows.
    max_micro_batches: maximum of the epoch; a step that it cuts keeps the micro-batches before the cut.
    """
    rng = np.random.default_rng([seed, epoch])
    per_step = batch_size * accumulation
    order = rng.permutation(len(lengths))
    full = len(order) // per_step * per_step
    window = max(1, min(WINDOW, full // 4) // per_step) * per_step  # with one window every epoch has the same steps
    steps = []
    for start in range(0, full, window):
        rows = order[start : min(start + window, full)]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        steps += [rows[first : first + per_step] for first in range(0, len(rows), per_step)]
    steps = [steps[index] for index in rng.permutation(len(steps))]
    if full < len(order):
        steps.append(order[full:])
    plan = [micro_batches(rows, lengths, batch_size, tokens_per_batch) for rows in steps for _ in range(passes)]
    return plan if max_micro_batches is None else list(first_micro_batches(plan, max_micro_batches))


def micro_batches(rows: np.ndarray, lengths: np.ndarray, batch_size: int, tokens_per_batch: int | None) -> Step:
    """Rows cut into micro-batches, the longest first, so that memory runs out at the start or never."""
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    if tokens_per_batch is None:
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    cut, start = [], 0
    while start < len(rows):  # the longest row comes first, so it decides how many fit
        count = max(1, tokens_per_batch // int(lengths[rows[start]]))
        cut.append(rows[start : start + count])
        start += count
    return cut


def first_micro_batches(plan: list[Step], limit: int) -> Iterator[Step]:
    for step in plan:
        if limit <= 0:
            return
        yield step[:limit]
        limit -= len(step)


def evaluation_batches(lengths: np.ndarray, batch_size: int) -> Step:
    """All rows in batches by length, the longest first."""
    return micro_batches(np.arange(len(lengths)), lengths, batch_size, None)


def collate(table: TokenizedDataset, rows: np.ndarray, pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels: int64 [B, T], padded on the right; labels are -100 on prompt and padding.

    Labels are found by position, never by id: an end-of-text that is also the padding id is learnt.
    """
    lengths = table.lengths[rows]
    shape = len(rows), int(lengths.max())
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        ids, prompt = table.ids(row), table.prompt_lengths[row]
        input_ids[index, : len(ids)] = ids
        labels[index, prompt : len(ids)] = ids[prompt:]
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels)}


class BatchDataset(Dataset):
    """Collated batches with their `rows`, indexed by arrays of row indices."""

    def __init__(self, table: TokenizedDataset, pad_id: int):
        self.table, self.pad_id = table, pad_id

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {**collate(self.table, rows, self.pad_id), "rows": rows}


def ignore_signals(worker: int) -> None:
    """Terminals and schedulers signal every process: workers ignore it, the main process stops and ends them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def load_batches(
    table: TokenizedDataset, batches: list[np.ndarray], pad_id: int, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The collated batches, in order. Draws nothing from the global random generators."""
    with warnings.catch_warnings():
        # The user chose the number of workers, even if it exceeds the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            BatchDataset(table, pad_id),
            sampler=batches,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            worker_init_fn=ignore_signals,
        )
        collated = iter(loader)
    yield from collated
