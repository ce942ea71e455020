"""How many tokens have been read in each slot."""

import torch
from torch import Tensor


class SlotLengths:
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

    def visible(self, window: int | None = None) -> Tensor:
        """Which keys each row's next token sees, bool [n, 1, 1, longest + 1]: its own and earlier, within a window."""
        keys, own = torch.arange(self.longest + 1, device=self._all.device), self.places[:, None]
        seen = keys <= own
        if window is not None:
            seen &= keys > own - window
        return seen[:, None, None]

    def mask(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """`visible` as what is added to the scores: 0 or -inf. Unlike bool, right for eager attention, which adds."""
        seen = self.visible(window)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def add(self, sizes: list[int]) -> None:
        start = len(self.sizes)
        self.sizes += sizes
        self._all[start : len(self.sizes)] = torch.tensor(sizes, device=self._all.device)

    def advance(self) -> None:
        self.places.add_(1)
        self.sizes = [size + 1 for size in self.sizes]

    def move(self, source: int, target: int) -> None:
        self._all[target] = self._all[source]
        self.sizes[target] = self.sizes[source]

    def drop(self) -> None:
        self.sizes.pop()
