"""A distillation step, teacher's forward and student's forward and backward: ours against full logits and TRL's GKD.

    python -m benchmarks.kd_step [--size small|real] [--batch 2] [--length 384] [--labels 74] [--lengths full|real]
                                 [--precision float32|bfloat16] [--peer_precision float32|bfloat16] [--chunk_size 128]
                                 [--device cpu|cuda] [--threads 1] [--variants plain packed ...] [--rounds 6]
                                 [--skip_memory] [--compile]

Random GPT-2s (real: gpt2-medium teaches gpt2), no dropout, Jensen-Shannon divergence (beta 1/2, temperature 1, no
cross-entropy), mean per label token, the same weights and rows everywhere. No optimizer in any variant:
  plain     logits of all positions of both models, then the label positions are picked
  trl_gkd   `training_step` of TRL's GKDTrainer with lmbda 0 (what runs between its on_step_begin and the optimizer)
  gathered  ours, logits at label positions alone
  packed    ours as it trains: also no padding, and the last block only where it is needed
  cached    packed, with the teacher's hidden states given
--lengths full: one micro-batch of rows of --length tokens. --lengths real: --micro_batches of rows of different length
(even steps up to --length, chosen so that random batches hold 25 % padding); the peers get random batches, ours get the
same rows sorted by length, and the gradients of all micro-batches add up.
--precision is that of ours, --peer_precision that of plain and trl_gkd (the same unless given); bfloat16 is autocast.
--device cuda: also the TFLOP/s of each variant, counted from the shapes that it runs (forward passes, and twice the
student's for its backward pass; causal attention counts what is seen alone), as a share of a large bfloat16 product's.

Loss and gradients are compared first, with full logits in float32. Variants take turns, the first round is dropped.
Peak memory is measured in a process of its own for each variant, with the default allocator, gradients included; on a
GPU it is what torch allocates. Large temporaries are mapped again in each step by glibc's default allocator; so that
this does not slow the peers, time with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.flops import body_flops, head_flops, measured_peak
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
from benchmarks.kd_work import SIZES, Batch, Work, make_models, make_work, padding, row_lengths
from model.label_shift import IGNORED
from model.language_model import LanguageModel
from model.teacher import Teacher
from model.teacher_student import TeacherStudent
from utils.cli import OneLineParser, quiet_libraries
from utils.training.distributed import computes_bfloat16

PACKAGES = {"plain": None, "trl_gkd": "trl", "gathered": None, "packed": None, "cached": None}
PEERS = ("plain", "trl_gkd")
MOST_MEMORY = Target(1 / 5, 1 / 6, at_most=True)


# -- variants ------------------------------------------------------------------------------------------------------


def autocast(precision: str, device: str):
    return nullcontext() if precision == "float32" else torch.autocast(device, torch.bfloat16)


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def plain_step(teacher: LanguageModel, student: LanguageModel, work: Work, precision: str) -> tuple[float, list]:
    student.zero_grad(set_to_none=True)
    total, device = 0.0, student.device
    for batch in (on_device(collated, device) for collated in work.of_peers):
        ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        with autocast(precision, device.type):
            with torch.no_grad():
                teacher_logits = teacher.model(**ids).logits
            logits = student.model(**ids).logits
        log_p, log_q = (F.log_softmax(values[:, :-1].float(), -1) for values in (teacher_logits, logits))
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        values = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
        loss = values[batch["labels"][:, 1:] != IGNORED].sum() / work.tokens
        loss.backward()
        total += loss.item()
    return total, [parameter.grad for parameter in student.parameters()]


def gkd_step(size: str, work: Work, precision: str, device: str) -> tuple[Step, list[Tensor]]:
    """A step of a GKDTrainer on models of its own, since it changes their forward methods; and its parameters."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = make_models(size, device)
    folder = tempfile.TemporaryDirectory()
    settings = GKDConfig(
        output_dir=folder.name, lmbda=0.0, beta=0.5, bf16=precision == "bfloat16", use_cpu=device == "cpu",
        report_to="none", gradient_checkpointing=False,
    )
    trainer = GKDTrainer(
        student.model, teacher.model, settings, data_collator=list, train_dataset=Dataset.from_dict({"row": [0]}),
        processing_class=student.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # its loss is divided by the label tokens already
    prepared = trainer.accelerator.prepare_model(trainer.model)
    parameters = list(prepared.parameters())

    def step() -> tuple[float, list[Tensor]]:
        prepared.zero_grad(set_to_none=True)
        losses = [trainer.training_step(prepared, dict(batch), work.tokens) for batch in work.of_peers]
        return sum(loss.item() for loss in losses), [parameter.grad for parameter in parameters]

    folder.cleanup()
    return step, parameters


def our_step(variant: str, teacher: LanguageModel, student: LanguageModel, work: Work, precision: str,
             chunk_size: int, compiles: bool = False) -> Step:
    precise = partial(autocast, precision, student.device.type)
    if compiles:
        for model in (teacher, student):
            model.compile_forward()
    own = Teacher(teacher if precision == "float32" else deepcopy(teacher), autocast=precise)
    objective = TeacherStudent(
        student, own, kl_div="JS", kd_weight=1.0, chunk_size=chunk_size,
        vocabulary=teacher.model.config.vocab_size,
    )
    given = [()] * len(work.ours)
    if variant == "cached":
        with precise():
            given = [(objective.teacher.outputs(**batch),) for batch in work.ours]

    def step() -> tuple[float, list[Tensor]]:
        for model in (own.language_model, student):
            model.pack_rows = model.prune_last_block = variant != "gathered"
        student.zero_grad(set_to_none=True)
        total = 0.0
        for batch, outputs in zip(work.ours, given, strict=True):
            with precise():
                terms = objective(batch["input_ids"], batch["attention_mask"], batch["labels"], *outputs)
            loss = terms.loss_sum / work.tokens
            loss.backward()
            total = total + loss.detach()
        return float(total), [parameter.grad for parameter in student.parameters()]

    return step


def make_steps(options: argparse.Namespace, variants: list[str]) -> tuple[dict[str, Step], Step, list[Tensor]]:
    """(a step of each variant, full logits in float32 to compare with, all that gets gradients)."""
    teacher, student = make_models(options.size, options.device)
    teacher.eval().requires_grad_(False)
    work, parameters = make_work(options), list(student.parameters())
    plain = partial(plain_step, teacher, student, work)
    steps: dict[str, Step] = {}
    for variant in variants:
        if variant == "plain":
            steps[variant] = partial(plain, options.peer_precision)
        elif variant == "trl_gkd":
            steps[variant], of_peer = gkd_step(options.size, work, options.peer_precision, options.device)
            parameters += of_peer
        else:
            steps[variant] = our_step(variant, teacher, student, work, options.precision, options.chunk_size,
                                      options.compile)
    alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for batch in work.of_peers
             for row in range(len(batch["labels"]))]  # full logits of a large batch do not fit into a GPU's memory
    return steps, partial(plain_step, teacher, student, work._replace(of_peers=alone), "float32"), parameters


def step_flops(variant: str, options: argparse.Namespace, work: Work) -> float:
    """Of all products of a step: the teacher's forward, the student's forward and twice that for its backward."""
    teacher, student, vocabulary = SIZES[options.size]
    packs, is_peer = variant in ("packed", "cached"), variant in PEERS
    total = 0.0
    for batch in work.of_peers if is_peer else work.ours:
        counts = (batch["labels"] != IGNORED).sum(1).tolist()
        # Ours ends before a row's last label, which predicts nothing.
        lengths = (batch["attention_mask"].sum(1) - 1).tolist() if packs else [batch["labels"].shape[1]] * len(counts)
        for (blocks, width, _), passes in ((teacher, 1), (student, 3)):
            if variant != "cached" or passes > 1:
                total += passes * body_flops(blocks, width, lengths, counts, packs)
            total += passes * head_flops(width, vocabulary, sum(lengths) if is_peer else sum(counts))
    return total


# -- the program ---------------------------------------------------------------------------------------------------


def step_target(options: argparse.Namespace) -> Target | None:
    """What `packed` should reach against TRL's GKD."""
    precisions = options.precision, options.peer_precision
    if options.device == "cuda" and options.size == "real" and precisions == ("bfloat16", "bfloat16"):
        return Target(2.5, 3.0) if options.lengths == "full" else Target(3.5, 4.0)
    if options.device == "cuda" or options.size != "real" or precisions == ("float32", "bfloat16"):
        return None
    if precisions == ("bfloat16", "float32"):
        return Target(3.5, 4.2) if options.lengths == "full" and computes_bfloat16(torch.device("cpu")) else None
    if options.lengths == "real":
        return Target(1.7, 1.8)
    return Target(1.35, 1.45 if precisions[0] == "float32" else 1.6)


def print_ratios(options: argparse.Namespace, seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    on_cpu = options.device == "cpu"
    peers, ours = ([name for name in seconds if (name in PEERS) == wanted] for wanted in (True, False))
    for peer in peers:
        for name in ours:
            of_trl = (peer, name) == ("trl_gkd", "packed")
            target = step_target(options) if of_trl else None
            print_time_ratio(f"{peer} / {name}", seconds[peer], seconds[name], target)
            if memory:
                target = MOST_MEMORY if of_trl and options.size == "real" and on_cpu else None
                print_memory_ratio(f"{name} / {peer}", memory[name], memory[peer], target)
    if {"trl_gkd", "packed", "cached"} <= seconds.keys():
        five = [5 * second for second in seconds["trl_gkd"]]
        mine = [first + 4 * later for first, later in zip(seconds["packed"], seconds["cached"], strict=True)]
        equal = options.precision == options.peer_precision
        real = options.size == options.lengths == "real" and on_cpu
        target = Target(2.6, 3.0) if real and equal else None
        print_time_ratio("5 trl_gkd / (packed + 4 cached), five epochs", five, mine, target)


def print_arithmetic(options: argparse.Namespace, work: Work, seconds: dict[str, list[float]]) -> None:
    peak = measured_peak()
    target = Target(0.4, 0.5) if (options.size, options.precision) == ("real", "bfloat16") else ""
    for name, times in seconds.items():
        flops = step_flops(name, options, work)
        rate = flops / statistics.median(times)
        print(f"{name:<15} {flops / 1e12:.1f} TFLOP a step, {rate / 1e12:.0f} TFLOP/s, {rate / peak:.1%} of the "
              f"{peak / 1e12:.0f} of a large bfloat16 product{target if name == 'packed' else ''}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("python -m benchmarks.kd_step", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, default in (("batch", 2), ("length", 384), ("labels", 74), ("micro_batches", 8), ("chunk_size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--lengths", choices=("full", "real"), default="full", help="default: %(default)s")
    for name in ("precision", "peer_precision"):
        parser.add_argument(f"--{name}", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="ours with trainer_kwargs.compile")
    add_common_options(parser, list(PACKAGES))
    options = parser.parse_args(argv)
    check_device(parser, options.device)
    options.precision = options.precision or "float32"
    options.peer_precision = options.peer_precision or options.precision
    for name, least in (("batch", 1), ("labels", 1), ("micro_batches", 1), ("chunk_size", 1), ("threads", 1),
                        ("rounds", 2), ("length", options.labels + 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}: expected at least {least}")
    if options.length > 1024:
        parser.error(f"--length is {options.length}: expected at most 1024, GPT-2's context")
    if options.lengths == "real" and options.batch == 1:
        parser.error("--lengths real needs --batch 2 or more: a row alone has no padding")
    options.variants = choose_variants(parser, options.variants, PACKAGES)
    return options


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    quiet_libraries()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(options.threads)
    if variant := options.memory_of:
        tiny = argparse.Namespace(**{**vars(options), "size": "tiny"})
        make_steps(tiny, [variant])[0][variant]()  # so that what it imports late does not count as memory of a step
        print(peak_above_rest(make_steps(options, [variant])[0][variant]))
        return
    on_cpu = options.device == "cpu"
    measured = options.variants if on_cpu and not options.skip_memory else ()
    memory = memory_of_each("benchmarks.kd_step", argv, measured)
    lengths = row_lengths(options)
    print(f"{options.size}: {len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens in batches of "
          f"{options.batch}, up to {options.labels} labels each, chunks of {options.chunk_size}; padding of the peers "
          f"{padding(lengths, options.batch):.1%}, of sorted rows {padding(sorted(lengths)[::-1], options.batch):.1%}")
    native = "" if computes_bfloat16(torch.device(options.device)) else " (bfloat16 is not native here)"
    print(f"{options.precision}, peers {options.peer_precision}{native}, "
          f"{conditions(options.threads, options.device)}")
    steps, full_logits, parameters = make_steps(options, options.variants)
    reference = full_logits()
    for variant, step in steps.items():
        compare(variant, step(), reference, options.peer_precision if variant in PEERS else options.precision)
    del reference
    if not on_cpu and not options.skip_memory:
        memory = cuda_peak_of_each(steps, parameters)
    seconds = take_turns(steps, options.rounds, options.device)
    print_times(seconds, memory)
    print_ratios(options, seconds, memory)
    if not on_cpu:
        print_arithmetic(options, make_work(options), seconds)


if __name__ == "__main__":
    main()
