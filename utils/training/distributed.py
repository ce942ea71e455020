"""Device, precision and process group."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn

from utils.errors import UserError

BUCKET = 1 << 24  # gradient values sent together: 64 MiB


@dataclass(frozen=True)
class DistributedContext:
    """A process's device, the precision of its forward passes, and its rank in the group."""

    device: torch.device
    precision: str = "float32"
    rank: int = 0
    world_size: int = 1
    notices: list[str] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """bfloat16 autocast if the precision says so. Weights and gradients stay float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def describe(self) -> str:
        """One line for the start of a run."""
        if self.device.type == "cuda":
            name = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        else:
            name = f"CPU ({torch.get_num_threads()} threads)"
        group = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"device: {name}, {self.precision}{' autocast' if self.precision != 'float32' else ''}{group}"

    # -- collectives; with one process they return at once ----------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any process."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)))

    def all_gather_object(self, value: object) -> list:
        """The value of every process, in order of rank, on every process. Pickles it: not for the training loop."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: object) -> object:
        """The main process's value, on every process. Pickles it: not for the training loop."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()


def all_reduce_gradients(parameters: list[nn.Parameter], context: DistributedContext) -> None:
    """Sums the gradients of all processes, in place, in messages of about BUCKET values.

    Not DistributedDataParallel: that takes means, and needs equally many micro-batches on every process.
    """
    if context.world_size == 1:
        return
    bucket: list[Tensor] = []
    for index, parameter in enumerate(parameters):
        if parameter.grad is None:  # this process had no micro-batch in the step
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if index == len(parameters) - 1 or sum(map(Tensor.numel, bucket)) >= BUCKET:
            flat = context.all_reduce(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket = []


def choose_device(device: str, gpu_device_id: int | None, key: str) -> tuple[torch.device, list[str]]:
    """The device and notices for the user.

    device: "auto" (a GPU if there is one), "cuda" or "cpu". gpu_device_id: which GPU; None is 0. key: its name in the
    config.

    Raises:
        UserError: no GPU has that number.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu":
        return torch.device("cpu"), []
    if not present:
        asked = ['device "cuda"'] if device == "cuda" else []
        asked += [f"{key} {gpu_device_id}"] if gpu_device_id else []
        return torch.device("cpu"), [f"no GPU here: {' and '.join(asked)} ignored, running on the CPU"] if asked else []
    number = gpu_device_id or 0
    if number >= present:
        gpus = ", ".join(f"{index} ({torch.cuda.get_device_name(index)})" for index in range(present))
        raise UserError(f"{key} is {number}: expected one of the GPUs present: {gpus}")
    return torch.device("cuda", number), []


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run natively: GPUs from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def init_distributed(
    device: str, gpu_device_id: int | None, precision: str, key: str, multi_gpu: bool = False,
    multi_gpu_ids: tuple | list = (),
) -> DistributedContext:
    """This process's device, precision and rank; joins the process group if torch's launcher started it.

    device, gpu_device_id, key: see `choose_device`.

    Raises:
        UserError: a GPU that is not there.
    """
    world_size, rank, local_rank = (int(os.environ.get(name) or default) for name, default in
                                    (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    in_group = world_size > 1 or (multi_gpu and multi_gpu_ids)  # a group of one takes the GPU that is named for it
    if in_group and torch.cuda.is_available() and device != "cpu":
        gpus = gpus_of_group(multi_gpu_ids)
        if local_rank >= len(gpus):
            raise UserError(
                f"process {local_rank} of the launcher has no GPU: multi_gpu_ids names {list(gpus)}; "
                f"start at most {len(gpus)} processes"
            )
        gpu_device_id = gpus[local_rank]
    chosen, notices = choose_device(device, gpu_device_id, key)
    if multi_gpu and chosen.type == "cpu":
        notices.append("no GPU in use: multi_gpu ignored")
    elif multi_gpu and world_size == 1:
        notices.append("multi_gpu: there is only one GPU, so one process trains")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(chosen) else "float32"
    return DistributedContext(chosen, precision, rank, world_size, notices)


def gpus_of_group(multi_gpu_ids: tuple | list) -> list[int]:
    """GPUs for data parallelism: those named, else all."""
    present = torch.cuda.device_count()
    gpus = list(multi_gpu_ids) or list(range(present))
    for gpu in gpus:
        if not 0 <= gpu < present:
            raise UserError(f"multi_gpu_ids holds {gpu}: expected numbers of the {present} GPUs present, from 0")
    return gpus


def launch_group(device: str, multi_gpu: bool, multi_gpu_ids: tuple | list) -> None:
    """If data parallelism is wanted and possible and no launcher started this process: restart it through torch's
    launcher, without returning."""
    if not multi_gpu or "WORLD_SIZE" in os.environ or device == "cpu" or not torch.cuda.is_available():
        return
    gpus = gpus_of_group(multi_gpu_ids)
    if len(gpus) < 2:
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={len(gpus)}"]
    os.execv(shutil.which(sys.executable) or sys.executable, [sys.executable, *launcher, *sys.argv])
