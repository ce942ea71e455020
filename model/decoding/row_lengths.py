"""How many tokens have been read in each slot."""

import torch
from torch import Tensor

from model.transfer import to_device


class RowLengths:
    """Tokens of each slot in use (always the first ones), on the CPU (`sizes`) and on the device (`places`)."""

    def __init__(self, count: int, device: torch.device):
        self.sizes: list[int] = []
        self._all = torch.zeros(count, dtype=torch.int64, device=device)

    @property
    def places(self) -> Tensor:
        """Where each row's next token goes, int64 [n]; a view that `advance` changes."""
        return self._all[: len(self.sizes)]

    @property
    def longest(self) -> int:
        return max(self.sizes)

    @property
    def of_all(self) -> Tensor:
        """`places` of all slots, int64 [count]; those of the free ones are what they were."""
        return self._all

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Which keys each row's next token sees, [n, 1, 1, longest + 1]: its own and earlier, within a window.

        It is to be added to the scores: 0 or -inf. Unlike bool, right for eager attention, which adds.
        """
        return additive(seen_keys(self.places, self.longest + 1, window), dtype)

    def add(self, sizes: list[int]) -> None:
        start = len(self.sizes)
        self.sizes += sizes
        self._all[start : len(self.sizes)] = to_device(torch.tensor(sizes), self._all.device)

    def advance(self) -> None:
        self.places.add_(1)
        self.sizes = [size + 1 for size in self.sizes]

    def move(self, source: int, target: int) -> None:
        self._all[target] = self._all[source]
        self.sizes[target] = self.sizes[source]

    def drop(self) -> None:
        self.sizes.pop()


def seen_keys(places: Tensor, count: int, window: int | None = None) -> Tensor:
    """Which of the first `count` keys tokens at places [n] see: bool [n, 1, 1, count]."""
    keys, own = torch.arange(count, device=places.device), places[:, None]
    seen = keys <= own
    if window is not None:
        seen &= keys > own - window
    return seen[:, None, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
