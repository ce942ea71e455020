"""What the distillation benchmarks compute on: random GPT-2s, and rows of tokens in the peers' batches and in ours."""

import argparse
import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model.label_shift import IGNORED
from model.language_model import LanguageModel

SIZES = {  # blocks, width and heads of teacher and student, vocabulary
    "tiny": ((2, 32, 2), (1, 16, 2), 211),
    "small": ((6, 384, 6), (4, 256, 4), 50257),
    "real": ((24, 1024, 16), (12, 768, 12), 50257),
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

Batch = dict[str, Tensor]  # input_ids, attention_mask and labels [B, T]


class Work(NamedTuple):
    """What all variants compute: the same rows in the peers' batches and in ours, tokens: labels of all of them."""

    of_peers: list[Batch]
    ours: list[Batch]
    tokens: int


def number_tokenizer(vocabulary: int, **options) -> PreTrainedTokenizerFast:
    """Every id is a token, its text the number; 0 is the end-of-text."""
    words = {"<|endoftext|>": 0, **{str(token): token for token in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **options)


def make_models(size: str, device: str = "cpu") -> tuple[LanguageModel, LanguageModel]:
    """(teacher, student), the same weights at each call."""
    torch.manual_seed(0)
    *shapes, vocabulary = SIZES[size]
    made = []
    for blocks, width, heads in shapes:
        model = GPT2LMHeadModel(GPT2Config(
            n_layer=blocks, n_embd=width, n_head=heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0,
            **NO_DROPOUT,
        ))
        made.append(LanguageModel(model.to(device), number_tokenizer(vocabulary)))
    return made[0], made[1]


def row_lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of each row, in the peers' order."""
    if options.lengths == "full":
        return [options.length] * options.batch
    rows = options.batch * options.micro_batches
    most = options.batch / (options.batch + 1)  # mean of the longest of B numbers that are uniform in [0, 1]
    shortest = (1.5 * most - 1) / (1.5 * most - 0.5)  # share of the longest row that gives 25 % padding
    lengths = [round(options.length * (shortest + (1 - shortest) * (row + 0.5) / rows)) for row in range(rows)]
    lengths = [max(2, length) for length in lengths]
    orders = [random.Random(seed).sample(lengths, rows) for seed in range(100)]
    return min(orders, key=lambda order: abs(padding(order, options.batch) - 0.25))


def padding(lengths: list[int], batch: int) -> float:
    """Share of padding in batches of rows in this order."""
    padded = sum(batch * max(lengths[start : start + batch]) for start in range(0, len(lengths), batch))
    return 1 - sum(lengths) / padded


def make_work(options: argparse.Namespace) -> Work:
    """Random tokens; the last --labels tokens of each row, at most half of it where lengths differ, are labels."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for length in row_lengths(options):
        count = min(options.labels, length // 2 if options.lengths == "real" else length - 1)
        rows.append((torch.randint(SIZES[options.size][2], (length,), generator=draw), count))
    by_length = sorted(rows, key=lambda row: -len(row[0]))
    of_peers, ours = ([collate(order[start : start + options.batch]) for start in range(0, len(rows), options.batch)]
                      for order in (rows, by_length))
    return Work(of_peers, ours, sum(count for _, count in rows))


def collate(rows: list[tuple[Tensor, int]]) -> Batch:
    """A batch padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {"input_ids": torch.zeros(len(rows), longest, dtype=torch.int64)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for row, (ids, count) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, len(ids) - count : len(ids)] = ids[-count:]
    return batch
