"""Greedy decoding against the library's `generate`, on random GPT-2 weights.

    python -m benchmarks.decoding [--size demo|small] [--prompts 32] [--new 64] [--rounds 5]

Same weights, prompts, precision (float32) and threads. First all variants are checked to give the same tokens. Then
they take turns, so that a busy machine slows all of them; the first round is dropped. The rows end at different steps,
as summaries do: the head is biased so that end-of-text is drawn at steps spread over the whole length.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model.decoding import greedy_decode, left_padded
from model.language_model import LanguageModel

VOCABULARY = 50257
END = VOCABULARY - 1
BATCH = 8
SIZES = {"demo": {"n_layer": 3, "n_embd": 128, "n_head": 4}, "small": {"n_layer": 4, "n_embd": 256, "n_head": 4}}
SHORTEST, LONGEST = 50, 400  # tokens of a prompt

Variant = Callable[[], list[list[int]]]


class BiasedHead(nn.Module):
    """A head [N, D] -> [N, V] whose end-of-text logit is `bias` higher."""

    def __init__(self, head: nn.Linear, bias: float):
        super().__init__()
        self.weight = head.weight
        self.end = nn.Buffer(torch.zeros(len(head.weight)))
        self.end[END] = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight, self.end)


def random_language_model(size: str) -> LanguageModel:
    """A GPT-2 with random weights, untied from its embedding so that its text does not repeat one token at once."""
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(GPT2Config(
        **SIZES[size], n_positions=1024, vocab_size=VOCABULARY, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=END, eos_token_id=END,
    ))
    words = {**{f"w{number}": number for number in range(END)}, "<|endoftext|>": END}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<|endoftext|>")), eos_token="<|endoftext|>"
    )
    return LanguageModel(gpt2.eval(), tokenizer)


def random_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(END, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def end_at_different_steps(language_model: LanguageModel, prompts: list[list[int]], new: int) -> None:
    """Bias the head so that half of the rows end before `new` tokens.

    A row ends where its end-of-text logit comes within the bias of the highest; until then its tokens do not depend on
    the bias. So half of the rows do with the median, over rows, of the smallest gap.
    """
    gaps = []
    for prompt, ids in zip(prompts, greedy_decode(language_model, prompts, new, BATCH), strict=True):
        hidden = language_model.hidden_states(torch.tensor([prompt + ids]))[0, len(prompt) - 1 :]
        logits = language_model.lm_head(hidden)
        gaps.append((logits.max(-1).values - logits[:, END]).min().item())
    head = BiasedHead(language_model.model.get_output_embeddings(), statistics.median(gaps))
    language_model.model.set_output_embeddings(head)


def generate(language_model: LanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The library's greedy `generate` on one left-padded batch; ids without the end-of-text."""
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=END, pad_token_id=END)
    input_ids, mask = left_padded(prompts, language_model)
    mask = torch.ones_like(input_ids) if mask is None else mask
    output = language_model.model.generate(input_ids, attention_mask=mask, generation_config=settings)
    rows = output[:, input_ids.shape[1] :].tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def generate_in_batches(
    language_model: LanguageModel, prompts: list[list[int]], new: int, order: list[int], batch: int
) -> list[list[int]]:
    results = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for row, ids in zip(rows, generate(language_model, [prompts[row] for row in rows], new), strict=True):
            results[row] = ids
    return results


def variants(language_model: LanguageModel, prompts: list[list[int]], new: int) -> dict[str, Variant]:
    given = list(range(len(prompts)))
    by_length = sorted(given, key=lambda row: len(prompts[row]))
    return {
        "ours": lambda: greedy_decode(language_model, prompts, new, BATCH),
        f"generate, batches of {BATCH}, sorted": lambda: generate_in_batches(
            language_model, prompts, new, by_length, BATCH),
        f"generate, batches of {BATCH}": lambda: generate_in_batches(language_model, prompts, new, given, BATCH),
        "generate, one by one": lambda: generate_in_batches(language_model, prompts, new, given, 1),
    }


def check_equal(made: dict[str, list[list[int]]]) -> None:
    """Exits with the first variant whose tokens are not ours."""
    for name, rows in made.items():
        different = [row for row, ids in enumerate(rows) if ids != made["ours"][row]]
        if different:
            raise SystemExit(f"{name}: other tokens than ours in {len(different)} rows, the first is {different[0]}")


def interleaved(candidates: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round but the first."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def report(seconds: dict[str, list[float]]) -> str:
    """Median, min and max of each variant, and its median as a multiple of ours."""
    ours = statistics.median(seconds["ours"])
    width = max(map(len, seconds))
    lines = [f"{'':<{width}}  median s    min s    max s  times ours"]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"{name:<{width}}  {median:8.2f} {min(times):8.2f} {max(times):8.2f}  {median / ours:10.2f}")
    return "\n".join(lines)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.decoding", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model (default: %(default)s)")
    parser.add_argument("--prompts", type=positive, default=32, help="how many (default: %(default)s)")
    parser.add_argument("--new", type=positive, default=64, help="most new tokens a prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds (default: %(default)s)")
    options = parser.parse_args(arguments)

    language_model = random_language_model(options.size)
    prompts = random_prompts(options.prompts)
    end_at_different_steps(language_model, prompts, options.new)
    candidates = variants(language_model, prompts, options.new)
    made = {name: run() for name, run in candidates.items()}
    check_equal(made)
    lengths = sorted(map(len, made["ours"]))
    print(f"{options.size}: {language_model.parameter_count() / 1e6:.1f} M parameters, {len(prompts)} prompts of "
          f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens, float32, {torch.get_num_threads()} threads")
    print(f"same tokens in all variants; new tokens a row, sorted: {' '.join(map(str, lengths))}")
    print(report(interleaved(candidates, options.rounds)))


if __name__ == "__main__":
    main()
