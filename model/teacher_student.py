"""Divergence distillation: the student learns from the highlights and from the teacher's distributions."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from model.decoding.rollout_buffer import RolloutBatch, RolloutBuffer
from model.language_model import LanguageModel
from model.losses.divergences import choose_divergence
from model.losses.vocabulary_loss import TeacherHidden, TeacherTopK, vocabulary_loss
from model.objective import LossTerms, arguments_of, by_step
from model.teacher import Teacher
from model.vocabulary import shared_vocabulary


class TeacherStudent(nn.Module):
    """loss_sum = sum over label tokens of (1 - kd_weight) CE + kd_weight temperature^2 D(p, q).

    p and q are the distributions of teacher and student at `temperature`, D the divergence `kl_div` of them (names in
    `model/losses/registry.py`, formulas and sources in `divergences.py` there); CE is the cross-entropy of the label
    at temperature 1. The square keeps the gradient's scale as the temperature changes (Hinton et al. 2015,
    arXiv 1503.02531, section 2).

    With on_policy_fraction, that share of the optimizer steps takes D on the student's own rollouts, as a mean over
    their tokens, and CE on the highlights (GKD, arXiv 2306.13649): the source of the prefixes and the divergence are
    independent choices.

    language_model: the student. teacher: a `Teacher`, or an object with its `outputs` and `iter_steps`.
    vocabulary: number of real tokens; None = that of the two tokenizers.
    chunk_size: label positions whose logits exist at a time. rollouts: for on_policy_fraction, of the student alone.
    parameters: of the divergence, such as beta (`model/losses/registry.py`).

    Raises:
        ValueError: an unknown kl_div, a parameter that it does not have, or one out of range.
        ModelError: teacher and student have different vocabularies.
    """

    passes = 1

    def __init__(
        self,
        language_model: LanguageModel,
        teacher: Teacher,
        kl_div: str = "forward",
        temperature: float = 1.0,
        kd_weight: float = 0.5,
        chunk_size: int = 128,
        vocabulary: int | None = None,
        on_policy_fraction: float = 0.0,
        rollouts: RolloutBuffer | None = None,
        **parameters: float,
    ):
        super().__init__()
        self.language_model, self.teacher = language_model, teacher
        self.divergence = choose_divergence(kl_div, **parameters)
        self.temperature, self.kd_weight, self.chunk_size = temperature, kd_weight, chunk_size
        if vocabulary is None:
            vocabulary = shared_vocabulary(teacher.language_model.tokenizer, language_model.tokenizer)
        self.vocabulary = vocabulary
        self.on_policy_fraction, self.rollouts, self.steps = on_policy_fraction, rollouts, 0

    def iter_steps(self, table, batches: Iterable[dict], counts: list[int]) -> Iterator[Iterator[tuple]]:
        """The arguments of `forward` for each collated batch of a table's rows, step by step.

        On the highlights the teacher is one batch ahead; rollouts are sampled when their step begins.
        """
        if not (self.training and self.on_policy_fraction):
            yield from by_step(self.teacher.iter_steps(table, batches), counts)
            return
        batches = iter(batches)
        for count in counts:
            own = list(islice(batches, count))
            # A random number per step, so that a resumed run and every process decide alike.
            draw = np.random.default_rng([self.rollouts.config.seed, self.steps]).random()
            on_policy = draw < self.on_policy_fraction
            drawn = self.rollouts.for_step(table, own) if on_policy else None
            self.steps += 1  # not before sampling, which may fail: a resumed run must decide alike
            if on_policy:
                yield ((*arguments_of(batch), None, rollout) for batch, rollout in zip(own, drawn, strict=True))
            else:
                yield self.teacher.iter_steps(table, own)

    def get_extra_state(self) -> dict:
        return {"steps": self.steps, "rollouts": self.rollouts.state_dict()} if self.rollouts else {}

    def set_extra_state(self, state: dict) -> None:
        if self.rollouts:
            self.steps = state["steps"]
            self.rollouts.load_state_dict(state["rollouts"])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        teacher_outputs: TeacherHidden | TeacherTopK | None = None,
        rollout: RolloutBatch | None = None,
    ) -> LossTerms:
        """input_ids [B, T] int64; attention_mask [B, T]; labels [B, T] int64, -100 = no loss; on the CPU or not.

        teacher_outputs: of the same batch, on the student's device; None computes them now. A batch without any label
        gives exactly 0 with zero gradients. rollout: take the divergence there instead of on the highlights.
        """
        if rollout is not None:
            return self.on_policy(input_ids, attention_mask, labels, rollout)
        if teacher_outputs is None:
            teacher_outputs = self.teacher.outputs(input_ids, attention_mask, labels)
        head, embedding_weight = self.language_model.tied_head()
        hidden, targets = self.language_model.label_hidden(input_ids, attention_mask, labels, embedding_weight)
        loss = vocabulary_loss(
            hidden, head, targets, vocabulary=self.vocabulary, teacher=teacher_outputs, divergence=self.divergence,
            temperature=self.temperature, kd_weight=self.kd_weight, chunk_size=self.chunk_size,
        )
        return LossTerms(loss.loss_sum, len(targets), {"cross_entropy": loss.cross_entropy,
                                                       "divergence": loss.divergence})

    def on_policy(self, input_ids, attention_mask, labels, rollout: RolloutBatch) -> LossTerms:
        """CE on the highlights, the divergence on the rollout; scaled such that the step's mean is over its tokens."""
        model = self.language_model
        head, embedding_weight = model.tied_head()
        options = {"vocabulary": self.vocabulary, "chunk_size": self.chunk_size}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_weight < 1):
            hidden, targets = model.label_hidden(input_ids, attention_mask, labels, embedding_weight)
            ce_loss = vocabulary_loss(hidden, head, targets, scale=1 - self.kd_weight, **options)
        hidden, drawn = model.label_hidden(rollout.input_ids, rollout.attention_mask, rollout.labels, embedding_weight)
        kd_loss = vocabulary_loss(
            hidden, head, drawn, teacher=rollout.teacher, divergence=self.divergence, temperature=self.temperature,
            kd_weight=1.0, scale=self.kd_weight * rollout.token_scale, **options,
        )
        return LossTerms(
            ce_loss.loss_sum + kd_loss.loss_sum, len(targets),
            {"cross_entropy": ce_loss.cross_entropy, "divergence": kd_loss.divergence * rollout.token_scale},
        )
