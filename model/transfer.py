"""Copies tensors to another device without waiting for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`; only a copy from a GPU to the CPU waits.

    From the CPU through pinned memory: a GPU's driver copies other memory first, after all earlier work is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # A non-blocking copy to the CPU could be read before it has arrived.
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
