"""Rollouts: continuations sampled from student and teacher together, recording what policy gradient needs.

Both models decode in one loop (`model/decoding/loop.py`), each with its cache and on its device. So log q, log p and
log p~ of every token, and the teacher's hidden states, are there when the loop ends: no further forward pass is needed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.decoding.loop import Decoder, Progress, check_prompts, decode
from model.decoding.sampling import SamplingOptions, log_prob_of, sample
from model.label_shift import IGNORED
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.transfer import to_device


@dataclass(frozen=True)
class RolloutConfig:
    """Which sequences a step learns from.

    source: "mixed" (sampled from alpha p + (1 - alpha) q), "student" (alpha 0), "teacher" (alpha 1) or "labels" (the
        highlights themselves, without sampling).
    temperature, top_k, top_p: as in SamplingOptions.
    max_new_tokens: maximum length. batch_size: rows decoded at a time.
    epochs: optimizer steps in a row that use one set of rollouts. seed: of all sampling.
    """

    source: str = "mixed"
    alpha: float = 0.2
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 80
    batch_size: int = 8
    epochs: int = 1
    seed: int = 1234

    @property
    def sampling(self) -> SamplingOptions:
        alpha = {"student": 0.0, "teacher": 1.0}.get(self.source, self.alpha)
        return SamplingOptions(alpha, self.temperature, self.top_k, self.top_p)


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
    progress: Progress = lambda rows, tokens: None,
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
    recorder = RolloutRecorder(student, teacher, len(prompts), max_new_tokens, options, uniforms, temperature)
    end_ids = student.language_model.end_ids
    tokens = decode(decoders, prompts, max_new_tokens, batch_size, end_ids, recorder.next_tokens, progress)
    mask = token_mask(tokens, max_new_tokens, recorder.log_q.device)
    log_p = None if teacher is None else recorder.log_p
    return Rollouts(tokens, mask, recorder.log_q, recorder.behavior_log_probs, recorder.entropy, log_p, recorder.hidden)


class RolloutRecorder:
    """Samples the next tokens and stores, at (prompt, position), what Rollouts holds."""

    def __init__(self, student, teacher, count, length, options: SamplingOptions, uniforms: Tensor, temperature: float):
        weight = student.head.weight
        self.student, self.teacher, self.options, self.temperature = student, teacher, options, temperature
        self.uniforms = uniforms.to(weight.device)
        self.log_q, self.behavior_log_probs, self.entropy, self.log_p = torch.zeros(
            4, count, length, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        ).unbind()
        self.hidden: Tensor | None = None

    def next_tokens(self, rows: Tensor, positions: Tensor, hidden: list[Tensor]) -> Tensor:
        """The `next_token_fn` of `decode`."""
        log_q, reward_log_q = self.log_probs(self.student, hidden[0])
        log_p = None
        if self.teacher is not None:
            log_p, reward_log_p = self.log_probs(self.teacher, hidden[1])
        tokens, behavior_log_probs = sample(log_q, log_p, self.options, self.uniforms[rows, positions])
        self.behavior_log_probs[rows, positions] = behavior_log_probs
        self.log_q[rows, positions] = log_prob_of(reward_log_q, tokens)
        # Not vecdot: autocast would compute that product in bfloat16.
        self.entropy[rows, positions] = -log_q.exp().mul_(log_q).sum(-1)
        if self.teacher is not None:
            self.log_p[rows, positions] = log_prob_of(reward_log_p, tokens)
            states = to_device(hidden[1], self.log_q.device)
            if self.hidden is None:
                self.hidden = states.new_zeros(*self.log_q.shape, states.shape[-1])
            self.hidden[rows, positions] = states
        return tokens

    def log_probs(self, decoder: Decoder, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, V] at the temperature of the rollout, and at that of the rewards."""
        logits = decoder.logits(hidden)
        sampling = torch.log_softmax(logits / self.options.temperature, -1)
        if self.options.temperature == self.temperature:
            return sampling, sampling
        return sampling, torch.log_softmax(logits / self.temperature, -1)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor, head: OutputHead, tokens: Tensor, vocabulary: int, temperature: float = 1.0, chunk_size: int = 128
) -> Tensor:
    """Log-probabilities [N], in float32 at least, of tokens [N] after hidden states [N, D], in chunks of positions."""
    head = cut_head(head, vocabulary)
    head = head._replace(weight=head.weight.to(autocast_type(hidden)))
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
    for ids, attended, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        start = int((labels != IGNORED).int().argmax())
        prompts.append(ids[:start].tolist())
        highlights.append(ids[start : int(attended.sum())].tolist())
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
