"""Sets of rollouts, one for each optimizer step or for several in a row: drawn, scored, watched, kept for a resume."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.loop import make_voice
from model.decoding.rollouts import (
    RolloutOptions,
    Rollouts,
    as_batch,
    draw_rollouts,
    real_tokens,
    split_rows,
    token_log_probs,
)
from model.decoding.sampling import row_uniforms
from model.language_model import LanguageModel, evaluating, label_positions
from model.losses.policy_loss import PolicyTokens
from model.losses.rewards import immediate_rewards, importance_weights, long_term_rewards, prefix_weights, whiten
from model.losses.vocabulary_loss import TeacherHidden
from model.objective import ObjectiveError, arguments_of
from model.teacher import Teacher
from model.transfer import to_device

COLLAPSED_SETS = 10  # in a row, after which training stops
ENTROPY_FLOOR = 1e-3  # of log V: below it, on average, a policy counts as collapsed
ABSURD = 1e9  # nats: a reward beyond it is that of a probability of 0


class RolloutBatch(NamedTuple):
    """The rollouts of one micro-batch: a padded batch [B, T] whose labels are the tokens drawn, and what is known.

    token_scale: label tokens of the whole step divided by its rollout tokens; sequence_scale: by its rollouts.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    drawn: PolicyTokens
    teacher: TeacherHidden
    token_scale: float = 1.0
    sequence_scale: float = 1.0


class Totals(NamedTuple):
    """Of a set of rollouts on all processes."""

    tokens: float
    label_tokens: float
    sequences: float
    empty: float
    at_limit: float
    entropy: float
    bad_rewards: float
    bad_of_teacher: float


class RolloutBuffer:
    """Draws the rollouts of each step's rows, or hands out those of the step before while passes over them are left."""

    def __init__(
        self,
        student: LanguageModel,
        teacher: Teacher,
        options: RolloutOptions,
        vocabulary: int,
        *,
        temperature: float = 1.0,
        importance_weight: str = "token",
        normalize: bool = True,
        whiten: bool = False,
        epochs: int = 1,
        chunk_size: int = 128,
        shorten: Callable[[list[int]], list[int]] = lambda prompt: prompt,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        say: Callable[[str], None] = print,
        advice: str | None = None,
    ):
        self.student, self.teacher, self.options, self.vocabulary = student, teacher, options.check(), vocabulary
        self.temperature, self.importance_weight, self.normalize, self.whiten = (
            temperature, importance_weight, normalize, whiten)
        self.epochs, self.chunk_size, self.shorten, self.autocast = epochs, chunk_size, shorten, autocast
        self.all_reduce, self.say = all_reduce, say
        alpha = " or alpha" if options.source == "mixed" else ""
        self.advice = advice or f"raise distillation_kwargs.lm_weight{alpha}, set penalty to true"
        if importance_weight not in ("token", "sequence"):
            raise ValueError(f"importance_weight is {importance_weight!r}: expected token or sequence")
        if epochs < 1:
            raise ValueError(f"rollout_epochs is {epochs}: expected at least 1")
        self.made = 0  # sets so far: decides what is drawn
        self.passes_left = 0
        self.rows: list[int] = []
        self.kept: list[RolloutBatch] = []
        self.collapsed = 0  # sets in a row
        self.warned: set[str] = set()

    def of_step(self, table, batches: list[dict]) -> list[RolloutBatch]:
        """One RolloutBatch for each of this process's micro-batches of a step.

        Raises:
            ObjectiveError: rewards that are not finite, or a policy that has collapsed.
        """
        rows = [int(row) for batch in batches for row in batch["rows"]]
        # A run that goes on with other micro-batches finds those of before.
        others = [len(batch["rows"]) for batch in batches] != [len(batch.input_ids) for batch in self.kept]
        changed = torch.tensor(float(rows != self.rows or not self.passes_left or others), device=self.student.device)
        if self.epochs > 1 and self.all_reduce(changed) == 0:
            self.passes_left -= 1
            return self.kept
        kept = self.make(table, batches, rows)
        self.rows, self.passes_left = rows, self.epochs - 1
        self.kept = kept if self.passes_left else []
        return kept

    def make(self, table, batches: list[dict], rows: list[int]) -> list[RolloutBatch]:
        with evaluating(self.student), torch.no_grad(), self.autocast():
            plain, rollouts = self.from_labels(batches) if self.options.source == "labels" else self.draw(batches, rows)
        mask = real_tokens(rollouts.tokens, rollouts.log_q.shape[1], rollouts.log_q.device)
        rewards = immediate_rewards(rollouts.log_p, rollouts.log_q, mask)
        bad = mask & ~(rewards.abs() < ABSURD)
        totals = self.totals(batches, rollouts, mask, bad)
        self.watch(table, rows, bad, totals)
        self.made += 1
        advantages = long_term_rewards(rewards, mask, self.normalize)
        if self.whiten:
            advantages = whiten(advantages, mask, self.all_reduce)
        weights = importance_weights(rollouts.log_q, rollouts.log_sampling, mask, self.importance_weight)
        state_weights = torch.ones_like(weights)
        if self.importance_weight == "sequence":
            state_weights = prefix_weights(rollouts.log_q, rollouts.log_sampling, mask)
        made, start = [], 0
        for (input_ids, attention_mask, labels), hidden in plain:
            part = slice(start, start + len(input_ids))
            start = part.stop
            tokens = rollouts.tokens[part]
            real = mask[part]
            drawn = PolicyTokens(
                torch.tensor([token for each in tokens for token in each]), [len(each) for each in tokens],
                *(each[part][real] for each in (rollouts.log_q, advantages, weights, state_weights, rewards)),
            )
            made.append(RolloutBatch(
                input_ids, attention_mask, labels, drawn, self.teacher.to_student(hidden),
                totals.label_tokens / totals.tokens, totals.label_tokens / totals.sequences,
            ))
        return made

    # -- where sequences come from -------------------------------------------------------------------------------

    def draw(self, batches: list[dict], rows: list[int]):
        """((batch, teacher's hidden states) of each micro-batch, Rollouts) by sampling."""
        if not rows:
            return [], self.nothing()
        prompts = [self.shorten(prompt) for batch in batches for prompt in split_rows(batch)[0]]
        options = self.options
        uniforms = row_uniforms(options.seed, self.made, rows, options.max_new_tokens)
        student = make_voice(self.student, vocabulary=self.vocabulary)
        teacher, reads_along = None, options.sampling.alpha > 0
        if reads_along:
            with self.teacher.autocast():
                teacher = make_voice(self.teacher.language_model, self.teacher.head, self.vocabulary)
        rollouts = draw_rollouts(
            student, teacher, prompts, options.max_new_tokens, options.slots, options.sampling, uniforms,
            self.temperature,
        )
        plain, log_p, start = [], [], 0
        for batch in batches:
            part = slice(start, start + len(batch["rows"]))
            start = part.stop
            tokens = rollouts.tokens[part]
            arguments = as_batch(prompts[part], tokens, self.student.tokenizer.pad_token_id)
            if reads_along:
                hidden = rollouts.hidden[part][real_tokens(tokens, rollouts.log_q.shape[1], rollouts.log_q.device)]
            else:
                hidden = self.teacher.hidden(*arguments)
                log_p.append(self.log_probs_of_teacher(hidden, arguments[2]))
            plain.append((arguments, hidden))
        if not reads_along:
            rollouts = rollouts._replace(log_p=padded(torch.cat(log_p), rollouts.tokens, rollouts.log_q))
        return plain, rollouts

    def from_labels(self, batches: list[dict]):
        """The same with the highlights in place of samples; both models read them once."""
        if not batches:
            return [], self.nothing()
        plain, log_q, log_p, tokens = [], [], [], []
        for batch in batches:
            arguments = arguments_of(batch)
            hidden = self.teacher.hidden(*arguments)
            own, targets = self.student.label_hidden(*arguments)
            log_q.append(token_log_probs(own, self.student.output_head(), targets, self.vocabulary, self.temperature,
                                         self.chunk_size))
            log_p.append(self.log_probs_of_teacher(hidden, arguments[2]))
            tokens += split_rows(batch)[1]
            plain.append((arguments, hidden))
        like = torch.zeros(len(tokens), max(map(len, tokens)), device=self.student.device, dtype=log_q[0].dtype)
        of_student, of_teacher = (padded(torch.cat(each), tokens, like) for each in (log_q, log_p))
        return plain, Rollouts(tokens, of_student, of_student, like + math.inf, of_teacher, None)

    def log_probs_of_teacher(self, hidden: Tensor, labels: Tensor) -> Tensor:
        of_student = self.teacher.to_student(hidden)
        targets = to_device(label_positions(labels).targets, of_student.hidden.device)
        return token_log_probs(*of_student, targets, self.vocabulary, self.temperature, self.chunk_size)

    def nothing(self) -> Rollouts:
        """Of a process that has no rows in a step."""
        none = torch.zeros(0, 1, device=self.student.device)
        return Rollouts([], none, none, none, none, None)

    # -- watching ------------------------------------------------------------------------------------------------

    def totals(self, batches: list[dict], rollouts: Rollouts, mask: Tensor, bad: Tensor) -> Totals:
        """Added up over all processes."""
        tokens, ends, most = rollouts.tokens, self.student.end_ids, self.options.max_new_tokens
        own = Totals(
            sum(map(len, tokens)), sum(len(label_positions(batch["labels"]).targets) for batch in batches), len(tokens),
            sum(len(each) == 1 and each[0] in ends for each in tokens),
            sum(len(each) == most and each[-1] not in ends for each in tokens),
            float(torch.where(mask, rollouts.entropy, 0).sum()), float(bad.sum()),
            float((bad & ~(rollouts.log_p.abs() < ABSURD)).sum()),
        )
        summed = self.all_reduce(torch.tensor(own, dtype=torch.float64, device=self.student.device))
        return Totals(*summed.tolist())

    def watch(self, table, rows: list[int], bad: Tensor, totals: Totals) -> None:
        """Stops or warns where rewards are not finite or the policy has collapsed; all processes do alike."""
        if totals.bad_rewards:
            own = bad.any(1).nonzero()[:, 0].tolist()
            names = table.names([rows[index] for index in own[:8]]) if hasattr(table, "names") else own[:8]
            told = f"; rows: {', '.join(map(str, names))}" if own else ""
            if totals.bad_of_teacher:
                told = f", the teacher's log p of {totals.bad_of_teacher:.0f} of them{told}"
            raise ObjectiveError(
                f"rewards (log p - log q) of {totals.bad_rewards:.0f} rollout tokens are not finite{told}: lower "
                "optimizer_kwargs.lm_lr, set trainer_kwargs.precision to float32, or raise "
                "distillation_kwargs.temperature"
            )
        if self.options.source == "labels":
            return
        entropy, floor = totals.entropy / totals.tokens, ENTROPY_FLOOR * math.log(self.vocabulary)
        faults = {
            "empty": (totals.empty == totals.sequences, "all rollouts are empty (end-of-text at once): lower "
                      f"optimizer_kwargs.lm_lr, {self.advice}, or start from a fine-tuned student "
                      "(trainer_kwargs.student_ckpt_path)"),
            "entropy": (not entropy >= floor, f"the student's entropy along its rollouts is {entropy:.2g} nats, under "
                        f"{floor:.2g}: lower optimizer_kwargs.lm_lr, {self.advice}, or raise "
                        "distillation_kwargs.rollout_temperature"),
            "at_limit": (totals.at_limit == totals.sequences, "no rollout ended before "
                         f"{self.options.max_new_tokens} tokens: raise "
                         "model_arch.generation_kwargs.max_generation_length, or start from a fine-tuned student "
                         "(trainer_kwargs.student_ckpt_path)"),
        }
        for name, (found, told) in faults.items():
            if found and name not in self.warned:
                self.warned.add(name)
                self.say(f"warning: {told}")
        collapsed = [name for name in ("empty", "entropy") if faults[name][0]]
        self.collapsed = self.collapsed + 1 if collapsed else 0
        if self.collapsed == COLLAPSED_SETS:
            self.collapsed = 0  # a run that goes on with other settings has as many sets to recover
            raise ObjectiveError(f"the policy has collapsed, {COLLAPSED_SETS} sets of rollouts in a row: "
                                 f"{faults[collapsed[0]][1]}")

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        kept = [{**batch._asdict(), "drawn": batch.drawn._asdict(), "teacher": batch.teacher.hidden}
                for batch in self.kept if self.passes_left]
        return {"made": self.made, "passes_left": self.passes_left, "rows": self.rows, "collapsed": self.collapsed,
                "warned": sorted(self.warned), "kept": on_cpu(kept)}

    def load_state_dict(self, state: dict) -> None:
        self.made, self.passes_left, self.rows = state["made"], state["passes_left"], state["rows"]
        self.collapsed, self.warned = state["collapsed"], set(state["warned"])
        device = self.student.device
        self.kept = []
        for batch in state["kept"]:
            drawn = {name: each.to(device) if isinstance(each, Tensor) else each
                     for name, each in batch["drawn"].items()}
            teacher = TeacherHidden(batch["teacher"].to(device), self.teacher.head)
            self.kept.append(RolloutBatch(**{**batch, "drawn": PolicyTokens(**drawn), "teacher": teacher}))


def on_cpu(value):
    """Tensors of nested lists and dicts on the CPU, with no more storage than they show."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {name: on_cpu(each) for name, each in value.items()}
    return [on_cpu(each) for each in value] if isinstance(value, list) else value


def padded(values: Tensor, tokens: list[list[int]], like: Tensor) -> Tensor:
    """Values [N] of the sequences' tokens, one sequence after the other, as [R, L]."""
    result = torch.zeros_like(like)
    result[real_tokens(tokens, like.shape[1], like.device)] = values.to(like)
    return result


def on_highlights(teacher: Teacher, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> RolloutBatch:
    """The highlights as if they were rollouts without any advantage."""
    outputs = teacher.outputs(input_ids, attention_mask, labels)
    index, targets = label_positions(labels)
    counts = torch.bincount(index // labels.shape[1], minlength=len(labels)).tolist()
    zeros = torch.zeros(len(targets), device=outputs.hidden.device)
    ones = torch.ones_like(zeros)
    return RolloutBatch(input_ids, attention_mask, labels,
                        PolicyTokens(targets, counts, zeros, zeros, ones, ones, zeros), outputs)
