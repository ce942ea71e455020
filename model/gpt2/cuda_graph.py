"""A decoding step as a CUDA graph: its kernels are recorded once and replayed, without Python between them."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

KEYS = 64  # one graph serves all lengths up to a multiple of this number

# step(tokens [batch_size], key_count): hidden states [batch_size, D] of one more token in each row, with the first
# `key_count` keys of the cache. It waits for nothing, and all it reads stays at the same addresses.
Step = Callable[[Tensor, int], Tensor]


class StepGraphs:
    """Replays a step of all rows of a cache at once, with fixed shapes, however many of them are in use.

    The step is an argument of each call and not stored: otherwise cache and graphs would refer to each other, and their
    memory would wait for the garbage collector.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.device = device
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # One stream for all captures: torch ties the libraries' workspaces to it, and frees them with the first graph
        # that is deleted.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, step: Step, tokens: Tensor, longest: int) -> Tensor:
        """Hidden states [n, D] of tokens [n]; longest: number of keys that the longest row sees."""
        self.tokens[: len(tokens)] = tokens
        key_count = round_up(longest)
        if key_count not in self.captured:
            self.captured[key_count] = self.capture(step, key_count)
        graph, hidden = self.captured[key_count]
        graph.replay()
        return hidden[: len(tokens)].clone()  # the next replay overwrites `hidden`

    def capture(self, step: Step, key_count: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        try:
            return self.record(step, key_count)
        except torch.OutOfMemoryError:  # during a capture the allocator does not free its cached blocks
            torch.cuda.empty_cache()
            return self.record(step, key_count)

    def record(self, step: Step, key_count: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        pool = next(iter(self.captured.values()))[0].pool() if self.captured else None
        self.stream.wait_stream(current)
        # Not torch.cuda.graph(), which empties the allocator's cache each time. "thread_local", because other threads
        # pin the memory of the next batches meanwhile.
        with torch.cuda.stream(self.stream):
            step(self.tokens, key_count)  # what libraries set up at their first use cannot be captured
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                hidden = step(self.tokens, key_count)
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one to report
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        return graph, hidden

    def close(self) -> None:
        """Free the graphs' memory, which torch reserves for them."""
        if self.captured:
            self.captured.clear()
            torch.cuda.empty_cache()


def round_up(length: int) -> int:
    return -(-length // KEYS) * KEYS
