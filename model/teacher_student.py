"""Divergence distillation: the student learns from the highlights and from the teacher's distributions."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from model.divergences import choose_divergence
from model.language_model import LanguageModel
from model.objective import LossTerms
from model.teacher import Teacher
from model.vocabulary import shared_vocabulary
from model.vocabulary_loss import TeacherHidden, TeacherTopK, vocabulary_loss


class TeacherStudent(nn.Module):
    """loss_sum = sum over label tokens of (1 - kd_weight) CE + kd_weight temperature^2 D(p, q).

    p and q are the distributions of teacher and student at `temperature`, D the divergence `kl_div` of them
    (`model/divergences.py` lists names and sources); CE is the cross-entropy of the label at temperature 1. The square
    keeps the gradient's scale as the temperature changes (Hinton et al. 2015, arXiv 1503.02531, section 2).

    language_model: the student. teacher: a `Teacher`, or what has its `outputs` and `ahead`.
    vocabulary: number of real tokens; None asks the two tokenizers.
    chunk_size: label positions whose logits exist at a time.

    Raises:
        ValueError: an unknown kl_div, or a number out of range.
        ModelError: teacher and student have different vocabularies.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        teacher: Teacher,
        kl_div: str = "forward",
        temperature: float = 1.0,
        kd_weight: float = 0.5,
        beta: float = 0.5,
        lambda_: float = 0.1,
        mu: float = 0.5,
        chunk_size: int = 128,
        vocabulary: int | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: expected a number greater than 0")
        if not 0 <= kd_weight <= 1:
            raise ValueError(f"kd_weight is {kd_weight}: expected a number from 0 to 1")
        self.language_model, self.teacher = language_model, teacher
        self.divergence = choose_divergence(kl_div, beta, lambda_, mu)
        self.temperature, self.kd_weight, self.chunk_size = temperature, kd_weight, chunk_size
        if vocabulary is None:
            vocabulary = shared_vocabulary(teacher.language_model.tokenizer, language_model.tokenizer)
        self.vocabulary = vocabulary

    def ahead(self, table, batches: Iterable[dict]) -> Iterator[tuple]:
        """The arguments of `forward` for each collated batch of a table's rows, the teacher one batch ahead."""
        return self.teacher.ahead(table, batches)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        teacher_outputs: TeacherHidden | TeacherTopK | None = None,
    ) -> LossTerms:
        """input_ids [B, T] int64; attention_mask [B, T]; labels [B, T] int64, -100 = no loss; on the CPU or not.

        teacher_outputs: of the same batch, on the student's device; None computes them now. A batch without any label
        gives exactly 0 with zero gradients.
        """
        if teacher_outputs is None:
            teacher_outputs = self.teacher.outputs(input_ids, attention_mask, labels)
        hidden, targets = self.language_model.label_hidden(input_ids, attention_mask, labels)
        loss = vocabulary_loss(
            hidden, self.language_model.output_head(), targets, vocabulary=self.vocabulary, teacher=teacher_outputs,
            divergence=self.divergence, temperature=self.temperature, kd_weight=self.kd_weight,
            chunk_size=self.chunk_size,
        )
        return LossTerms(loss.loss_sum, len(targets), {"cross_entropy": loss.cross_entropy,
                                                       "divergence": loss.divergence})
