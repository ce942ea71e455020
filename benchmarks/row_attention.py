"""Causal attention within rows of different lengths, forward and backward: the ways to compute it, on a GPU or a CPU.

    python -m benchmarks.row_attention [--device cpu|cuda] [--precision float32|bfloat16] [--heads 12] [--rows 16]
                                       [--shortest 300] [--longest 1023] [--rounds 20]

  row_by_row  one call for each row (model/gpt2/row_attention.py, on a CPU)
  padded      the rows padded for attention alone (model/gpt2/row_attention.py, on a GPU)
  nested      torch's jagged nested tensors, on a GPU
  varlen      torch.nn.attention.varlen, on a GPU in bfloat16 (it knows no dropout)
  operator    torch's private operator beneath it, the same (this one knows dropout)

head_dim is 64. Outputs and gradients are compared first. Variants take turns, the first rounds are dropped.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.decode import spread
from benchmarks.interleaved import (
    add_device_option,
    check_device,
    conditions,
    print_time_ratio,
    print_times,
    take_turns,
)
from model.gpt2.row_attention import RowLayout, causal_attention, padded_index, row_layout
from utils.cli import OneLineParser

HEAD_DIM = 64
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # of the norm
Attention = Callable[[Tensor], Tensor]  # queries, keys and values [P, 3, heads, head_dim] -> [P, heads, head_dim]


def make_variants(lengths: list[int], device: torch.device, precision: str) -> dict[str, Attention]:
    longest, scale = max(lengths), HEAD_DIM**-0.5
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    ends = offsets.int()
    rows, padded_rows = RowLayout(lengths), row_layout(lengths, device)
    if padded_rows.pad_index is None and len(set(lengths)) > 1:  # as on a GPU, for the comparison
        padded_rows = RowLayout(lengths, padded_index(lengths))

    def nested(heads: Tensor) -> Tensor:
        parts = (torch.nested.nested_tensor_from_jagged(part, offsets, min_seqlen=min(lengths), max_seqlen=longest)
                 .transpose(1, 2) for part in heads.unbind(1))
        return F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale).transpose(1, 2).values()

    def varlen(heads: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(*heads.unbind(1), ends, ends, longest, longest, window_size=(-1, 0))

    def operator(heads: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            *heads.unbind(1), ends, ends, longest, longest, 0.0, True, False, scale=scale)[0]

    variants: dict[str, Attention] = {
        "row_by_row": lambda heads: causal_attention(heads, rows, scale, 0.0),
        "padded": lambda heads: causal_attention(heads, padded_rows, scale, 0.0),
    }
    if device.type == "cuda":
        variants["nested"] = nested
    if device.type == "cuda" and precision == "bfloat16":
        variants |= {"varlen": varlen, "operator": operator}
    return variants


def check_equal(name: str, pair: tuple[Tensor, ...], expected: tuple[Tensor, ...], precision: str) -> None:
    """Raises SystemExit where output or gradient are others."""
    errors = [float((found.double() - right.double()).norm() / right.double().norm())
             for found, right in zip(pair, expected, strict=True)]
    if not max(errors) <= TOLERANCES[precision]:
        raise SystemExit(f"{name}: output off by {errors[0]:.1e} of its norm, gradient by {errors[1]:.1e}")
    print(f"{name:<12} output off by {errors[0]:.1e} of its norm, gradient by {errors[1]:.1e}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("python -m benchmarks.row_attention", description=__doc__.split("\n")[0])
    numbers = {"heads": (12, 1), "rows": (16, 2), "shortest": (300, 1), "longest": (1023, 1), "rounds": (20, 5),
               "threads": (torch.get_num_threads(), 1)}
    for name, (default, _) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    add_device_option(parser)
    options = parser.parse_args(argv)
    check_device(parser, options.device)
    for name, (_, least) in numbers.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}: expected at least {least}")
    if options.longest < options.shortest:
        parser.error(f"--longest is {options.longest}: expected at least --shortest, {options.shortest}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.precision)
    lengths = spread(options.shortest, options.longest, options.rows, seed=4)
    torch.manual_seed(0)
    heads = torch.randn(sum(lengths), 3, options.heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(sum(lengths), options.heads, HEAD_DIM, device=device, dtype=dtype)
    print(f"{options.rows} rows of {min(lengths)} to {max(lengths)} tokens, {options.heads} heads of {HEAD_DIM}; "
          f"{options.precision}, {conditions(options.threads, options.device)}")

    def step_of(variant: Attention) -> Callable:
        def step() -> tuple[Tensor, Tensor]:
            heads.grad = None
            output = variant(heads)
            output.backward(grad)
            return output.detach(), heads.grad

        return step

    steps = {name: step_of(variant) for name, variant in make_variants(lengths, device, options.precision).items()}
    expected = steps["row_by_row"]()
    for name, step in steps.items():
        check_equal(name, step(), expected, options.precision)
    seconds = {name: times[2:] for name, times in take_turns(steps, options.rounds, options.device).items()}
    print_times(seconds, {})
    ours = "padded" if options.device == "cuda" else "row_by_row"
    for name in steps:
        if name != ours:
            print_time_ratio(f"{name} / {ours}, ours", seconds[name], seconds[ours])


if __name__ == "__main__":
    main()
