"""Memory that runs out on demand: torch's errors, raised by patched parts of the product."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from model.language_model import LanguageModel

# What torch and Python say when out of memory, on a GPU and on a CPU.
GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.12 GiB is free."
)
CPU_ERRORS = (
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:90] data. DefaultCPUAllocator: not enough memory: you tried to "
                 "allocate 4294967296 bytes."),
    MemoryError(),
)


def always(*arguments) -> bool:
    return True


@contextlib.contextmanager
def full_in(owner, name: str, error: Exception, when: Callable[..., bool] = always) -> Iterator[None]:
    """`owner.name` raises the error where `when` of its arguments says so."""
    whole = getattr(owner, name)

    def limited(*arguments, **options):
        if when(*arguments):
            raise type(error)(*error.args)
        return whole(*arguments, **options)

    with mock.patch.object(owner, name, limited):
        yield


def full_in_forward(error: Exception, most_tokens: int, training: bool = True):
    """Batches of more than so many tokens, padding included, do not fit into the model that is trained (while it is
    trained, or else measured). Models are distinguished by whether their weights can be trained."""
    def when(model: LanguageModel, input_ids: torch.Tensor, *others) -> bool:
        trained = next(model.parameters()).requires_grad
        return trained and model.training == training and input_ids.numel() > most_tokens

    return full_in(LanguageModel, "label_hidden", error, when)
