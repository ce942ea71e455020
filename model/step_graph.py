"""A decoding step as a CUDA graph: its kernels are recorded once and replayed, without Python between them."""

from collections.abc import Callable

import torch
from torch import Tensor

KEYS = 64  # one graph serves all lengths up to a multiple of it


class StepGraphs:
    """Replays `step`, of all slots at once and of fixed shapes, for any number of rows in the first ones.

    step(tokens [count], keys): hidden states [count, D] of one more token in each slot, looking at the first `keys`
    places of the cache alone. It must wait for nothing, and leave what it reads in the same places of memory.
    """

    def __init__(self, step: Callable[[Tensor, int], Tensor], count: int, device: torch.device):
        self.step, self.device = step, device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = None

    def run(self, tokens: Tensor, longest: int) -> Tensor:
        """Hidden states [n, D] of tokens [n]; longest: keys that the longest row sees."""
        self.tokens[: len(tokens)] = tokens
        keys = rounded(longest)
        if keys not in self.captured:
            self.captured[keys] = self.capture(keys)
        graph, hidden = self.captured[keys]
        graph.replay()
        return hidden[: len(tokens)].clone()  # the next replay writes there

    def capture(self, keys: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        # Not torch.cuda.graph(), which empties the allocator's cache each time. Only this thread is watched: others pin
        # the memory of the next batches meanwhile.
        with torch.cuda.stream(stream):
            self.step(self.tokens, keys)  # what libraries set up at first use cannot be recorded
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                hidden = self.step(self.tokens, keys)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        self.pool = graph.pool()
        return graph, hidden


def rounded(length: int) -> int:
    return -(-length // KEYS) * KEYS
