"""The distillation loss head alone: hidden states and heads to loss and gradients, ours against the peers.

    python -m benchmarks.loss_head [--size small|real] [--positions 90] [--chunk_size 128] [--device cpu|cuda]
                                   [--threads 1] [--variants plain ours ...] [--rounds 6] [--skip_memory]

Jensen-Shannon divergence (beta 1/2, temperature 1, no cross-entropy) per label token, forward and backward, with the
gradients of the student's hidden states and head; random weights, float32. A batch has --total positions, of which
--positions predict a label. All variants start from the same hidden states of all positions:
  plain           logits of all positions in both heads, then the label positions are picked
  trl_gkd         the same with the loss of TRL's GKDTrainer
  trl_chunked     TRL's ChunkedDivergenceFunction on the gathered label positions
  liger           Liger's fused linear JSD on the gathered label positions, without torch.compile
  liger_compiled  the same with torch.compile, which is its default; compiling is not timed
  ours            model/losses/vocabulary_loss.py on the gathered label positions
Loss and gradients are compared first. Variants take turns, the first round is dropped. Peak memory is measured in a
process of its own for each variant, with the default allocator, gradients included; on a GPU it is
what torch allocates. glibc's default allocator maps large temporaries again in each step; so that this does not slow
the peers, time with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interleaved import (
    Step,
    Target,
    add_common_options,
    check_device,
    choose_variants,
    compare,
    conditions,
    cuda_peak_of_each,
    memory_of_each,
    peak_above_rest,
    print_memory_ratio,
    print_time_ratio,
    print_times,
    take_turns,
)
from model.label_shift import IGNORED
from model.losses.divergences import choose_divergence
from model.losses.output_head import OutputHead
from model.losses.vocabulary_loss import TeacherHidden, vocabulary_loss
from utils.cli import OneLineParser, quiet_libraries

SIZES = {"tiny": (16, 24, 211), "small": (256, 384, 50257), "real": (768, 1024, 50257)}  # widths, vocabulary
PACKAGES = {"plain": None, "trl_gkd": "trl", "trl_chunked": "trl", "liger": "liger_kernel",
            "liger_compiled": "liger_kernel", "ours": None}
TARGETS = {"trl_chunked": Target(2.2, 2.5), "liger": Target(1.15, 1.3), "liger_compiled": Target(1.15, 1.3)}


class Inputs(NamedTuple):
    """hidden [T, D] and weight [V, D] of the student take gradients; index [N]: positions that predict a label.

    labels [T]: -100 but at `index`. teacher_hidden [T, Dt], teacher_weight [V, Dt].
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    index: Tensor
    labels: Tensor


def make_inputs(size: str, total: int, positions: int, device: str = "cpu") -> Inputs:
    """Hidden states as a final layer norm leaves them, weights as GPT-2's are drawn; random label positions."""
    width, teacher_width, vocabulary = SIZES[size]
    draw = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(total, size, generator=draw) for size in (width, teacher_width))
    weight, teacher_weight = (torch.randn(vocabulary, size, generator=draw) * 0.02 for size in (width, teacher_width))
    index = torch.randperm(total, generator=draw)[:positions].sort().values
    labels = torch.full((total,), IGNORED)
    labels[index] = torch.randint(vocabulary, (positions,), generator=draw)
    inputs = Inputs(*(tensor.to(device) for tensor in (hidden, weight, teacher_hidden, teacher_weight, index, labels)))
    inputs.hidden.requires_grad_()
    inputs.weight.requires_grad_()
    return inputs


# -- variants: the mean divergence over the label positions --------------------------------------------------------


def plain(inputs: Inputs) -> Tensor:
    log_q, log_p = (F.log_softmax(logits, -1) for logits in full_logits(inputs))
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    values = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
    return values[inputs.labels != IGNORED].sum() / len(inputs.index)


def full_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
    return inputs.hidden @ inputs.weight.T, teacher


def trl_gkd(inputs: Inputs) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = full_logits(inputs)
    return GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], inputs.labels[None], beta=0.5, num_items_in_batch=len(inputs.index)
    )


def trl_chunked(inputs: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    values, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden[inputs.index], inputs.weight, None, inputs.teacher_hidden[inputs.index], inputs.teacher_weight,
        None, 0.5, 1.0,
    )
    return values.sum() / len(inputs.index)


def liger(inputs: Inputs, compiled: bool = False) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    return loss(inputs.hidden[inputs.index], inputs.weight, inputs.teacher_hidden[inputs.index], inputs.teacher_weight,
                inputs.labels[inputs.index])


def ours(inputs: Inputs, chunk_size: int) -> Tensor:
    teacher = TeacherHidden(inputs.teacher_hidden[inputs.index], OutputHead(inputs.teacher_weight))
    loss = vocabulary_loss(
        inputs.hidden[inputs.index], OutputHead(inputs.weight), inputs.labels[inputs.index], teacher=teacher,
        divergence=choose_divergence("JS"), kd_weight=1.0, chunk_size=chunk_size,
    )
    return loss.loss_sum / len(inputs.index)


def make_step(variant: str, inputs: Inputs, chunk_size: int) -> Step:
    losses = {
        "plain": plain, "trl_gkd": trl_gkd, "trl_chunked": trl_chunked, "liger": liger,
        "liger_compiled": lambda inputs: liger(inputs, compiled=True), "ours": lambda inputs: ours(inputs, chunk_size),
    }

    def step() -> tuple[float, list[Tensor]]:
        inputs.hidden.grad = inputs.weight.grad = None
        loss = losses[variant](inputs)
        loss.backward()
        return loss.item(), [inputs.hidden.grad, inputs.weight.grad]

    return step


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("python -m benchmarks.loss_head", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="real")
    for name, default in (("positions", 90), ("total", 1024), ("chunk_size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    add_common_options(parser, list(PACKAGES))
    options = parser.parse_args(argv)
    check_device(parser, options.device)
    if not 1 <= options.positions <= options.total:
        parser.error(f"--positions is {options.positions}: expected 1 to {options.total} (--total)")
    if options.chunk_size < 1 or options.rounds < 2 or options.threads < 1:
        parser.error("--chunk_size and --threads have to be at least 1, --rounds at least 2")
    options.variants = choose_variants(parser, options.variants, PACKAGES)
    return options


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    quiet_libraries()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(options.threads)
    if variant := options.memory_of:
        make_step(variant, make_inputs("tiny", 8, 4), options.chunk_size)()  # what it imports late is not its memory
        print(peak_above_rest(make_step(variant, make_inputs(options.size, options.total, options.positions),
                                        options.chunk_size)))
        return
    on_cpu = options.device == "cpu"
    measured = options.variants if on_cpu and not options.skip_memory else ()
    memory = memory_of_each("benchmarks.loss_head", argv, measured)
    inputs = make_inputs(options.size, options.total, options.positions, options.device)
    print(f"{options.size}: {options.positions} of {options.total} positions, widths and vocabulary "
          f"{SIZES[options.size]}, chunks of {options.chunk_size}, {conditions(options.threads, options.device)}")
    steps = {variant: make_step(variant, inputs, options.chunk_size) for variant in options.variants}
    reference = make_step("plain", inputs, options.chunk_size)()
    for variant, step in steps.items():
        compare(variant, step(), reference, "float32")
    if not on_cpu and not options.skip_memory:
        memory = cuda_peak_of_each(steps, [inputs.hidden, inputs.weight])
    seconds = take_turns(steps, options.rounds, options.device)
    print_times(seconds, memory)
    if "ours" not in seconds:
        return
    for variant in options.variants:
        if variant != "ours":
            target = TARGETS.get(variant) if options.size == "real" and on_cpu else None
            print_time_ratio(f"{variant} / ours", seconds[variant], seconds["ours"], target)
            if memory:
                print_memory_ratio(f"ours / {variant}", memory["ours"], memory[variant])


if __name__ == "__main__":
    main()
