"""GPT-2's forward pass without work that has no effect: no padding, and the last block only where a label is predicted.

Uses the library's modules and weights, so checkpoints stay standard. The rows' tokens are packed one after another,
[tokens, D]; only attention knows about rows. The last block computes keys and values everywhere, but queries, output
projection and MLP only at the selected positions. Equal to the library's forward pass up to rounding.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Model

from model.gpt2.gelu_linear import gelu_linear
from model.gpt2.row_attention import RowLayout, attention_at_queries, causal_attention, row_layout
from model.losses.output_head import autocast_type
from model.transfer import to_device

KVHook = Callable[[int, Tensor, Tensor], None]  # gets (index of the block, keys [P, heads, head_dim], values likewise)


class Packing(NamedTuple):
    """Which tokens are computed, all int64 on one device.

    tokens [P]: indices into the flattened [B * T]. positions [P]: in their rows. rows: layout of these tokens.
    selected [N]: which of the P are wanted, in row order. queries: their layout.
    """

    tokens: Tensor
    positions: Tensor
    rows: RowLayout
    selected: Tensor
    queries: RowLayout


def plan_packing(index: Tensor, shape: tuple[int, int], truncate: bool, device: torch.device) -> Packing:
    """The packing on a device for the hidden states at `index` [N], on the CPU, of a flattened [B, T] batch.

    truncate: end each row at its last selected position, since no later token can change it, and skip rows without one.
    Otherwise all T tokens of every row are computed.
    """
    rows, length = shape
    counts = torch.bincount(index // length, minlength=rows)
    if truncate:
        lengths = torch.zeros(rows, dtype=torch.int64).scatter_reduce(0, index // length, index % length + 1, "amax")
    else:
        lengths = torch.full((rows,), length)
    kept = torch.arange(length) < lengths[:, None]
    tokens = kept.flatten().nonzero()[:, 0]
    selected = kept.flatten().cumsum(0)[index] - 1
    used = lengths > 0
    tokens, positions, selected = (to_device(index, device) for index in (tokens, tokens % length, selected))
    token_rows, query_rows = (row_layout(sizes[used].tolist(), device) for sizes in (lengths, counts))
    return Packing(tokens, positions, token_rows, selected, query_rows)


def can_pack(model: nn.Module) -> bool:
    """Whether `packed_hidden_states` computes what this model's base model does."""
    base = model.base_model
    return type(base) is GPT2Model and not base.config.add_cross_attention and not base.config.reorder_and_upcast_attn


def packed_hidden_states(
    base: GPT2Model,
    input_ids: Tensor,
    packing: Packing,
    prune_last_block: bool,
    kv_hook: KVHook | None = None,
    embedding_weight: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Final hidden states [N, D] at the selected positions of input_ids [B, T].

    kv_hook: gets the keys and values of all P tokens of every block. embedding_weight: the token embedding's, for a
    sparse gradient; None: the module's own, for a dense one. compiled: compile what lies between the attentions of two
    blocks, once for all blocks and lengths.
    """
    step = compiled_between() if compiled else between_attentions
    tokens = input_ids.flatten()[packing.tokens]
    embedded = base.wte(tokens) if embedding_weight is None else F.embedding(tokens, embedding_weight, sparse=True)
    hidden = base.drop(embedded + base.wpe(packing.positions))
    normed = base.h[0].ln_1(hidden)
    for block, next_block in pairwise(base.h):
        hidden, normed = step(block, next_block, hidden, attention(block.attn, normed, packing.rows, kv_hook))
    last = base.h[-1]
    if not prune_last_block:
        hidden = hidden + last.attn.resid_dropout(last.attn.c_proj(attention(last.attn, normed, packing.rows, kv_hook)))
        return base.ln_f((hidden + feed_forward(last, hidden))[packing.selected])
    hidden = hidden[packing.selected] + last.attn.resid_dropout(
        last.attn.c_proj(attention_at(last.attn, normed, packing, kv_hook)))
    return base.ln_f(hidden + feed_forward(last, hidden))


def between_attentions(block: nn.Module, next_block: nn.Module, hidden: Tensor, attended: Tensor):
    """From a block's input and its attention's output [P, D]: (the next block's input, normed for its attention)."""
    hidden = hidden + block.attn.resid_dropout(block.attn.c_proj(attended))
    hidden = hidden + feed_forward(block, hidden)
    normed = next_block.ln_1(hidden)
    return hidden, normed.to(autocast_type(normed))  # as autocast would for the product that follows


@cache
def compiled_between() -> Callable:
    """Not at import time, since torch.compile imports its compiler, which takes seconds."""
    return torch.compile(between_attentions, dynamic=True)


def attention(attn: nn.Module, normed: Tensor, rows: RowLayout, kv_hook: KVHook | None = None) -> Tensor:
    """Causal attention within each row, before its projection; normed [P, D]."""
    heads = attn.c_attn(normed).unflatten(-1, (3, attn.num_heads, -1))
    if kv_hook is not None:
        kv_hook(attn.layer_idx, *heads.unbind(1)[1:])
    return causal_attention(heads, rows, attn.scaling, dropout_of(attn)).flatten(1)


def attention_at(attn: nn.Module, normed: Tensor, packing: Packing, kv_hook: KVHook | None = None) -> Tensor:
    """Causal attention [N, D] at the selected positions, before its projection; keys and values of all P."""
    width = normed.shape[-1]
    weight, bias = attn.c_attn.weight, attn.c_attn.bias
    query = torch.addmm(bias[:width], normed[packing.selected], weight[:, :width])
    keys_values = torch.addmm(bias[width:], normed, weight[:, width:]).unflatten(-1, (2, attn.num_heads, -1))
    if kv_hook is not None:
        kv_hook(attn.layer_idx, *keys_values.unbind(1))
    return attention_at_queries(
        query.unflatten(-1, (attn.num_heads, -1)), keys_values, packing.rows, packing.queries,
        packing.positions[packing.selected], attn.scaling, dropout_of(attn),
    ).flatten(1)


def dropout_of(attn: nn.Module) -> float:
    return attn.attn_dropout.p if attn.training else 0.0


def feed_forward(block: nn.Module, hidden: Tensor) -> Tensor:
    """The block's MLP of hidden [P, D]."""
    mlp = block.mlp
    inner = mlp.c_fc(block.ln_2(hidden))
    # The compiler decides itself what to recompute in the backward pass.
    if is_gelu(block) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return mlp.dropout(gelu_linear(inner, mlp.c_proj.weight, mlp.c_proj.bias))
    return mlp.dropout(mlp.c_proj(activation_of(block)(inner)))


def activation_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The MLP's activation; GPT-2's own as the fused kernel of the same formula."""
    return partial(F.gelu, approximate="tanh") if is_gelu(block) else block.mlp.act


def is_gelu(block: nn.Module) -> bool:
    return block.attn.config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
