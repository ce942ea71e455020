"""Attention within rows whose tokens are packed one after another, [tokens, heads, head_dim]."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.transfer import to_device

PADDED_ON = ("cuda",)  # device types that attend to padded rows


class RowLayout(NamedTuple):
    """lengths: tokens of each row, in order. pad_index [P] int64: index of each token in the flattened padded rows; if
    None, rows are attended to one by one, without padding."""

    lengths: list[int]
    pad_index: Tensor | None = None

    @property
    def padded_shape(self) -> tuple[int, int]:
        return len(self.lengths), max(self.lengths)


def row_layout(lengths: list[int], device: torch.device) -> RowLayout:
    """The layout that is fastest on a device: on a GPU one launch for all padded rows, on a CPU no padding."""
    if device.type not in PADDED_ON or not lengths:
        return RowLayout(lengths)
    return RowLayout(lengths, to_device(padded_index(lengths), device))


def padded_index(lengths: list[int]) -> Tensor:
    """`pad_index` of a RowLayout, on the CPU."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]


def causal_attention(heads: Tensor, rows: RowLayout, scale: float, dropout: float) -> Tensor:
    """[P, heads, head_dim] of queries, keys and values [P, 3, heads, head_dim]: each token attends to itself and the
    earlier ones of its row."""
    options = {"dropout_p": dropout, "is_causal": True, "scale": scale}
    if len(set(rows.lengths)) == 1:
        batch = (part.transpose(1, 2) for part in heads.unflatten(0, rows.padded_shape).unbind(2))
        return F.scaled_dot_product_attention(*batch, **options).transpose(1, 2).flatten(0, 1)
    if rows.pad_index is not None:
        batch = (part.transpose(1, 2) for part in padded(heads, rows).unbind(2))
        return unpadded(F.scaled_dot_product_attention(*batch, **options).transpose(1, 2), rows)
    by_row = zip(*(part.split(rows.lengths) for part in heads.unbind(1)), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in row), **options)[0].transpose(0, 1)
        for row in by_row
    ])


def attention_at_queries(
    query: Tensor, keys_values: Tensor, rows: RowLayout, queries: RowLayout, positions: Tensor, scale: float,
    dropout: float,
) -> Tensor:
    """[N, heads, head_dim] of queries [N, heads, head_dim] at `positions` [N] of their rows, causal; keys and values
    [P, 2, heads, head_dim].

    queries: layout of the N queries.
    """
    options = {"dropout_p": dropout, "scale": scale}
    if rows.pad_index is not None:
        seen = torch.arange(rows.padded_shape[1], device=query.device) <= padded(positions[:, None], queries)
        batch = (part.transpose(1, 2) for part in (padded(query, queries), *padded(keys_values, rows).unbind(2)))
        mixed = F.scaled_dot_product_attention(*batch, attn_mask=seen[:, None], **options)  # padding sees the first key
        return unpadded(mixed.transpose(1, 2), queries)
    by_row = zip(query.split(queries.lengths), *(part.split(rows.lengths) for part in keys_values.unbind(1)),
                 positions.split(queries.lengths), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in row), **options,
            attn_mask=torch.arange(len(row[1]), device=query.device) <= own[:, None],
        )[0].transpose(0, 1)
        for *row, own in by_row
    ])


def padded(tokens: Tensor, rows: RowLayout) -> Tensor:
    """Tokens [P, ...] as [rows, longest, ...], with zeros behind each row's end."""
    return Padded.apply(tokens, rows.pad_index, rows.padded_shape[0] * rows.padded_shape[1]).unflatten(
        0, rows.padded_shape)


def unpadded(batch: Tensor, rows: RowLayout) -> Tensor:
    """The tokens [P, ...] of a padded batch [rows, longest, ...]."""
    return Unpadded.apply(batch.flatten(0, 1), rows.pad_index)


class Padded(torch.autograd.Function):
    """No index occurs twice, so both directions are copies; autograd's own backward pass would accumulate."""

    @staticmethod
    def forward(ctx, tokens: Tensor, pad_index: Tensor, size: int):
        ctx.save_for_backward(pad_index)
        return spread(tokens, pad_index, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad[ctx.saved_tensors[0]], None, None


class Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch: Tensor, pad_index: Tensor):
        ctx.save_for_backward(pad_index)
        ctx.size = len(batch)
        return batch[pad_index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return spread(grad, ctx.saved_tensors[0], ctx.size), None


def spread(tokens: Tensor, pad_index: Tensor, size: int) -> Tensor:
    """[size, ...] with the tokens at their indices and zeros elsewhere."""
    result = tokens.new_zeros(size, *tokens.shape[1:])
    result[pad_index] = tokens
    return result
