"""Tensors to another device, without waiting for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`; nothing here waits for a GPU, but on the way back from one to the CPU.

    From the CPU by pinned memory: of other memory a GPU's driver makes a copy first, when all earlier work is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # To the CPU a copy that is not waited for would be read before it is there.
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
