"""Rollouts: continuations drawn by student and teacher together, with what policy gradient needs noted as they are.

Both models decode in one loop (`model/decoding/loop.py`), each with its cache and on its device. So log q, log p and
log p~ of every token, and the teacher's hidden states, are there when the loop ends: no further forward pass is needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.loop import Progress, Voice, check_prompts, decode
from model.decoding.sampling import SamplingOptions, draw, log_prob_of
from model.language_model import IGNORED
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.transfer import to_device


class RolloutOptions(NamedTuple):
    """source: "mixed" (alpha p + (1 - alpha) q), "student" (alpha 0), "teacher" (alpha 1) or "labels" (no sampling).

    temperature, top_k, top_p: as in SamplingOptions. slots: rows decoded at a time. seed: of all draws.
    """

    source: str = "mixed"
    alpha: float = 0.2
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 80
    slots: int = 8
    seed: int = 1234

    @property
    def sampling(self) -> SamplingOptions:
        alpha = {"student": 0.0, "teacher": 1.0}.get(self.source, self.alpha)
        return SamplingOptions(alpha, self.temperature, self.top_k, self.top_p)

    def check(self) -> "RolloutOptions":
        """Raises ValueError where something is out of range."""
        if self.source not in ("mixed", "student", "teacher", "labels"):
            raise ValueError(f"rollout is {self.source!r}: expected mixed, student, teacher or labels")
        for name, value in (("max_generation_length", self.max_new_tokens), ("rollout_batch_size", self.slots)):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        self.sampling.check()
        return self


class Rollouts(NamedTuple):
    """R continuations, one for each prompt, up to and including the end-of-text or L tokens.

    tokens: ids of each, at least one. log_q [R, L]: the student's log-probability of each token, at the temperature of
    the rewards; log_sampling [R, L]: that of the distribution it was drawn from. log_p [R, L], hidden [R, L, Dt]: the
    teacher's, where it read along; else None. entropy [R, L]: of the student's distribution while drawing, in nats.
    Behind a continuation's end these hold anything.
    """

    tokens: list[list[int]]
    log_q: Tensor
    log_sampling: Tensor
    entropy: Tensor
    log_p: Tensor | None
    hidden: Tensor | None


@torch.no_grad()
def draw_rollouts(
    student: Voice,
    teacher: Voice | None,
    prompts: list[list[int]],
    max_new_tokens: int,
    slots: int,
    options: SamplingOptions,
    uniforms: Tensor,
    temperature: float = 1.0,
    progress: Progress = lambda rows, tokens: None,
) -> Rollouts:
    """One continuation of each prompt, drawn from alpha p + (1 - alpha) q.

    student, teacher: in eval mode; without a teacher alpha must be 0. Their heads are on one device, cut to the same
    vocabulary. slots: rows decoded at a time. uniforms [R, max_new_tokens]: numbers in [0, 1) (`row_uniforms`).
    temperature: of the log-probabilities that are noted for the rewards.

    Raises:
        ModelError: an empty prompt, or one too long for one of the models.
    """
    voices = [student] if teacher is None else [student, teacher]
    for voice in voices:
        check_prompts(voice.language_model, prompts, max_new_tokens)
    notes = Notes(student, teacher, len(prompts), max_new_tokens, options, uniforms, temperature)
    end_ids = student.language_model.end_ids
    tokens = decode(voices, prompts, max_new_tokens, slots, end_ids, notes.choose, progress)
    log_p = None if teacher is None else notes.log_p
    return Rollouts(tokens, notes.log_q, notes.log_sampling, notes.entropy, log_p, notes.hidden)


class Notes:
    """Draws the next tokens and writes down, at (row, place), what Rollouts holds."""

    def __init__(self, student, teacher, count, length, options: SamplingOptions, uniforms: Tensor, temperature: float):
        weight = student.head.weight
        self.student, self.teacher, self.options, self.temperature = student, teacher, options, temperature
        self.uniforms = uniforms.to(weight.device)
        self.log_q, self.log_sampling, self.entropy, self.log_p = torch.zeros(
            4, count, length, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device
        ).unbind()
        self.hidden: Tensor | None = None

    def choose(self, rows: Tensor, places: Tensor, hidden: list[Tensor]) -> Tensor:
        log_q, own = self.log_probs(self.student, hidden[0])
        log_p, of_teacher = (None, None) if self.teacher is None else self.log_probs(self.teacher, hidden[1])
        drawn = draw(log_q, log_p, self.options, self.uniforms[rows, places])
        self.log_sampling[rows, places] = drawn.log_sampling
        self.log_q[rows, places] = log_prob_of(own, drawn.tokens)
        # Not vecdot: a product, which autocast would take in bfloat16.
        self.entropy[rows, places] = -log_q.exp().mul_(log_q).sum(-1)
        if self.teacher is not None:
            self.log_p[rows, places] = log_prob_of(of_teacher, drawn.tokens)
            states = to_device(hidden[1], self.log_q.device)
            if self.hidden is None:
                self.hidden = states.new_zeros(*self.log_q.shape, states.shape[-1])
            self.hidden[rows, places] = states
        return drawn.tokens

    def log_probs(self, voice: Voice, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, V] at the temperature of the rollout, and at that of the rewards."""
        logits = voice.logits(hidden)
        while_drawing = torch.log_softmax(logits / self.options.temperature, -1)
        if self.options.temperature == self.temperature:
            return while_drawing, while_drawing
        return while_drawing, torch.log_softmax(logits / self.temperature, -1)


@torch.no_grad()
def token_log_probs(
    hidden: Tensor, head: OutputHead, tokens: Tensor, vocabulary: int, temperature: float = 1.0, chunk_size: int = 128
) -> Tensor:
    """Log-probabilities [N], in float32 at least, of tokens [N] after hidden states [N, D], in chunks of positions."""
    head = cut_head(head, vocabulary)
    head = head._replace(weight=head.weight.to(autocast_type(hidden)))
    precision = torch.promote_types(hidden.dtype, torch.float32)
    parts = []
    for states, chosen in zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True):
        logits, _ = head_logits(states.to(head.weight.dtype), head, precision, with_slope=False)
        parts.append(log_prob_of(torch.log_softmax(logits / temperature, -1), chosen))
    return torch.cat(parts)


def real_tokens(tokens: list[list[int]], length: int, device: torch.device) -> Tensor:
    """Mask of sequences of these tokens: bool [R, length]."""
    counts = torch.tensor([len(each) for each in tokens])
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
    """input_ids, attention_mask and labels [B, T] int64 on the CPU, padded on the right; labels are the tokens drawn.

    What is a label is told by positions, never by ids: an end-of-text that was drawn is one, padding with it is not.
    """
    width = max(len(prompt) + len(new) for prompt, new in zip(prompts, tokens, strict=True))
    input_ids, labels = torch.full((len(prompts), width), pad_id), torch.full((len(prompts), width), IGNORED)
    mask = torch.zeros_like(input_ids)
    for index, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
        end = len(prompt) + len(new)
        input_ids[index, :end] = torch.tensor(prompt + new)
        labels[index, len(prompt) : end] = torch.tensor(new)
        mask[index, :end] = 1
    return input_ids, mask, labels
