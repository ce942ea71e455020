"""A fine-tuning step, forward and backward: ours against the library's own loss, which makes logits everywhere.

    python -m benchmarks.fine_tune_step [--size small|real] [--batch 4] [--length 512] [--labels 64] [--rounds 6]

Same random GPT-2 (vocabulary 50,257), same batch, float32, no dropout. Loss and gradients are compared first. Variants
are interleaved, the first round is dropped. Peak memory is measured in a process of its own for each variant
(maximum resident set on a CPU), above what the process holds before its first step.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.kd_work import number_tokenizer
from model.fine_tuning import FineTuning
from model.label_shift import IGNORED
from model.language_model import LanguageModel
from utils.cli import quiet_libraries

SIZES = {"small": {"n_layer": 4, "n_embd": 256, "n_head": 4}, "real": {"n_layer": 12, "n_embd": 768, "n_head": 12}}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
VARIANTS = ("library", "ours")


def make_model(size: str) -> LanguageModel:
    quiet_libraries()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES[size], **NO_DROPOUT))
    return LanguageModel(model, number_tokenizer(model.config.vocab_size))


def make_batch(batch: int, length: int, labels: int) -> dict[str, torch.Tensor]:
    """Full-length rows (no padding): the last `labels` tokens are labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50257, (batch, length), generator=generator)
    targets = ids.clone()
    targets[:, : length - labels] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}


def step(variant: str, language_model: LanguageModel, batch: dict[str, torch.Tensor]) -> float:
    """Forward and backward of the mean loss over label tokens; returns it."""
    language_model.zero_grad(set_to_none=True)
    if variant == "ours":
        terms = FineTuning(language_model)(**batch)
        loss = terms.loss_sum / terms.token_count
    else:
        loss = language_model.model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item()


def check_equal(language_model: LanguageModel, batch: dict[str, torch.Tensor]) -> str:
    losses, gradients = [], []
    for variant in VARIANTS:
        losses.append(step(variant, language_model, batch))
        gradients.append([parameter.grad.clone() for parameter in language_model.parameters()])
    largest = max((one - two).abs().max().item() for one, two in zip(*gradients, strict=True))
    if abs(losses[0] - losses[1]) > 1e-5 or largest > 1e-5:
        raise SystemExit(f"not equal: losses {losses}, largest difference of a gradient {largest:.1e}")
    return f"losses {losses[0]:.6f} and {losses[1]:.6f}, largest difference of a gradient {largest:.1e}"


def peak_memory(arguments: list[str], variant: str) -> float:
    """MiB above the resting state, of one step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fine_tune_step", *arguments, "--memory_of", variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.fine_tune_step", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, default in (("batch", 4), ("length", 512), ("labels", 64), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory_of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # First, since Linux lets a new process begin with the peak of the one that started it.
    memory = {} if options.memory_of else {variant: peak_memory(sys.argv[1:], variant) for variant in VARIANTS}
    language_model = make_model(options.size)
    batch = make_batch(options.batch, options.length, options.labels)
    if options.memory_of:
        rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(options.memory_of, language_model, batch)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rest) / 1024)
        return
    print(f"{options.size}: {options.batch} rows of {options.length} tokens, {options.labels} labels each, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(check_equal(language_model, batch))
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant in VARIANTS:
            started = time.perf_counter()
            step(variant, language_model, batch)
            seconds[variant].append(time.perf_counter() - started)
    for variant, times in seconds.items():
        kept = times[1:]
        print(f"{variant:<8} median {statistics.median(kept):.3f} s, min {min(kept):.3f}, max {max(kept):.3f}; "
              f"peak memory above rest {memory[variant]:,.0f} MiB")
    ratios = [library / ours for library, ours in zip(*(times[1:] for times in seconds.values()), strict=True)]
    print(f"library / ours: median {statistics.median(ratios):.2f}, by round {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
