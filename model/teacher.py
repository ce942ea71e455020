"""The frozen teacher: its hidden states at the label positions, computed one batch ahead of the student."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from model.language_model import LanguageModel
from model.objective import arguments_of
from model.vocabulary_loss import OutputHead, TeacherHidden


class Teacher:
    """A language model that is only read: in eval mode, without gradients, in no optimizer and no checkpoint.

    It is no `nn.Module`, so that a module which holds it neither lists its weights nor sets it to training mode.

    language_model: on the teacher's device; it is changed (eval mode, requires_grad False).
    student_device: where its outputs are used; the head is copied there once. None: the same device.
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
        self.head: OutputHead = move_head(language_model.output_head(), self.student_device)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        """Hidden states [N, Dt] at the label positions, on the teacher's device; nothing here waits for it."""
        with self.autocast():
            return self.language_model.label_hidden(input_ids, attention_mask, labels)[0]

    def to_student(self, hidden: Tensor) -> TeacherHidden:
        """The hidden states on the student's device, with the head."""
        return TeacherHidden(hidden.to(self.student_device, non_blocking=True), self.head)

    def outputs(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> TeacherHidden:
        """What `TeacherStudent` needs of one batch."""
        return self.to_student(self.hidden(input_ids, attention_mask, labels))

    def ahead(self, table, batches: Iterable[dict]) -> Iterator[tuple[Tensor, Tensor, Tensor, TeacherHidden]]:
        """The arguments of `TeacherStudent.forward` for each collated batch, the teacher one batch ahead."""
        return one_ahead(
            batches, lambda batch: self.hidden(*arguments_of(batch)),
            lambda batch, hidden: (*arguments_of(batch), self.to_student(hidden)),
        )


def one_ahead(batches: Iterable[dict], start: Callable, finish: Callable) -> Iterator:
    """finish(batch, start(batch)) of each batch; the next one's start comes before a batch is handed out.

    So a teacher on a device of its own computes while the student does. This batch's finish, which copies to the
    student, comes before the next one's start, because copies queue behind what the device was given earlier.
    """
    waiting = None
    for batch in batches:
        ready = None if waiting is None else finish(*waiting)
        waiting = batch, start(batch)
        if ready is not None:
            yield ready
    if waiting is not None:
        yield finish(*waiting)


def move_head(head: OutputHead, device: torch.device) -> OutputHead:
    """The head's tensors, detached, on a device."""
    bias = None if head.bias is None else head.bias.detach().to(device)
    return head._replace(weight=head.weight.detach().to(device), bias=bias)
