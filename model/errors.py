"""The one exception of models that a user sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from torch import OutOfMemoryError


class ModelError(ValueError):
    """A model cannot be loaded or used; the message is one line for the user."""

    exit_code = 2


@contextmanager
def one_line_errors(text: str, with_reason: bool = True) -> Iterator[None]:
    """Turns whatever a library raises for a wrong file or value into a ModelError of one line.

    with_reason: adds the library's own message.
    """
    try:
        yield
    except (ModelError, OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, UnpicklingError):  # torch's own message advises to unpickle it
            reason = "its weights are damaged or more than tensors, and are not unpickled: save them as safetensors"
        raise ModelError(f"{text}: {reason}" if with_reason else text) from error
