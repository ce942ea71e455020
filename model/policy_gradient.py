"""Policy-gradient distillation: the student's own sequences, rewarded by the teacher, after MiniLLM."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from model.decoding.rollout_buffer import RolloutBatch, RolloutBuffer, from_reference_summaries
from model.decoding.rollouts import RolloutConfig
from model.decoding.sampling import SamplingOptions
from model.language_model import LanguageModel
from model.losses.penalties import unit_embeddings
from model.losses.policy_loss import Penalties, PolicyLoss, PolicyTokens, policy_loss
from model.losses.vocabulary_loss import vocabulary_loss
from model.objective import LossTerms, arguments_of
from model.teacher import Teacher
from model.transfer import to_device
from model.vocabulary import shared_vocabulary


class TeacherStudent(nn.Module):
    """The reverse KL of whole sequences, E_{y~q}[log q(y|x) - log p(y|x)], by policy gradient on rollouts.

    loss = (1 - lm_weight) (single step + long term + penalties) + lm_weight CE, where the first part is a mean over the
    tokens of the rollouts and CE the mean cross-entropy of the highlights (MiniLLM, arXiv 2306.08543, section 2.2).

    - single step: the reverse KL of the next token at every state that a rollout visits, exact.
    - long term: the rewards after a token, R_{t+1} = sum_{t' > t} log p(y_t') - log q(y_t'), divided by the number of
      tokens that remain (`normalize`), as the advantage of log q(y_t), clipped as in PPO (`long_term_rewards`).
    - importance weights: rollouts are sampled from p~ = alpha p + (1 - alpha) q. "sequence" multiplies q / p~ over the
      sequence. "token" takes the token's own ratio: less variance, some bias.

    Without normalize, whiten and clip_epsilon the expected gradient is exactly that of the reverse KL, with "sequence"
    weights or alpha 0 (tests/model/test_policy_gradient.py enumerates all sequences of a toy). Each of the three, and
    "token" weights with alpha > 0, trade bias for variance.

    language_model: the student, without dropout: its probabilities must be the same while sampling and in the loss.
    penalty: adds the penalties on the student's distributions along the sequences; without sampling those are its
    conditional distributions on the highlights, not on what it generates. penalties: their weights.
    clip_epsilon: None = no clipping. rollouts: of these two models; None = sampled with the default settings.

    In eval mode nothing is sampled: the loss is that of the highlights, without long-term part and penalties.

    Raises:
        ModelError: teacher and student have different vocabularies.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        teacher: Teacher,
        penalty: bool = False,
        lm_weight: float = 0.5,
        clip_epsilon: float | None = 0.2,
        penalties: Penalties | None = None,
        rollouts: RolloutBuffer | None = None,
    ):
        super().__init__()
        if rollouts is None:
            vocabulary = shared_vocabulary(teacher.language_model.tokenizer, language_model.tokenizer)
            rollouts = RolloutBuffer(language_model, teacher, RolloutConfig(SamplingOptions()), vocabulary)
        self.language_model, self.teacher, self.rollouts = language_model, teacher, rollouts
        self.lm_weight, self.clip_epsilon = lm_weight, clip_epsilon
        self.penalties = (penalties or Penalties()) if penalty else None

    @property
    def passes(self) -> int:
        return self.rollouts.config.epochs

    def iter_steps(self, table, batches: Iterable[dict], counts: list[int]) -> Iterator[Iterator[tuple]]:
        """The arguments of `forward`, step by step; in training mode with rollouts, sampled when a step begins.

        Raises:
            ObjectiveError: rewards that are not finite, before anything is learnt from them.
        """
        batches = iter(batches)
        for count in counts:
            own = list(islice(batches, count))
            drawn = self.rollouts.for_step(table, own) if self.training else [None] * count
            yield iter([(*arguments_of(batch), rollout) for batch, rollout in zip(own, drawn, strict=True)])

    def get_extra_state(self) -> dict:
        return self.rollouts.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.rollouts.load_state_dict(state)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        rollout: RolloutBatch | None = None,
    ) -> LossTerms:
        """input_ids [B, T] int64; attention_mask [B, T]; labels [B, T] int64, -100 = no loss; on the CPU or not.

        rollout: of `iter_steps`; None takes the highlights, without any advantage.
        """
        model = self.language_model
        options = {"vocabulary": self.rollouts.vocabulary, "chunk_size": self.rollouts.chunk_size}
        head, embedding_weight = model.tied_head()
        if rollout is None:
            rollout = from_reference_summaries(self.teacher, input_ids, attention_mask, labels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lm_weight > 0):
            hidden, targets = model.label_hidden(input_ids, attention_mask, labels, embedding_weight)
            ce_loss = vocabulary_loss(hidden, head, targets, scale=self.lm_weight, **options)
        if rollout.input_ids is not input_ids or self.lm_weight == 0:
            hidden, _ = model.label_hidden(rollout.input_ids, rollout.attention_mask, rollout.labels, embedding_weight)
        drawn = PolicyTokens(*(to_device(value, hidden.device) if isinstance(value, Tensor) else value
                               for value in rollout.drawn))
        rollout_loss = policy_loss(
            hidden, head, drawn, rollout.teacher, temperature=self.rollouts.rewards.temperature,
            clip_epsilon=self.clip_epsilon, penalties=self.current_penalties() if self.training else None,
            scale=(1 - self.lm_weight) * rollout.token_scale, **options,
        )
        parts = {"cross_entropy": ce_loss.cross_entropy, **self.logged_parts(rollout, drawn, rollout_loss)}
        return LossTerms(ce_loss.loss_sum + rollout_loss.loss_sum, len(targets), parts)

    def current_penalties(self) -> Penalties | None:
        """The penalties with the student's present embeddings, and the default entropy_floor."""
        if self.penalties is None:
            return None
        vocabulary, embeddings = self.rollouts.vocabulary, None
        if self.penalties.diversity:
            embeddings = unit_embeddings(self.language_model.model.get_input_embeddings().weight[:vocabulary])
        floor = self.penalties.entropy_floor or 0.1 * math.log(vocabulary)
        return self.penalties._replace(entropy_floor=floor, embeddings=embeddings)

    def logged_parts(self, rollout: RolloutBatch, drawn: PolicyTokens, loss: PolicyLoss) -> dict[str, Tensor]:
        """Sums for the log, scaled such that the loop's division by the step's label tokens gives means over tokens or
        sequences of the rollouts."""
        token_sums = {"single_step": loss.single_step, "entropy": loss.entropy}
        sequence_sums = {}
        if self.training:
            token_sums |= {"reward": drawn.rewards.sum(), "long_term": loss.long_term,
                           "importance_weight_mean": drawn.weights.sum(), "clip_fraction": loss.clipped}
            if self.penalties is not None:
                names = ("frequency_penalty", "diversity_penalty", "entropy_penalty")
                token_sums |= {name: getattr(loss, name) for name, weight in zip(names, self.penalties, strict=False)
                               if weight}
            sequence_sums = {"sequence_reverse_kl": -drawn.rewards.sum(),
                             "rollout_length": torch.full((), float(sum(drawn.counts)), device=drawn.rewards.device)}
        return {**{name: value * rollout.token_scale for name, value in token_sums.items()},
                **{name: value * rollout.sequence_scale for name, value in sequence_sums.items()}}
