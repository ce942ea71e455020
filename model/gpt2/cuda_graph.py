"""A decoding step as a CUDA graph: its kernels are recorded once and replayed, without Python between them."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

KEYS = 64  # one graph serves all lengths up to a multiple of it

# step(tokens [count], keys): hidden states [count, D] of one more token in each slot, looking at the first `keys`
# places of the cache alone. It waits for nothing, and what it reads stays in the same places of memory.
Step = Callable[[Tensor, int], Tensor]


class StepGraphs:
    """Replays a step of all slots at once, of fixed shapes, for any number of rows in the first ones.

    The step is handed in at each call and not kept: kept, slots and graphs would hold each other, and their memory
    would wait for the garbage collector.
    """

    def __init__(self, count: int, device: torch.device):
        self.device = device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # One for all captures: torch ties what libraries work in to the stream, and gives it up with the first graph
        # that is deleted.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, step: Step, tokens: Tensor, longest: int) -> Tensor:
        """Hidden states [n, D] of tokens [n]; longest: keys that the longest row sees."""
        self.tokens[: len(tokens)] = tokens
        keys = rounded(longest)
        if keys not in self.captured:
            self.captured[keys] = self.capture(step, keys)
        graph, hidden = self.captured[keys]
        graph.replay()
        return hidden[: len(tokens)].clone()  # the next replay writes there

    def capture(self, step: Step, keys: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        try:
            return self.record(step, keys)
        except torch.OutOfMemoryError:  # while a graph is recorded, the allocator does not give up what it has cached
            torch.cuda.empty_cache()
            return self.record(step, keys)

    def record(self, step: Step, keys: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        pool = next(iter(self.captured.values()))[0].pool() if self.captured else None
        self.stream.wait_stream(current)
        # Not torch.cuda.graph(), which empties the allocator's cache each time. Only this thread is watched: others pin
        # the memory of the next batches meanwhile.
        with torch.cuda.stream(self.stream):
            step(self.tokens, keys)  # what libraries set up at first use cannot be recorded
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                hidden = step(self.tokens, keys)
            except BaseException:
                with suppress(RuntimeError):  # what went wrong is told by the first error
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        return graph, hidden

    def close(self) -> None:
        """Gives the graphs' memory back, which torch keeps for them alone."""
        if self.captured:
            self.captured.clear()
            torch.cuda.empty_cache()


def rounded(length: int) -> int:
    return -(-length // KEYS) * KEYS
