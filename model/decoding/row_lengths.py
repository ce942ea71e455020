"""Number of cached tokens of rows that are decoded together, and the attention masks that follow from them."""

import torch
from torch import Tensor

from model.transfer import to_device


class RowLengths:
    """Number of cached tokens of each row in use: `lengths` on the CPU, `positions` on the device."""

    def __init__(self, batch_size: int, device: torch.device):
        self.lengths: list[int] = []
        # Of all rows, int64 [batch_size]; free rows keep the number they had.
        self.all_positions = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def positions(self) -> Tensor:
        """Position of each row's next token, int64 [n]; a view that `advance` changes."""
        return self.all_positions[: len(self.lengths)]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Mask [n, 1, 1, longest + 1] of the keys that each row's next token sees: itself and earlier ones, within a
        window. To be added to the scores, since eager attention adds its mask."""
        return causal_mask(self.positions, self.longest + 1, dtype, window)

    def add(self, lengths: list[int]) -> None:
        start = len(self.lengths)
        self.lengths += lengths
        self.all_positions[start : len(self.lengths)] = to_device(torch.tensor(lengths), self.all_positions.device)

    def advance(self) -> None:
        self.positions.add_(1)
        self.lengths = [length + 1 for length in self.lengths]

    def move(self, source: int, target: int) -> None:
        self.all_positions[target] = self.all_positions[source]
        self.lengths[target] = self.lengths[source]

    def drop(self) -> None:
        self.lengths.pop()


def causal_mask(positions: Tensor, key_count: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Mask [n, 1, 1, key_count] for tokens at positions [n]: 0 where a key is seen, else -inf."""
    keys, own = torch.arange(key_count, device=positions.device), positions[:, None]
    hidden = keys > own
    if window is not None:
        hidden |= keys <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]
