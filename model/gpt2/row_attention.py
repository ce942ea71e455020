"""Attention within rows whose tokens are laid one after the other, [tokens, heads, head_dim]."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.transfer import to_device

PADDED_ON = ("cuda",)  # types of devices


class Rows(NamedTuple):
    """lengths: tokens of each row, in order. places [P] int64: where each token lies in rows padded to the longest,
    flattened; None: rows are not padded, but attended to one by one."""

    lengths: list[int]
    places: Tensor | None = None

    @property
    def padded_shape(self) -> tuple[int, int]:
        return len(self.lengths), max(self.lengths)


def place_rows(lengths: list[int], device: torch.device) -> Rows:
    """Rows as attention wants them on a device.

    On a GPU one launch for all rows takes less time than one for each. On a CPU padding costs what it computes.
    """
    if device.type not in PADDED_ON or not lengths:
        return Rows(lengths)
    return Rows(lengths, to_device(padded_places(lengths), device))


def padded_places(lengths: list[int]) -> Tensor:
    """`places` of Rows, on the CPU."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]


def causal_attention(heads: Tensor, rows: Rows, scale: float, dropout: float) -> Tensor:
    """[P, heads, head_dim] of queries, keys and values [P, 3, heads, head_dim]: each token attends to itself and the
    earlier ones of its row."""
    options = {"dropout_p": dropout, "is_causal": True, "scale": scale}
    if len(set(rows.lengths)) == 1:
        batch = (each.transpose(1, 2) for each in heads.unflatten(0, rows.padded_shape).unbind(2))
        return F.scaled_dot_product_attention(*batch, **options).transpose(1, 2).flatten(0, 1)
    if rows.places is not None:
        batch = (each.transpose(1, 2) for each in padded(heads, rows).unbind(2))
        return unpadded(F.scaled_dot_product_attention(*batch, **options).transpose(1, 2), rows)
    parts = zip(*(each.split(rows.lengths) for each in heads.unbind(1)), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(*(each.transpose(0, 1)[None] for each in part), **options)[0].transpose(0, 1)
        for part in parts
    ])


def attention_of_some(
    query: Tensor, keys_values: Tensor, rows: Rows, queries: Rows, positions: Tensor, scale: float, dropout: float,
) -> Tensor:
    """[N, heads, head_dim] of queries [N, heads, head_dim] at `positions` [N] of their rows, causal; keys and values
    [P, 2, heads, head_dim].

    queries: how many of each row, in order.
    """
    options = {"dropout_p": dropout, "scale": scale}
    if rows.places is not None:
        seen = torch.arange(rows.padded_shape[1], device=query.device) <= padded(positions[:, None], queries)
        batch = (each.transpose(1, 2) for each in (padded(query, queries), *padded(keys_values, rows).unbind(2)))
        mixed = F.scaled_dot_product_attention(*batch, attn_mask=seen[:, None], **options)  # padding sees the first key
        return unpadded(mixed.transpose(1, 2), queries)
    parts = zip(query.split(queries.lengths), *(each.split(rows.lengths) for each in keys_values.unbind(1)),
                positions.split(queries.lengths), strict=True)
    return torch.cat([
        F.scaled_dot_product_attention(
            *(each.transpose(0, 1)[None] for each in part), **options,
            attn_mask=torch.arange(len(part[1]), device=query.device) <= places[:, None],
        )[0].transpose(0, 1)
        for *part, places in parts
    ])


def padded(tokens: Tensor, rows: Rows) -> Tensor:
    """Tokens [P, ...] as [rows, longest, ...], zeros behind each row's end."""
    return Padded.apply(tokens, rows.places, rows.padded_shape[0] * rows.padded_shape[1]).unflatten(
        0, rows.padded_shape)


def unpadded(batch: Tensor, rows: Rows) -> Tensor:
    """The tokens [P, ...] of a padded batch [rows, longest, ...]."""
    return Unpadded.apply(batch.flatten(0, 1), rows.places)


class Padded(torch.autograd.Function):
    """No place is taken twice, so both directions are copies; autograd's own backward pass would add up."""

    @staticmethod
    def forward(ctx, tokens: Tensor, places: Tensor, size: int):
        ctx.save_for_backward(places)
        return spread(tokens, places, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad[ctx.saved_tensors[0]], None, None


class Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch: Tensor, places: Tensor):
        ctx.save_for_backward(places)
        ctx.size = len(batch)
        return batch[places]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return spread(grad, ctx.saved_tensors[0], ctx.size), None


def spread(tokens: Tensor, places: Tensor, size: int) -> Tensor:
    """[size, ...] with the tokens at their places and zeros elsewhere."""
    result = tokens.new_zeros(size, *tokens.shape[1:])
    result[places] = tokens
    return result
