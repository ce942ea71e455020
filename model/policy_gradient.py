"""Policy-gradient distillation: the student's own sequences, rewarded by the teacher, after MiniLLM."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from model.decoding.rollout_buffer import RolloutBatch, RolloutBuffer, on_highlights
from model.decoding.rollouts import RolloutOptions
from model.language_model import LanguageModel
from model.losses.penalties import unit_embeddings
from model.losses.policy_loss import Penalties, PolicyTokens, policy_loss
from model.losses.vocabulary_loss import vocabulary_loss
from model.objective import LossTerms, arguments_of
from model.teacher import Teacher
from model.transfer import to_device
from model.vocabulary import shared_vocabulary


class TeacherStudent(nn.Module):
    """The reverse KL of whole sequences, E_{y~q}[log q(y|x) - log p(y|x)], by policy gradient on rollouts.

    loss = (1 - lm_weight) (single step + long term + penalties) + lm_weight CE, where the first part is a mean over the
    tokens of the rollouts and CE the mean cross-entropy of the highlights (MiniLLM, arXiv 2306.08543, section 2.2).

    - single step: the reverse KL of the next token, at every state that a rollout visits, exact.
    - long term: what follows a token, R_{t+1} = sum_{t' > t} log p(y_t') - log q(y_t'), divided by the tokens that
      remain (normalize_rewards), as the advantage of log q(y_t), clipped as in PPO.
    - importance weights: rollouts are drawn from alpha p + (1 - alpha) q. "sequence" multiplies q / p~ over the
      sequence: unbiased. "token" takes the token's own ratio: less variance, some bias.

    Bias of the expected gradient, measured: its distance from the gradient of the sequence-level reverse KL, relative
    to that gradient's norm, with all sequences enumerated, as a mean over 20 random toys (3 tokens, sequences of up to
    3). Without normalize_rewards, whiten and clip_epsilon: 0 with "sequence" weights, and with both at alpha 0; "token"
    weights 0.23 at alpha 0.2 and 0.56 at alpha 0.5; normalize_rewards 0.21 at alpha 0; "token" weights with
    clip_epsilon 0.2 0.25 at alpha 0.2, and with normalize_rewards too, which is the default, 0.35.

    language_model: the student, without dropout: the probabilities must be the same while drawing and in the loss.
    penalty: adds the penalties of `model/losses/penalties.py` on the student's distributions along the sequences; with
    rollout "labels" those are its conditional distributions on the highlights, not on what it generates.
    rollout: "mixed" (alpha), "student", "teacher" or "labels" (the highlights themselves: no sampling, weights 1).
    rollout_epochs: optimizer steps in a row that use one set of rollouts. rollout_batch_size: rows decoded at a time.
    shorten: cuts a row's prompt so that max_generation_length tokens fit behind it. vocabulary: number of real tokens;
    None asks the two tokenizers. autocast: context of the student's forward pass. all_reduce: adds up a tensor over
    all processes. say: takes warnings.

    In eval mode nothing is drawn: the loss is that of the highlights, without long-term part and penalties.

    Raises:
        ValueError: a number or name out of range.
        ModelError: teacher and student have different vocabularies.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        teacher: Teacher,
        penalty: bool = False,
        *,
        temperature: float = 1.0,
        rollout: str = "mixed",
        alpha: float = 0.2,
        rollout_temperature: float = 1.0,
        rollout_top_k: int | None = None,
        rollout_top_p: float | None = None,
        rollout_batch_size: int = 8,
        rollout_epochs: int = 1,
        max_generation_length: int = 80,
        importance_weight: str = "token",
        normalize_rewards: bool = True,
        whiten: bool = False,
        lm_weight: float = 0.5,
        clip_epsilon: float | None = 0.2,
        frequency_weight: float = 0.1,
        diversity_weight: float = 0.1,
        entropy_weight: float = 0.01,
        entropy_floor: float | None = None,
        chunk_size: int = 128,
        vocabulary: int | None = None,
        seed: int = 1234,
        shorten: Callable[[list[int]], list[int]] = lambda prompt: prompt,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        say: Callable[[str], None] = print,
    ):
        super().__init__()
        check_numbers(temperature, lm_weight, clip_epsilon, chunk_size)
        if penalty:
            check_penalties(frequency_weight, diversity_weight, entropy_weight, entropy_floor)
        if vocabulary is None:
            vocabulary = shared_vocabulary(teacher.language_model.tokenizer, language_model.tokenizer)
        self.language_model, self.teacher, self.vocabulary = language_model, teacher, vocabulary
        self.temperature, self.lm_weight, self.clip_epsilon = temperature, lm_weight, clip_epsilon
        self.chunk_size = chunk_size
        floor = 0.1 * math.log(vocabulary) if entropy_floor is None else entropy_floor
        self.penalties = Penalties(frequency_weight, diversity_weight, entropy_weight, floor, None) if penalty else None
        options = RolloutOptions(
            rollout, alpha, rollout_temperature, rollout_top_k, rollout_top_p, max_generation_length,
            rollout_batch_size, seed,
        )
        self.sets = RolloutBuffer(
            language_model, teacher, options, vocabulary, temperature=temperature, importance_weight=importance_weight,
            normalize=normalize_rewards, whiten=whiten, epochs=rollout_epochs, chunk_size=chunk_size, shorten=shorten,
            autocast=autocast, all_reduce=all_reduce, say=say,
        )

    @property
    def passes(self) -> int:
        return self.sets.epochs

    def iter_steps(self, table, batches: Iterable[dict], counts: list[int]) -> Iterator[Iterator[tuple]]:
        """The arguments of `forward`, step by step; in training mode with rollouts, drawn when a step begins.

        Raises:
            ObjectiveError: rewards that are not finite, or a collapsed policy; before anything is learnt from them.
        """
        batches = iter(batches)
        for count in counts:
            own = list(islice(batches, count))
            drawn = self.sets.of_step(table, own) if self.training else [None] * count
            yield iter([(*arguments_of(batch), rollout) for batch, rollout in zip(own, drawn, strict=True)])

    def get_extra_state(self) -> dict:
        return self.sets.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.sets.load_state_dict(state)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        rollout: RolloutBatch | None = None,
    ) -> LossTerms:
        """input_ids [B, T] int64; attention_mask [B, T]; labels [B, T] int64, -100 = no loss; on the CPU or not.

        rollout: of `ahead`; None takes the highlights, with no advantage.
        """
        model = self.language_model
        head, lookup = model.head_and_lookup()
        if rollout is None:
            rollout = on_highlights(self.teacher, input_ids, attention_mask, labels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lm_weight > 0):
            hidden, targets = model.label_hidden(input_ids, attention_mask, labels, lookup)
            of_labels = vocabulary_loss(hidden, head, targets, vocabulary=self.vocabulary, factor=self.lm_weight,
                                        chunk_size=self.chunk_size)
        if rollout.input_ids is not input_ids or self.lm_weight == 0:
            hidden, _ = model.label_hidden(rollout.input_ids, rollout.attention_mask, rollout.labels, lookup)
        drawn = PolicyTokens(*(to_device(each, hidden.device) if isinstance(each, Tensor) else each
                               for each in rollout.drawn))
        of_rollout = policy_loss(
            hidden, head, drawn, rollout.teacher, vocabulary=self.vocabulary, temperature=self.temperature,
            clip_epsilon=self.clip_epsilon, penalties=self.penalties_now() if self.training else None,
            factor=(1 - self.lm_weight) * rollout.token_scale, chunk_size=self.chunk_size,
        )
        parts = {"cross_entropy": of_labels.cross_entropy,
                 **self.parts_of(rollout, drawn, of_rollout)}
        return LossTerms(of_labels.loss_sum + of_rollout.loss_sum, len(targets), parts)

    def penalties_now(self) -> Penalties | None:
        """With the student's embeddings as they are now."""
        if self.penalties is None or self.penalties.diversity == 0:
            return self.penalties
        weight = self.language_model.model.get_input_embeddings().weight[: self.vocabulary]
        return self.penalties._replace(embeddings=unit_embeddings(weight))

    def parts_of(self, rollout: RolloutBatch, drawn: PolicyTokens, loss) -> dict[str, Tensor]:
        """For the log: the loop divides by the step's label tokens, so sums over others are scaled to that."""
        single_step, entropy = loss.single_step * rollout.token_scale, loss.entropy * rollout.token_scale
        if not self.training:
            return {"single_step": single_step, "entropy": entropy}
        of_tokens = {"reward": drawn.rewards.sum(), "single_step": loss.single_step, "long_term": loss.long_term,
                     "importance_weight_mean": drawn.weights.sum(), "clip_fraction": loss.clipped,
                     "entropy": loss.entropy}
        if self.penalties is not None:
            measured = zip(self.penalties, ("frequency_penalty", "diversity_penalty", "entropy_penalty"), strict=False)
            of_tokens |= {name: getattr(loss, name) for weight, name in measured if weight}
        of_sequences = {"sequence_reverse_kl": -drawn.rewards.sum(),
                        "rollout_length": torch.full((), float(sum(drawn.counts)), device=drawn.rewards.device)}
        return {**{name: value * rollout.token_scale for name, value in of_tokens.items()},
                **{name: value * rollout.sequence_scale for name, value in of_sequences.items()}}


def check_numbers(temperature: float, lm_weight: float, clip_epsilon: float | None, chunk_size: int) -> None:
    check(
        ("temperature", temperature, temperature > 0, "a number greater than 0"),
        ("lm_weight", lm_weight, 0 <= lm_weight <= 1, "a number from 0 to 1"),
        ("clip_epsilon", clip_epsilon, clip_epsilon is None or 0 < clip_epsilon < 1, "one between 0 and 1, or None"),
        ("chunk_size", chunk_size, chunk_size >= 1, "at least 1"),
    )


def check_penalties(frequency: float, diversity: float, entropy: float, entropy_floor: float | None) -> None:
    check(
        *((f"{name}_weight", weight, weight >= 0, "a number of at least 0")
          for name, weight in (("frequency", frequency), ("diversity", diversity), ("entropy", entropy))),
        ("entropy_floor", entropy_floor, entropy_floor is None or entropy_floor > 0, "one greater than 0, or None"),
    )


def check(*numbers: tuple[str, float | None, bool, str]) -> None:
    for name, value, good, expected in numbers:
        if not good:
            raise ValueError(f"{name} is {value}: expected {expected}")
