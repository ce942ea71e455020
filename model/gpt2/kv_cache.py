"""GPT-2's key/value cache (operations: `model/decoding/kv_cache.py`), over the library's modules and weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.decoding.row_lengths import RowLengths, causal_mask
from model.gpt2.cuda_graph import StepGraphs, round_up
from model.gpt2.packed_forward import activation_of, packed_hidden_states, plan_packing
from model.losses.output_head import autocast_type
from model.transfer import to_device

PREFILL_TOKENS = 8192  # of prompts that are read together: bounds the memory of their activations


class GPT2KVCache:
    """Prompts are read packed, without padding; keys and values are written in place.

    cache [layers, 2, batch_size, heads, max_length, head_dim], in autocast's type if it is on. The weights are cast
    once, so a cache must not outlive one decoding.
    """

    def __init__(self, language_model, batch_size: int, max_length: int):
        self.base = base = language_model.model.base_model
        self.prune_last_block = language_model.prune_last_block
        dtype, device, attn = autocast_type(base.wte.weight), base.wte.weight.device, base.h[0].attn
        self.max_length, on_gpu = max_length, device.type == "cuda"
        # Zeros, because entries that are not written yet are multiplied by 0 and must be finite.
        shape = (len(base.h), 2, batch_size, attn.num_heads, round_up(max_length) if on_gpu else max_length,
                 attn.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self.blocks = [block_weights(block, dtype) for block in base.h]
        self.row_indices = torch.arange(batch_size, device=device)
        self.rows = RowLengths(batch_size, device)
        # On a GPU launching a step's kernels takes longer than running them.
        self.graphs = StepGraphs(batch_size, device) if on_gpu else None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        return torch.cat([self._prefill(group) for group in groups(prompts)])

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        lengths, first, device = [len(prompt) for prompt in prompts], len(self.rows.lengths), self.cache.device
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        ends = torch.arange(len(lengths)) * max(lengths) + torch.tensor(lengths) - 1  # as if rows were padded
        packing = plan_packing(ends, (len(lengths), max(lengths)), truncate=True, device=device)
        packing = packing._replace(tokens=torch.arange(len(tokens), device=device))
        rows = torch.arange(first, first + len(lengths)).repeat_interleave(torch.tensor(lengths))
        rows = to_device(rows, device)

        def store(layer: int, key: Tensor, value: Tensor) -> None:
            self.cache[layer, 0][rows, :, packing.positions] = key.to(self.cache.dtype)
            self.cache[layer, 1][rows, :, packing.positions] = value.to(self.cache.dtype)

        hidden = packed_hidden_states(self.base, to_device(tokens, device), packing, self.prune_last_block, store)
        self.rows.add(lengths)
        return hidden

    def step(self, tokens: Tensor) -> Tensor:
        key_count = self.rows.longest + 1
        if self.graphs is not None:
            hidden = self.graphs.run(self.step_of_all, tokens, key_count)
        else:
            equal = len(set(self.rows.lengths)) == 1  # then no row has keys to hide
            mask = None if equal else self.rows.mask(self.cache.dtype)
            hidden = self._step(tokens, self.rows.positions, key_count, mask)
        self.rows.advance()
        return hidden

    def step_of_all(self, tokens: Tensor, key_count: int) -> Tensor:
        """Hidden states [batch_size, D] of a token in each row, in use or not, with the first `key_count` keys."""
        positions = self.rows.all_positions.clamp(max=self.max_length - 1)  # a free row may have been full
        return self._step(tokens, positions, key_count, causal_mask(positions, key_count, self.cache.dtype))

    def _step(self, tokens: Tensor, positions: Tensor, key_count: int, mask: Tensor | None) -> Tensor:
        count = len(tokens)
        rows = self.row_indices[:count]
        hidden = self.base.wte.weight[tokens] + self.base.wpe.weight[positions]
        for layer, block in enumerate(self.blocks):
            keys, values = self.cache[layer, 0, :count], self.cache[layer, 1, :count]
            heads = linear(block.ln_1(hidden), block.c_attn).view(count, 3, keys.shape[1], -1)
            keys[rows, :, positions], values[rows, :, positions] = heads[:, 1], heads[:, 2]
            mixed = F.scaled_dot_product_attention(
                heads[:, 0, :, None], keys[:, :, :key_count], values[:, :, :key_count], attn_mask=mask,
                scale=block.scale,
            )
            hidden = hidden + linear(mixed.reshape(count, -1), block.c_proj)
            hidden = hidden + linear(block.activation(linear(block.ln_2(hidden), block.c_fc)), block.mlp_proj)
        return self.base.ln_f(hidden)

    def move(self, source: int, target: int) -> None:
        length = self.rows.lengths[source]
        self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]
        self.rows.move(source, target)

    def drop(self) -> None:
        self.rows.drop()

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.close()


Linear = tuple[Tensor, Tensor]  # weight [in, out] and bias [out]


class BlockWeights(NamedTuple):
    """The weights of one block; those of its products in the type of the products."""

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
    linears = [(module.weight.detach().to(dtype), module.bias.detach().to(dtype))
               for module in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)]
    return BlockWeights(block.ln_1, block.ln_2, *linears, activation_of(block), attn.scaling)


def linear(hidden: Tensor, weights: Linear) -> Tensor:
    weight, bias = weights
    return torch.addmm(bias, hidden.to(weight.dtype), weight)


def groups(prompts: list[list[int]]) -> list[list[list[int]]]:
    """Prompts in groups of at most PREFILL_TOKENS tokens, or of one prompt."""
    result: list[list[list[int]]] = []
    size = 0
    for prompt in prompts:
        if not result or size + len(prompt) > PREFILL_TOKENS:
            result.append([])
            size = 0
        result[-1].append(prompt)
        size += len(prompt)
    return result
