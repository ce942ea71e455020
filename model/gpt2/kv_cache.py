"""GPT-2's keys and values in slots (see `model/decoding/kv_cache.py`), over the library's modules and weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.decoding.row_lengths import RowLengths, additive, seen_keys
from model.gpt2.cuda_graph import StepGraphs, rounded
from model.gpt2.packed_forward import activation_of, packed_hidden_states, plan_packing
from model.losses.output_head import autocast_type
from model.transfer import to_device

PREFILL_TOKENS = 8192  # of prompts that are read together: bounds the memory of their activations


class GPT2KVCache:
    """Prompts are read packed, without padding; keys and values are written in place.

    cache [layers, 2, slots, heads, room, head_dim], in autocast's type where it is on. The weights are cast once, so
    slots live no longer than one decoding.
    """

    def __init__(self, language_model, count: int, room: int):
        self.base = base = language_model.model.base_model
        self.prune_last_block = language_model.prune_last_block
        dtype, device, attn = autocast_type(base.wte.weight), base.wte.weight.device, base.h[0].attn
        self.room, on_gpu = room, device.type == "cuda"
        # Zeros, because what is not written yet is multiplied by 0, and must be finite.
        shape = len(base.h), 2, count, attn.num_heads, rounded(room) if on_gpu else room, attn.head_dim
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.blocks = [block_weights(block, dtype) for block in base.h]
        self.rows = torch.arange(count, device=device)
        self.lengths = RowLengths(count, device)
        # There the launches of a step take longer than its work.
        self.graphs = StepGraphs(count, device) if on_gpu else None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        return torch.cat([self._prefill(group) for group in groups(prompts)])

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        sizes, first, device = [len(prompt) for prompt in prompts], len(self.lengths.sizes), self.cache.device
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        padded = torch.arange(len(sizes)) * max(sizes) + torch.tensor(sizes) - 1  # the ends, as if rows were padded
        packing = plan_packing(padded, (len(sizes), max(sizes)), cut=True, device=device)
        packing = packing._replace(tokens=torch.arange(len(tokens), device=device))

        slots = torch.arange(first, first + len(sizes)).repeat_interleave(torch.tensor(sizes))
        slots = to_device(slots, device)

        def keep(layer: int, key: Tensor, value: Tensor) -> None:
            for kind, each in enumerate((key, value)):
                self.cache[layer, kind][slots, :, packing.positions] = each.to(self.cache.dtype)

        hidden = packed_hidden_states(self.base, to_device(tokens, device), packing, self.prune_last_block, keep)
        self.lengths.add(sizes)
        return hidden

    def step(self, tokens: Tensor) -> Tensor:
        longest = self.lengths.longest + 1
        if self.graphs is not None:
            hidden = self.graphs.run(self.step_of_all, tokens, longest)
        else:
            hidden = self._step(tokens, self.lengths.places, longest, self._mask())
        self.lengths.advance()
        return hidden

    def step_of_all(self, tokens: Tensor, keys: int) -> Tensor:
        """Hidden states [count, D] of a token in each slot, in use or not, looking at the first `keys` places."""
        places = self.lengths.of_all.clamp(max=self.room - 1)  # in a free slot a row may have used all its room
        return self._step(tokens, places, keys, additive(seen_keys(places, keys), self.cache.dtype))

    def _step(self, tokens: Tensor, places: Tensor, longest: int, mask: Tensor | None) -> Tensor:
        count = len(tokens)
        rows = self.rows[:count]
        hidden = self.base.wte.weight[tokens] + self.base.wpe.weight[places]
        for layer, block in enumerate(self.blocks):
            keys, values = self.cache[layer, 0, :count], self.cache[layer, 1, :count]
            heads = linear(block.ln_1(hidden), block.c_attn).view(count, 3, keys.shape[1], -1)
            keys[rows, :, places], values[rows, :, places] = heads[:, 1], heads[:, 2]
            mixed = F.scaled_dot_product_attention(
                heads[:, 0, :, None], keys[:, :, :longest], values[:, :, :longest], attn_mask=mask, scale=block.scale
            )
            hidden = hidden + linear(mixed.reshape(count, -1), block.c_proj)
            hidden = hidden + linear(block.activation(linear(block.ln_2(hidden), block.c_fc)), block.mlp_proj)
        return self.base.ln_f(hidden)

    def _mask(self) -> Tensor | None:
        """What each row sees, [n, 1, 1, longest + 1] to be added to the scores; None where all see the same."""
        if len(set(self.lengths.sizes)) == 1:
            return None
        return self.lengths.mask(self.cache.dtype)

    def move(self, source: int, target: int) -> None:
        size = self.lengths.sizes[source]
        self.cache[:, :, target, :, :size] = self.cache[:, :, source, :, :size]
        self.lengths.move(source, target)

    def drop(self) -> None:
        self.lengths.drop()

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()


Linear = tuple[Tensor, Tensor]  # weight [in, out] and bias [out]


class BlockWeights(NamedTuple):
    """What one block computes with; the products' weights in their type."""

    ln_1: nn.Module
    ln_2: nn.Module
    c_attn: Linear
    c_proj: Linear
    c_fc: Linear
    mlp_proj: Linear
    activation: Callable[[Tensor], Tensor]
    scale: float


def block_weights(block: nn.Module, dtype: torch.dtype) -> BlockWeights:
    attn, mlp = block.attn, block.mlp
    linears = [(each.weight.detach().to(dtype), each.bias.detach().to(dtype))
               for each in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)]
    return BlockWeights(block.ln_1, block.ln_2, *linears, activation_of(block), attn.scaling)


def linear(hidden: Tensor, weights: Linear) -> Tensor:
    weight, bias = weights
    return torch.addmm(bias, hidden.to(weight.dtype), weight)


def groups(prompts: list[list[int]]) -> list[list[list[int]]]:
    """Prompts in groups of at most PREFILL_TOKENS tokens, or of one prompt."""
    cut: list[list[list[int]]] = []
    size = 0
    for prompt in prompts:
        if not cut or size + len(prompt) > PREFILL_TOKENS:
            cut.append([])
            size = 0
        cut[-1].append(prompt)
        size += len(prompt)
    return cut
