"""The frozen teacher: its hidden states at the label positions, computed one batch ahead of the student."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from model.language_model import LanguageModel
from model.losses.output_head import OutputHead, autocast_type
from model.losses.vocabulary_loss import TeacherHidden
from model.objective import arguments_of
from model.transfer import to_device


class Teacher:
    """A frozen language model: in eval mode, without gradients, in no optimizer and no checkpoint.

    Not an `nn.Module`, so that a module which holds it neither lists its weights nor sets it to training mode.

    language_model: on the teacher's device; it is modified (eval mode, requires_grad False, and under autocast the
    weights of its products in autocast's type).
    student_device: where its outputs are used; the head is copied there once. None = the same device.
    autocast: context of its forward pass.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        student_device: torch.device | str | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.language_model = language_model.eval().requires_grad_(False)
        self.student_device = torch.device(language_model.device if student_device is None else student_device)
        self.autocast = autocast
        with autocast():
            dtype = autocast_type(language_model.model.get_input_embeddings().weight)
        cast_products(language_model.model.base_model, dtype)
        self.head: OutputHead = move_head(language_model.output_head(), self.student_device, dtype)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        """Hidden states [N, Dt] at the label positions, on the teacher's device; nothing here waits for it."""
        with self.autocast():
            return self.language_model.label_hidden(input_ids, attention_mask, labels)[0]

    def to_student(self, hidden: Tensor) -> TeacherHidden:
        """The hidden states on the student's device, with the head."""
        return TeacherHidden(to_device(hidden, self.student_device), self.head)

    def outputs(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> TeacherHidden:
        """What `TeacherStudent` needs of one batch."""
        return self.to_student(self.hidden(input_ids, attention_mask, labels))

    def iter_steps(self, table, batches: Iterable[dict]) -> Iterator[tuple[Tensor, Tensor, Tensor, TeacherHidden]]:
        """The arguments of `TeacherStudent.forward` for each collated batch, the teacher one batch ahead.

        So a teacher on its own device computes while the student does. A batch's outputs are copied to the student
        before the next batch is started, because copies queue behind the work that a device was given earlier.
        """
        started = None
        for batch in batches:
            ready = started and (*started[0], self.to_student(started[1]))
            inputs = arguments_of(batch)
            started = inputs, self.hidden(*inputs)
            if ready:
                yield ready
        if started:
            yield *started[0], self.to_student(started[1])


def cast_products(base_model: nn.Module, dtype: torch.dtype) -> None:
    """Casts once what autocast would cast in each forward pass; a teacher's weights are constant."""
    for module in base_model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.to(dtype)


def move_head(head: OutputHead, device: torch.device, dtype: torch.dtype | None = None) -> OutputHead:
    """The head's tensors, detached, on a device; dtype: of the weight, None = its own."""
    bias, gaps = (None if tensor is None else tensor.detach().to(device) for tensor in (head.bias, head.gaps))
    return head._replace(weight=head.weight.detach().to(device, dtype), bias=bias, gaps=gaps)
