"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

import inspect
import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from utils.config.fine_tune import OptimizerKwargs
from utils.config.load import ConfigError
from utils.text import shorten
from utils.training.step import first_nonfinite


def build_optimizer(module: nn.Module, options: OptimizerKwargs) -> torch.optim.Optimizer:
    """The optimizer of a config's `optimizer_kwargs` over the trainable parameters of `module`.

    Weight decay skips biases and norms (parameters of one dimension) unless decay_all. The fused version is used if
    torch has one, unless kwargs say otherwise.

    Raises:
        ConfigError: an unknown type, one that this loop cannot drive, or kwargs that it does not accept.
    """
    name, kwargs, lr = options.type, options.kwargs, options.lm_lr
    cls = getattr(torch.optim, name, None)
    if not inspect.isclass(cls) or not issubclass(cls, torch.optim.Optimizer) or cls is torch.optim.Optimizer:
        known = sorted(key for key, value in vars(torch.optim).items() if inspect.isclass(value) and key != "Optimizer")
        raise ConfigError(f'optimizer_kwargs.type is "{name}": expected a class of torch.optim: {", ".join(known)}')
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": parameters}]
    if not options.decay_all:
        flat = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = [{"params": [parameter for parameter in parameters if parameter.dim() >= 2]}]
        if flat:
            groups.append({"params": flat, "weight_decay": 0.0})
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    accepted = inspect.signature(cls.__init__).parameters
    if not options.decay_all and "weight_decay" not in accepted:
        groups = [{"params": parameters}]
    if "fused" in accepted and not settings.keys() & {"fused", "foreach", "differentiable"}:
        settings["fused"] = True
    try:
        # A step on a parameter of its own: some wrong settings show only then.
        parameter = nn.Parameter(torch.zeros(2, 2))
        parameter.grad = torch.ones(2, 2)
        cls([parameter], lr=lr, **settings).step()
        if not parameter.isfinite().all():
            raise ValueError("a step gives weights that are not finite")
        return cls(groups, lr=lr, **settings)
    except Exception as error:  # torch raises almost anything for wrong arguments
        reason = shorten(" ".join(str(error).split()), 300)
        raise ConfigError(f'optimizer_kwargs.type "{name}" with lm_lr {lr} and kwargs {kwargs} fails: {reason}; change '
                          "one of them") from error


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore a checkpoint's moments and last learning rate; all other settings stay the config's.

    Raises:
        ValueError: the state does not fit, or is not finite, so that the next step would ruin the weights.
    """
    settings = [{key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    if name := find_nonfinite_state(optimizer):
        raise ValueError(f"the optimizer's {name} is not finite")


def find_nonfinite_state(optimizer: torch.optim.Optimizer) -> str | None:
    """The name of the first tensor of the optimizer's state that is not finite, or None."""
    return first_nonfinite(chain.from_iterable(values.items() for values in optimizer.state.values()))


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
        """The rate of optimizer step `step`, counted from 0; a warm-up begins at rate 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        remaining = max(0.0, (self.total - step) / max(1, self.total - self.warmup))
        share = remaining if self.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * remaining)
        return self.peak * (self.floor + (1.0 - self.floor) * share)


def make_schedule(scheduler_kwargs, peak: float, total: int) -> LRSchedule:
    """The schedule of a config's `lr_scheduler_kwargs`; total: optimizer steps of the run."""
    if scheduler_kwargs.num_training_steps != -1:
        total = scheduler_kwargs.num_training_steps
    warmup = scheduler_kwargs.num_warmup_steps
    if warmup == -1:
        warmup = total // 10
    if scheduler_kwargs.max_warmup_steps is not None:
        warmup = min(warmup, scheduler_kwargs.max_warmup_steps)
    return LRSchedule(peak, min(warmup, total), total, scheduler_kwargs.type, scheduler_kwargs.min_lr_ratio)


def schedule_notices(schedule: LRSchedule, steps: int) -> list[str]:
    """One line for each way in which a schedule does not fit a run of `steps` optimizer steps."""
    notices = []
    if schedule.warmup >= steps:
        notices.append(f"lr_scheduler_kwargs: all {steps} optimizer steps of the run are warm-up; lower "
                       "num_warmup_steps or num_training_steps")
    if schedule.total < steps:
        notices.append(f"lr_scheduler_kwargs.num_training_steps is {schedule.total}, but the run has {steps} optimizer "
                       f"steps: after step {schedule.total} the learning rate stays "
                       f"{schedule.learning_rate(schedule.total):.2e}; set num_training_steps to -1, or raise "
                       "min_lr_ratio")
    return notices
