"""Rollouts: continuations sampled from student and teacher together, recording what policy gradient needs.

Both models decode in one loop (`model/decoding/loop.py`), each with its cache and on its device. So log q, log p and
log p~ of every token, and the teacher's hidden states, are there when the loop ends: no further forward pass is needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.decoding.loop import Decoder, check_prompts, decode
from model.decoding.sampling import SamplingOptions, log_prob_of, sample
from model.label_shift import IGNORED
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.transfer import to_device


@dataclass(frozen=True)
class RolloutConfig:
    """Which sequences a step learns from.

    sampling: from which distribution; None: the highlights themselves, without sampling.
    max_new_tokens: maximum length. batch_size: rows decoded at a time.
    epochs: optimizer steps in a row that use one set of rollouts. seed: of all sampling.
    """

    sampling: SamplingOptions | None
    max_new_tokens: int = 80
    batch_size: int = 8
    epochs: int = 1
    seed: int = 1234


class Rollouts(NamedTuple):
    """R continuations, one for each prompt, up to and including the end-of-text or L tokens.

    tokens: ids of each, at least one; mask [R, L]: bool, True at the tokens. log_q [R, L]: the student's
    log-probability of each token, at the temperature of the rewards; behavior_log_probs [R, L]: that of the
    distribution it was sampled from. log_p [R, L], hidden [R, L, Dt]: the teacher's, if it read along; else None.
    entropy [R, L]: of the student's distribution while sampling, in nats. All are undefined where the mask is False.
    """

    tokens: list[list[int]]
    mask: Tensor
    log_q: Tensor
    behavior_log_probs: Tensor
    entropy: Tensor
    log_p: Tensor | None
    hidden: Tensor | None


@torch.no_grad()
def draw_rollouts(
    student: Decoder,
    teacher: Decoder | None,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    options: SamplingOptions,
    uniforms: Tensor,
    temperature: float = 1.0,
) -> Rollouts:
    """One continuation of each prompt, sampled from alpha p + (1 - alpha) q.

    student, teacher: in eval mode; without a teacher alpha must be 0. Their heads are on one device, with the same
    vocabulary. batch_size: rows decoded at a time. uniforms [R, max_new_tokens]: numbers in [0, 1) (`row_uniforms`).
    temperature: of the log-probabilities that are recorded for the rewards.

    Raises:
        ModelError: an empty prompt, or one too long for one of the models.
    """
    decoders = [student] if teacher is None else [student, teacher]
    for decoder in decoders:
        check_prompts(decoder.language_model, prompts, max_new_tokens)
    weight = student.head.weight
    uniforms = uniforms.to(weight.device)
    precision = torch.promote_types(weight.dtype, torch.float32)
    all_log_q, all_behavior, all_entropy, all_log_p = torch.zeros(
        4, len(prompts), max_new_tokens, dtype=precision, device=weight.device
    ).unbind()
    all_hidden = None

    def next_tokens(rows: Tensor, positions: Tensor, hidden: list[Tensor]) -> Tensor:
        """Samples, and stores at (prompt, position) what Rollouts holds."""
        nonlocal all_hidden
        at = rows, positions
        log_q, reward_log_q = log_probs(student.logits(hidden[0]), options.temperature, temperature)
        log_p = None
        if teacher is not None:
            log_p, reward_log_p = log_probs(teacher.logits(hidden[1]), options.temperature, temperature)
        tokens, all_behavior[at] = sample(log_q, log_p, options, uniforms[at])
        all_log_q[at] = log_prob_of(reward_log_q, tokens)
        # Not vecdot: autocast would compute that product in bfloat16.
        all_entropy[at] = -log_q.exp().mul_(log_q).sum(-1)
        if teacher is not None:
            all_log_p[at] = log_prob_of(reward_log_p, tokens)
            states = to_device(hidden[1], weight.device)
            if all_hidden is None:
                all_hidden = states.new_zeros(*all_log_q.shape, states.shape[-1])
            all_hidden[at] = states
        return tokens

    tokens = decode(decoders, prompts, max_new_tokens, batch_size, student.language_model.end_ids, next_tokens)
    mask = token_mask(tokens, max_new_tokens, weight.device)
    return Rollouts(tokens, mask, all_log_q, all_behavior, all_entropy, None if teacher is None else all_log_p,
                    all_hidden)


def log_probs(logits: Tensor, temperature: float, reward_temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, V] at the temperature of the rollout, and at that of the rewards."""
    sampling = torch.log_softmax(logits / temperature, -1)
    if temperature == reward_temperature:
        return sampling, sampling
    return sampling, torch.log_softmax(logits / reward_temperature, -1)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor, head: OutputHead, tokens: Tensor, vocabulary: int, temperature: float = 1.0, chunk_size: int = 128
) -> Tensor:
    """Log-probabilities [N], in float32 at least, of tokens [N] after hidden states [N, D], in chunks of positions."""
    head = cut_head(head, vocabulary, autocast_type(hidden))
    precision = torch.promote_types(hidden.dtype, torch.float32)
    chunks = []
    for states, chosen in zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True):
        logits, _ = head_logits(states.to(head.weight.dtype), head, precision, with_slope=False)
        chunks.append(log_prob_of(torch.log_softmax(logits / temperature, -1), chosen))
    return torch.cat(chunks)


def token_mask(tokens: list[list[int]], length: int, device: torch.device) -> Tensor:
    """bool [R, length], True at the tokens of each sequence."""
    counts = torch.tensor([len(sequence) for sequence in tokens], dtype=torch.int64)
    return to_device(torch.arange(length) < counts[:, None], device)


def split_rows(batch: dict) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, label ids) of each row of a collated batch on the CPU."""
    prompts, highlights = [], []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        is_label = labels != IGNORED
        prompts.append(ids[: int(is_label.int().argmax())].tolist())
        highlights.append(labels[is_label].tolist())
    return prompts, highlights


def as_batch(prompts: list[list[int]], tokens: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels [B, T] int64 on the CPU, padded on the right; labels are the sampled tokens.

    Labels are found by position, never by id: a sampled end-of-text is one, padding with the same id is not.
    """
    rows = [torch.tensor(prompt + new) for prompt, new in zip(prompts, tokens, strict=True)]
    labels = [torch.tensor([IGNORED] * len(prompt) + new) for prompt, new in zip(prompts, tokens, strict=True)]
    return (pad_sequence(rows, batch_first=True, padding_value=pad_id),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED))
