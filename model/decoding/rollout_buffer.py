"""Rollouts of an optimizer step, or of several in a row: sampled, scored, checked, kept for a resume."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.loop import make_decoder
from model.decoding.rollouts import (
    RolloutConfig,
    Rollouts,
    as_batch,
    draw_rollouts,
    split_rows,
    token_log_probs,
    token_mask,
)
from model.decoding.sampling import row_uniforms
from model.label_shift import label_positions
from model.language_model import LanguageModel, evaluating
from model.losses.policy_loss import PolicyTokens
from model.losses.rewards import immediate_rewards, importance_weights, long_term_rewards, prefix_weights, whiten
from model.losses.vocabulary_loss import TeacherHidden
from model.objective import ObjectiveError, arguments_of
from model.teacher import Teacher
from model.transfer import to_device

Inputs = tuple[Tensor, Tensor, Tensor]  # input_ids, attention_mask, labels of a micro-batch
MIN_ENTROPY = 1e-3  # of log V: a policy below it, on average, has collapsed
MAX_REWARD = 1e9  # nats: a larger one comes from a probability of 0


@dataclass(frozen=True)
class RewardConfig:
    """temperature: of both softmaxes in the rewards. importance_weight: "token" or "sequence", see `TeacherStudent` in
    model/policy_gradient.py. normalize: divide long-term rewards by the number of tokens that follow. whiten: shift and
    scale them to mean 0 and standard deviation 1."""

    temperature: float = 1.0
    importance_weight: str = "token"
    normalize: bool = True
    whiten: bool = False


class RolloutBatch(NamedTuple):
    """The rollouts of one micro-batch: a padded batch [B, T] whose labels are the tokens, and what is known of them.

    token_scale: label tokens of the whole step divided by its rollout tokens; sequence_scale: by its rollouts.
    Checkpoints hold these fields and those of `drawn` by name.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    drawn: PolicyTokens
    teacher: TeacherHidden
    token_scale: float = 1.0
    sequence_scale: float = 1.0


class RolloutBuffer:
    """Provides the rollouts of each step: new ones, or those of the previous step while `epochs` allow it.

    vocabulary: number of real tokens. chunk_size: positions whose logits exist at a time. truncate_prompt: shortens a
    row's prompt so that max_new_tokens fit behind it. autocast: context of the student's forward pass. all_reduce: sums
    a tensor over all processes. log: takes warnings. hint: what they recommend against a collapse.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: Teacher,
        config: RolloutConfig,
        vocabulary: int,
        rewards: RewardConfig | None = None,
        *,
        chunk_size: int = 128,
        truncate_prompt: Callable[[list[int]], list[int]] = lambda prompt: prompt,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        log: Callable[[str], None] = print,
        hint: str = "change the weights of the loss",
    ):
        self.student, self.teacher, self.config, self.vocabulary = student, teacher, config, vocabulary
        self.rewards = rewards or RewardConfig()
        self.chunk_size, self.truncate_prompt = chunk_size, truncate_prompt
        self.autocast, self.all_reduce, self.log, self.hint = autocast, all_reduce, log, hint
        self.sets_drawn = 0  # decides what is sampled next
        self.passes_left = 0
        self.rows: list[int] = []
        self.kept: list[RolloutBatch] = []
        self.warned: set[str] = set()

    def for_step(self, table, batches: list[dict]) -> list[RolloutBatch]:
        """One RolloutBatch for each of this process's micro-batches of a step.

        Raises:
            ObjectiveError: rewards that are not finite; names rows of the table.
        """
        rows = [int(row) for batch in batches for row in batch["rows"]]
        # A run that is resumed with another micro-batch size finds the kept rollouts in the former ones.
        regrouped = [len(batch["rows"]) for batch in batches] != [len(batch.input_ids) for batch in self.kept]
        changed = rows != self.rows or not self.passes_left or regrouped
        changed = torch.tensor(float(changed), device=self.student.device)
        if self.config.epochs > 1 and self.all_reduce(changed) == 0:
            self.passes_left -= 1
            return self.kept
        rollouts = self.collect(table, batches, rows)
        self.rows, self.passes_left = rows, self.config.epochs - 1
        self.kept = rollouts if self.passes_left else []
        return rollouts

    def collect(self, table, batches: list[dict], rows: list[int]) -> list[RolloutBatch]:
        """Sample (or take the highlights), let the teacher read, check, and score."""
        with evaluating(self.student), torch.no_grad(), self.autocast():
            if self.config.sampling is None:
                inputs, outputs, rollouts = self._read_highlights(batches)
            else:
                inputs, outputs, rollouts = self._sample(batches, rows)
        log_q, behavior_log_probs, mask = rollouts.log_q, rollouts.behavior_log_probs, rollouts.mask
        rewards = immediate_rewards(rollouts.log_p, log_q, mask)
        label_tokens, tokens, sequences = self._check(table, batches, rows, rollouts, rewards)
        self.sets_drawn += 1
        advantages = long_term_rewards(rewards, mask, self.rewards.normalize)
        if self.rewards.whiten:
            advantages = whiten(advantages, mask, self.all_reduce)
        weights = importance_weights(log_q, behavior_log_probs, mask, self.rewards.importance_weight)
        state_weights = torch.ones_like(weights)
        if self.rewards.importance_weight == "sequence":
            state_weights = prefix_weights(log_q, behavior_log_probs, mask)
        result = []
        for part, own, teacher in zip(parts_of(batches), inputs, outputs, strict=True):
            constants = (values[part][mask[part]] for values in (log_q, advantages, weights, state_weights, rewards))
            counts = [len(sequence) for sequence in rollouts.tokens[part]]
            drawn = PolicyTokens(label_positions(own[2]).targets, counts, *constants)
            result.append(RolloutBatch(*own, drawn, teacher, label_tokens / tokens, label_tokens / sequences))
        return result

    def _read_highlights(self, batches: list[dict]) -> tuple[list[Inputs], list[TeacherHidden], Rollouts]:
        """The inputs and the teacher's outputs of each micro-batch, and the highlights as Rollouts."""
        inputs = [arguments_of(batch) for batch in batches]
        tokens = [text for batch in batches for text in split_rows(batch)[1]]
        mask = token_mask(tokens, max(map(len, tokens), default=1), self.student.device)
        outputs = [self.teacher.outputs(*own) for own in inputs]
        states = [TeacherHidden(self.student.label_hidden(*own)[0], self.student.output_head()) for own in inputs]
        log_q, log_p = self._log_probs(states, inputs, mask), self._log_probs(outputs, inputs, mask)
        return inputs, outputs, Rollouts(tokens, mask, log_q, log_q, torch.zeros_like(log_q), log_p, None)

    def _sample(self, batches: list[dict], rows: list[int]) -> tuple[list[Inputs], list[TeacherHidden], Rollouts]:
        """The inputs and the teacher's outputs of each micro-batch, and the Rollouts of all prompts."""
        config, options = self.config, self.config.sampling
        prompts = [self.truncate_prompt(prompt) for batch in batches for prompt in split_rows(batch)[0]]
        teacher = None
        if options.alpha > 0:
            with self.teacher.autocast():
                teacher = make_decoder(self.teacher.language_model, self.teacher.head, self.vocabulary)
        rollouts = draw_rollouts(
            make_decoder(self.student, vocabulary=self.vocabulary), teacher, prompts, config.max_new_tokens,
            config.batch_size, options, row_uniforms(config.seed, self.sets_drawn, rows, config.max_new_tokens),
            self.rewards.temperature,
        )
        pad_id, parts = self.student.tokenizer.pad_token_id, parts_of(batches)
        inputs = [as_batch(prompts[part], rollouts.tokens[part], pad_id) for part in parts]
        if rollouts.hidden is None:
            outputs = [self.teacher.outputs(*own) for own in inputs]
            return inputs, outputs, rollouts._replace(log_p=self._log_probs(outputs, inputs, rollouts.mask))
        outputs = [TeacherHidden(rollouts.hidden[part][rollouts.mask[part]], self.teacher.head) for part in parts]
        return inputs, outputs, rollouts

    def _log_probs(self, outputs: list[TeacherHidden], inputs: list[Inputs], mask: Tensor) -> Tensor:
        """Log-probabilities [R, L] of the tokens, from the hidden states of each micro-batch and their head."""
        values = [mask.new_zeros(0, dtype=torch.float32)]  # a process may have no rows in a step
        for (hidden, head), (*_, labels) in zip(outputs, inputs, strict=True):
            tokens = to_device(label_positions(labels).targets, hidden.device)
            values.append(token_log_probs(hidden, head, tokens, self.vocabulary, self.rewards.temperature,
                                          self.chunk_size))
        values = torch.cat(values)
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    def _check(
        self, table, batches: list[dict], rows: list[int], rollouts: Rollouts, rewards: Tensor
    ) -> tuple[float, float, float]:
        """Stops if rewards are not finite, warns once of a collapse; (label tokens, tokens, rollouts) of all processes.

        All sums are over all processes, so that they decide alike.
        """
        end_ids, limit = self.student.end_ids, self.config.max_new_tokens
        bad = rollouts.mask & ~(rewards.abs() < MAX_REWARD)
        tokens, sequences, label_tokens, empty, at_limit, entropy, bad_rewards, bad_of_teacher = self.all_reduce(
            torch.tensor([
                sum(map(len, rollouts.tokens)), len(rollouts.tokens),
                sum(len(label_positions(batch["labels"]).targets) for batch in batches),
                sum(len(own) == 1 and own[0] in end_ids for own in rollouts.tokens),
                sum(len(own) == limit and own[-1] not in end_ids for own in rollouts.tokens),
                float(torch.where(rollouts.mask, rollouts.entropy, 0).sum()), float(bad.sum()),
                float((bad & ~(rollouts.log_p.abs() < MAX_REWARD)).sum()),
            ], dtype=torch.float64, device=self.student.device)).tolist()
        if bad_rewards:
            own = [rows[index] for index in bad.any(1).nonzero()[:8, 0].tolist()]
            raise ObjectiveError(
                f"rewards (log p - log q) of {bad_rewards:.0f} rollout tokens are not finite"
                + (f", the teacher's log p of {bad_of_teacher:.0f} of them" if bad_of_teacher else "")
                + (f"; rows: {', '.join(map(str, table.names(own)))}" if own else "")
                + ": lower optimizer_kwargs.lm_lr, set trainer_kwargs.precision to float32, or raise "
                "distillation_kwargs.temperature"
            )
        if self.config.sampling is not None:
            for name, found, text in (
                ("empty", empty == sequences, "all rollouts are empty (end-of-text at once): lower "
                 f"optimizer_kwargs.lm_lr, {self.hint}, or start from a fine-tuned student "
                 "(trainer_kwargs.student_ckpt_path)"),
                ("entropy", not entropy / tokens >= MIN_ENTROPY * math.log(self.vocabulary),
                 f"the student's entropy along its rollouts is {entropy / tokens:.2g} nats: lower "
                 f"optimizer_kwargs.lm_lr, {self.hint}, or raise distillation_kwargs.rollout_temperature"),
                ("at_limit", at_limit == sequences, f"no rollout ended before {limit} tokens: raise "
                 "model_arch.generation_kwargs.max_generation_length, or start from a fine-tuned student "
                 "(trainer_kwargs.student_ckpt_path)"),
            ):
                if found and name not in self.warned:
                    self.warned.add(name)
                    self.log(f"warning: {text}")
        return label_tokens, tokens, sequences

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        kept = [{**batch._asdict(), "drawn": batch.drawn._asdict(), "teacher": batch.teacher.hidden}
                for batch in self.kept if self.passes_left]
        return {"made": self.sets_drawn, "passes_left": self.passes_left, "rows": self.rows,
                "warned": sorted(self.warned), "kept": on_cpu(kept)}

    def load_state_dict(self, state: dict) -> None:
        self.sets_drawn, self.passes_left, self.rows = state["made"], state["passes_left"], state["rows"]
        self.warned, self.kept = set(state["warned"]), []
        for batch in state["kept"]:
            teacher = TeacherHidden(batch["teacher"].to(self.student.device), self.teacher.head)
            self.kept.append(RolloutBatch(**{**batch, "drawn": PolicyTokens(**batch["drawn"]), "teacher": teacher}))


def parts_of(batches: list[dict]) -> list[slice]:
    """The rows of each batch among those of all."""
    ends = [0, *accumulate(len(batch["rows"]) for batch in batches)]
    return [slice(*pair) for pair in pairwise(ends)]


def on_cpu(value):
    """Nested lists and dicts with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value


def from_reference_summaries(
    teacher: Teacher, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
) -> RolloutBatch:
    """The highlights as if they were rollouts without any advantage."""
    outputs = teacher.outputs(input_ids, attention_mask, labels)
    index, targets = label_positions(labels)
    counts = torch.bincount(index // labels.shape[1], minlength=len(labels)).tolist()
    zeros = torch.zeros(len(targets), device=outputs.hidden.device)
    ones = torch.ones_like(zeros)
    return RolloutBatch(input_ids, attention_mask, labels,
                        PolicyTokens(targets, counts, zeros, zeros, ones, ones, zeros), outputs)
