"""Greedy decoding: ours against the library's `generate`, batched in given order, sorted by length, and one by one.

    python -m benchmarks.decode [--size demo|small|real] [--prompts 32] [--shortest 200] [--longest 500] [--new 100]
                                [--batch 8] [--device cpu|cuda] [--precision float32|bfloat16] [--threads 1]
                                [--variants ours sorted ...] [--rounds 6]

A random GPT-2 (real: of gpt2's size), the same weights, prompts and threads everywhere:
  ours        greedy_decode with --batch slots
  batched     `generate` on left-padded batches of --batch prompts in the given order
  sorted      the same, sorted by length
  one_by_one  `generate` on each prompt alone
Rows end at different times, as summaries do: the head's row of the end-of-text token is fitted to the hidden states of
the model's own continuations, so that the lengths lie evenly between 1 and --new, whatever the prompts' lengths. It is
a head like any other, with a bias, and all variants use it. The lengths that result are printed; at size demo, too
narrow for many rows, some differ from those that were wanted.

--precision bfloat16: ours under autocast, as validate_model.py runs it, the others with weights in bfloat16.

In float32 all variants must give the same tokens, except for ties; in bfloat16, where rounding decides more, the number
of rows that differ is printed. Then they take turns, so that a busy machine slows all of them; the first round is
dropped. glibc's default allocator maps large temporaries again in each step; so that this does not slow `generate`,
time with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.interleaved import (
    Target,
    add_device_option,
    check_device,
    conditions,
    print_time_ratio,
    print_times,
    take_turns,
)
from benchmarks.kd_work import number_tokenizer
from model.decoding.loop import greedy_decode, left_padded
from model.language_model import LanguageModel
from utils.cli import OneLineParser, quiet_libraries

SIZES = {  # blocks, width and heads, vocabulary
    "tiny": ((2, 32, 2), 211),
    "demo": ((3, 128, 4), 50257),
    "small": ((4, 256, 4), 50257),
    "real": ((12, 768, 12), 50257),
}
END = 0
CONTEXT = 1024
LABELS = {"batched": "generate, batched", "sorted": "generate, batched, sorted", "one_by_one": "generate, one by one"}
TARGETS = {"batched": Target(2.4, 3.0), "sorted": Target(1.9, 2.4)}
TARGETS_ON_GPU = {"batched": Target(5.0, 5.0)}
VARIANTS = ("ours", *LABELS)
TIE = 1e-5  # difference of two logits, of the largest one, that rounding in float32 decides

Rows = list[list[int]]  # token ids


# -- model and prompts ---------------------------------------------------------------------------------------------


def make_model(size: str, device: str = "cpu") -> LanguageModel:
    """Random weights, wide enough and with a head of its own, so that its text does not repeat itself; it never ends.

    The head has a bias, 0 but for the end-of-text.
    """
    torch.manual_seed(0)
    (blocks, width, heads), vocabulary = SIZES[size]
    gpt2 = GPT2LMHeadModel(GPT2Config(
        n_layer=blocks, n_embd=width, n_head=heads, n_positions=CONTEXT, vocab_size=vocabulary, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=END, eos_token_id=END,
    ))
    head = nn.Linear(width, vocabulary)
    with torch.no_grad():
        head.weight.copy_(gpt2.get_output_embeddings().weight)
        head.bias.zero_()[END] = -1e4
    gpt2.set_output_embeddings(head)
    return LanguageModel(gpt2.eval().to(device), number_tokenizer(vocabulary))


def spread(lowest: int, highest: int, count: int, seed: int) -> list[int]:
    """Whole numbers in even steps from lowest to highest, both included where there are several, in random order."""
    steps = [lowest + (highest - lowest) * (row / (count - 1) if count > 1 else 0.5) for row in range(count)]
    return random.Random(seed).sample([round(step) for step in steps], count)


def make_prompts(options: argparse.Namespace) -> Rows:
    draw = random.Random(1)
    vocabulary = SIZES[options.size][1]
    lengths = spread(options.shortest, options.longest, options.prompts, seed=2)
    return [[draw.randrange(END + 1, vocabulary) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def states_of_continuations(language_model: LanguageModel, prompts: Rows, new: int, batch: int) -> list[Tensor]:
    """For each prompt the hidden states [new, D] that predict its tokens, as long as it does not end."""
    states = []
    for prompt, ids in zip(prompts, greedy_decode(language_model, prompts, new, batch), strict=True):
        row = torch.tensor([prompt + ids[:-1]], device=language_model.device)
        hidden = language_model.hidden_states(row)
        states.append(hidden[0, len(prompt) - 1 :].cpu())
    return states


def end_after(language_model: LanguageModel, states: list[Tensor], lengths: list[int]) -> None:
    """Fits the head's row of the end-of-text, so that each row ends after its number of tokens.

    Until a row ends, its tokens do not depend on that row of the head. So it has to tell the one state where the row
    ends from all earlier ones: a logistic regression over the states of all rows.
    """
    pairs = [(state[: length + 1], length) for state, length in zip(states, lengths, strict=True)]
    hidden = torch.cat([state for state, _ in pairs]).double()
    ends = torch.cat([(torch.arange(len(state)) == length).double() for state, length in pairs])
    weight, bias = torch.zeros(hidden.shape[1], dtype=hidden.dtype), torch.zeros((), dtype=hidden.dtype)
    balance = (len(ends) - ends.sum()) / ends.sum().clamp(min=1)
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=300,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(hidden @ weight + bias, ends, pos_weight=balance)
        value = value + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head = language_model.model.get_output_embeddings()
    with torch.no_grad():
        # No other logit is larger than the product of the norms; the sign of the fit alone decides where rows end.
        largest = head.weight.norm(dim=1).max() * hidden.norm(dim=1).max()
        weight, bias = (tensor.detach().to(head.weight) for tensor in (weight, bias))
        head.weight[END], head.bias[END] = weight * largest, bias * largest


# -- variants ------------------------------------------------------------------------------------------------------


def generate(language_model: LanguageModel, prompts: Rows, new: int) -> Rows:
    """The library's greedy `generate` on one left-padded batch; ids without the end-of-text."""
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END)
    input_ids, mask = left_padded(prompts, language_model)
    output = language_model.model.generate(input_ids, attention_mask=mask, generation_config=settings)
    rows = output[:, input_ids.shape[1] :].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def generate_in_batches(language_model: LanguageModel, prompts: Rows, new: int, order: list[int], batch: int) -> Rows:
    """Ids of all prompts, in their own order; `order`: that of the batches."""
    results: Rows = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for row, ids in zip(rows, generate(language_model, [prompts[row] for row in rows], new), strict=True):
            results[row] = ids
    return results


def make_variant(name: str, language_model: LanguageModel, prompts: Rows, new: int, batch: int,
                 precision: str = "float32") -> Callable[[], Rows]:
    given = list(range(len(prompts)))
    if name == "ours":
        kind, enabled = language_model.device.type, precision == "bfloat16"
        return torch.autocast(kind, torch.bfloat16, enabled)(
            partial(greedy_decode, language_model, prompts, new, batch))
    if precision == "bfloat16":
        language_model = LanguageModel(deepcopy(language_model.model).bfloat16(), language_model.tokenizer)
    order = sorted(given, key=lambda row: -len(prompts[row])) if name == "sorted" else given
    return partial(generate_in_batches, language_model, prompts, new, order, 1 if name == "one_by_one" else batch)


@torch.inference_mode()
def logit_gap(language_model: LanguageModel, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far the logits of the first different tokens of two continuations are apart, as a share of the largest."""
    one, other = [*one, END], [*other, END]
    place = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    row = torch.tensor([prompt + one[:place]], device=language_model.device)
    logits = language_model.model(row).logits[0, -1].double()
    return float((logits[one[place]] - logits[other[place]]).abs() / logits.abs().max())


def check_equal(made: dict[str, Rows], language_model: LanguageModel, prompts: Rows, precision: str) -> None:
    """Tells which rows of the variants are not those of the first one.

    Raises:
        SystemExit: in float32, where their first different token is no tie up to rounding.
    """
    first, *others = made
    for name in others:
        different = [row for row, ids in enumerate(made[name]) if ids != made[first][row]]
        for row in different if precision == "float32" else ():
            gap = logit_gap(language_model, prompts[row], made[name][row], made[first][row])
            if not gap <= TIE:
                raise SystemExit(f"{name}: other tokens than {first} in {len(different)} rows, in row {row} with "
                                 f"logits {gap:.1e} apart")
        result = f"{len(different)} rows differ from a tie on" if precision == "float32" else f"{len(different)} differ"
        print(f"{name}: {sum(map(len, made[name]))} new tokens, {first} {sum(map(len, made[first]))}; "
              f"{result if different else 'the same'}")


# -- the program ---------------------------------------------------------------------------------------------------


def target(options: argparse.Namespace, variant: str) -> Target | None:
    """What ours should reach against a variant; ratios of small models are no evidence."""
    if options.size != "real":
        return None
    return TARGETS_ON_GPU.get(variant) if options.device == "cuda" else TARGETS.get(variant)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("python -m benchmarks.decode", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model (default: %(default)s)")
    for name, default, text in (
        ("prompts", 32, "how many"), ("shortest", 200, "tokens of the shortest prompt"),
        ("longest", 500, "tokens of the longest prompt"), ("new", 100, "most new tokens of a row"),
        ("batch", 8, "rows at a time, slots of ours"), ("rounds", 6, "the first is dropped"),
        ("threads", torch.get_num_threads(), "of the CPU"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    add_device_option(parser)
    options = parser.parse_args(argv)
    check_device(parser, options.device)
    for name, least in (("prompts", 1), ("shortest", 1), ("new", 1), ("batch", 1), ("threads", 1), ("rounds", 2),
                        ("longest", options.shortest)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}: expected at least {least}")
    if options.longest + options.new > CONTEXT:
        parser.error(f"--longest and --new are {options.longest} and {options.new}: expected at most {CONTEXT} "
                     "together, GPT-2's context")
    options.variants = [name for name in VARIANTS if name in options.variants]
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    torch.set_num_threads(options.threads)
    language_model, prompts = make_model(options.size, options.device), make_prompts(options)
    states = states_of_continuations(language_model, prompts, options.new, options.batch)
    end_after(language_model, states, spread(1, options.new, options.prompts, seed=3))
    runs = {name: make_variant(name, language_model, prompts, options.new, options.batch, options.precision)
            for name in options.variants}
    made = {name: run() for name, run in runs.items()}
    lengths = sorted(map(len, made[options.variants[0]]))
    print(f"{options.size}: {language_model.parameter_count() / 1e6:.1f} M parameters, {options.prompts} prompts of "
          f"{options.shortest} to {options.longest} tokens, {options.batch} at a time, at most {options.new} new ones")
    print(f"{options.precision}, {conditions(options.threads, options.device)}")
    print(f"new tokens of the rows, sorted: {' '.join(map(str, lengths))}")
    check_equal(made, language_model, prompts, options.precision)
    seconds = take_turns(runs, options.rounds, options.device)
    print_times(seconds, {})
    for name in options.variants:
        if "ours" in seconds and name != "ours":
            print_time_ratio(f"{LABELS[name]} / ours", seconds[name], seconds["ours"], target(options, name))


if __name__ == "__main__":
    main()
