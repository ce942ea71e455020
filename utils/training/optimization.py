"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn

from utils.config.load import ConfigError, show
from utils.runs.checkpoint import CheckpointError
from utils.text import shorten


def build_optimizer(module: nn.Module, kind: str, kwargs: dict, lr: float, decay_all: bool = False):
    """An optimizer of `torch.optim` over the trainable parameters of `module`.

    Weight decay leaves out biases and norms (parameters of one dimension) unless decay_all. The fused version is used
    where torch has one, unless kwargs say otherwise.

    Raises:
        ConfigError: an unknown type, one that this loop cannot drive, or kwargs that it refuses.
    """
    cls = getattr(torch.optim, kind, None)
    if not inspect.isclass(cls) or not issubclass(cls, torch.optim.Optimizer) or cls is torch.optim.Optimizer:
        known = [name for name, value in vars(torch.optim).items() if inspect.isclass(value) and name != "Optimizer"]
        expected = ", ".join(sorted(known))
        raise ConfigError(f'optimizer_kwargs.type is "{kind}": expected a class of torch.optim: {expected}')
    if kind in ("LBFGS", "SparseAdam"):
        raise ConfigError(f'optimizer_kwargs.type is "{kind}": it needs another kind of loop; expected such as AdamW')
    if "lr" in kwargs:
        raise ConfigError("optimizer_kwargs.kwargs.lr: set optimizer_kwargs.lm_lr instead")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": parameters}]
    if not decay_all:
        flat = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = [{"params": [parameter for parameter in parameters if parameter.dim() >= 2]}]
        if flat:
            groups.append({"params": flat, "weight_decay": 0.0})
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    accepted = inspect.signature(cls.__init__).parameters
    if not decay_all and "weight_decay" not in accepted:
        groups = [{"params": parameters}]
    if "fused" in accepted and not settings.keys() & {"fused", "foreach", "differentiable"}:
        settings["fused"] = True
    try:
        try_a_step(cls, lr, settings)
        return cls(groups, lr=lr, **settings)
    except (
        TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError
    ) as error:
        reason = shorten(" ".join(str(error).split()), 300)
        raise ConfigError(f"optimizer_kwargs.kwargs is {show(kwargs)}: {kind} refuses them: {reason}; change them, or "
                          "optimizer_kwargs.type") from error


def try_a_step(cls, lr: float, settings: dict) -> None:
    """One step on a parameter of its own, since some wrong settings show only then."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    cls([parameter], lr=lr, **settings).step()


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The moments that a checkpoint holds; the settings stay the config's, but the rate of the last step, which every
    step sets anew, is the checkpoint's: saved again, it is the same.

    Raises:
        CheckpointError: a moment is not finite: the next step would ruin the weights.
    """
    settings = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if name := find_nonfinite_state(optimizer):
        raise CheckpointError(f"the optimizer's {name} in the checkpoint is not finite: resume from another checkpoint "
                              "(trainer_kwargs.resume_from) or start anew")


def find_nonfinite_state(optimizer: torch.optim.Optimizer) -> str | None:
    """The name of the first tensor of the optimizer's state that is not finite, or None."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and not value.isfinite().all():
                return name
    return None


@dataclass(frozen=True)
class LRSchedule:
    """Warm-up and decay of the learning rate, counted in optimizer steps.

    kind: "linear" or "cosine" decay, from the peak to peak * floor at `total` steps.
    """

    peak: float
    warmup: int
    total: int
    kind: str = "linear"
    floor: float = 0.0

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0: 0 at first where there is a warm-up."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        remaining = max(0.0, (self.total - step) / max(1, self.total - self.warmup))
        share = remaining if self.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * remaining)
        return self.peak * (self.floor + (1.0 - self.floor) * share)


def make_schedule(scheduler_kwargs, peak: float, total: int) -> LRSchedule:
    """The schedule of a config's `lr_scheduler_kwargs`; total: optimizer steps that the data give."""
    if scheduler_kwargs.num_training_steps != -1:
        total = scheduler_kwargs.num_training_steps
    warmup = scheduler_kwargs.num_warmup_steps
    if warmup == -1:
        warmup = total // 10
    if scheduler_kwargs.max_warmup_steps is not None:
        warmup = min(warmup, scheduler_kwargs.max_warmup_steps)
    return LRSchedule(peak, min(warmup, total), total, scheduler_kwargs.type, scheduler_kwargs.min_lr_ratio)


def schedule_notices(scheduler_kwargs, peak: float, steps: int) -> list[str]:
    """Where a config's `lr_scheduler_kwargs` do not fit a run of so many optimizer steps: one line each, with what
    becomes of them."""
    schedule = make_schedule(scheduler_kwargs, peak, steps)
    asked, total = scheduler_kwargs.num_warmup_steps, scheduler_kwargs.num_training_steps
    notices = []
    if asked > schedule.warmup:
        if scheduler_kwargs.max_warmup_steps == schedule.warmup:
            limit = f"max_warmup_steps is {schedule.warmup}"
        else:
            limit = f"the run has {steps} optimizer steps" if total == -1 else f"num_training_steps is {total}"
        notices.append(f"lr_scheduler_kwargs.num_warmup_steps is {asked}, but {limit}: warm-up takes {schedule.warmup} "
                       "steps; lower num_warmup_steps")
    elif schedule.warmup > steps:
        notices.append(f"lr_scheduler_kwargs: warm-up takes {schedule.warmup} steps, but the run has {steps}: the "
                       f"learning rate never reaches lm_lr ({peak:.2e}); lower num_warmup_steps or num_training_steps")
    if -1 < total < steps:
        notices.append(f"lr_scheduler_kwargs.num_training_steps is {total}, but the run has {steps} optimizer steps: "
                       f"after step {total} the learning rate stays {schedule.learning_rate(total):.2e}; set "
                       "num_training_steps to -1, or raise min_lr_ratio")
    return notices
