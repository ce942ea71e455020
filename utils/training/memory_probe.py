"""How many rows fit into a GPU's memory, found by real optimizer steps on the longest rows."""

import gc
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch

from data.batches import load_batches
from data.tokenized import TokenizedDataset
from model.objective import Objective
from utils.errors import TrainingError
from utils.training.distributed import DistributedContext
from utils.training.out_of_memory import is_out_of_memory
from utils.training.step import optimizer_step


class MemoryProbe:
    """Tries optimizer steps of an objective with learning rate 0: the weights do not change.

    rows_per_step: the rows of an optimizer step in training.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, table: TokenizedDataset,
        context: DistributedContext, rows_per_step: int,
    ):
        self.objective, self.optimizer, self.table, self.context = objective, optimizer, table, context
        self.rows_per_step = rows_per_step
        self.longest_first = np.argsort(-table.lengths, kind="stable")
        objective.train()

    def fits(self, rows: int) -> bool:
        """Whether an optimizer step in micro-batches of the `rows` longest rows fits into memory.

        Only two of its micro-batches are computed: the second one meets the gradients of the first. The others are
        passed in as well, since an on-policy step samples for all its rows at once.
        """
        try:
            if not self.optimizer.state:
                self.step([self.longest_first[-1:]])  # so that the moments exist during the step that counts
            step_rows = np.resize(self.longest_first[:rows], max(2 * rows, self.rows_per_step))
            self.step([step_rows[start : start + rows] for start in range(0, len(step_rows), rows)])
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except clause: no traceback holds the tensors of the failed step any more.
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def step(self, batches: list[np.ndarray]) -> None:
        pad_id = self.objective.language_model.tokenizer.pad_token_id
        steps = self.objective.iter_steps(self.table, load_batches(self.table, batches, pad_id), [len(batches)])
        tokens = int(self.table.label_counts[np.concatenate(batches[:2])].sum())
        metrics = optimizer_step(self.objective, islice(next(steps), 2), self.optimizer, self.context,
                                 label_tokens=tokens, learning_rate=0.0)
        if metrics.skipped:
            raise TrainingError(f"a step on the longest rows has loss {metrics.losses['loss']} and gradient norm "
                                f"{metrics.grad_norm}: look at these rows, or set trainer_kwargs.precision to float32")


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size from 1 to `limit` that fits, 0 if none does: doubled until one does not fit, then bisected."""
    fitting, failing = 0, limit + 1
    while failing - fitting > 1:
        size = min(max(1, 2 * fitting), limit) if failing > limit else (fitting + failing) // 2
        if fits(size):
            fitting = size
        else:
            failing = size
    return fitting
