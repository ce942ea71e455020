"""Parameter groups and learning rates."""

import pytest
import torch

from tests.conftest import tiny_gpt2
from utils.config.fine_tune import FineTuneConfig, OptimizerKwargs
from utils.config.load import ConfigError
from utils.training.optimization import LRSchedule, build_optimizer, make_schedule


def optimizer_kwargs(**keys) -> OptimizerKwargs:
    return OptimizerKwargs.model_validate({"lm_lr": 1e-3, **keys})


def rates(total, **keys):
    config = FineTuneConfig.model_validate({"lr_scheduler_kwargs": keys})
    schedule = make_schedule(config.lr_scheduler_kwargs, 1e-3, total)
    return [schedule.learning_rate(step) for step in range(total)]


def test_warm_up_and_decay_in_optimizer_steps():
    """Fault: a scheduler stepped per micro-batch runs out after a quarter of the updates (case A17)."""
    assert rates(6, num_warmup_steps=2) == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(("keys", "warmup"), [
    ({}, 10), ({"max_warmup_steps": 4}, 4), ({"num_warmup_steps": 0}, 0), ({"num_warmup_steps": 30}, 30),
    ({"num_training_steps": 50}, 5),
])
def test_sentinels_of_the_warm_up(keys, warmup):
    """Fault: -1 taken as a number of steps, or a cap that does nothing."""
    config = FineTuneConfig.model_validate({"lr_scheduler_kwargs": keys})
    assert make_schedule(config.lr_scheduler_kwargs, 1.0, 100).warmup == warmup


def test_no_decay_on_biases_and_norms():
    """Fault: weight decay pulls layer norms and biases to 0."""
    model = tiny_gpt2()
    optimizer = build_optimizer(model, optimizer_kwargs(kwargs={"weight_decay": 0.1}))
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        flat = name.endswith("bias") or ".ln_" in name
        assert decay[parameter] == (0.0 if flat else 0.1), name
    everything = build_optimizer(model, optimizer_kwargs(kwargs={"weight_decay": 0.1}, decay_all=True))
    assert {group["weight_decay"] for group in everything.param_groups} == {0.1}


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "NAdam", "RAdam", "Adagrad", "Rprop",
                                  "ASGD", "Adadelta", "Adamax"])
def test_classes_of_torch_optim_take_a_step(kind):
    """Fault: a class of torch.optim that users name fails in this loop."""
    model = tiny_gpt2()
    optimizer = build_optimizer(model, optimizer_kwargs(type=kind))
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "kwargs", "message"), [
    ("AdamX", {}, "optimizer_kwargs.type is \"AdamX\": expected a class of torch.optim: .*AdamW"),
    ("LBFGS", {}, "optimizer_kwargs.type \"LBFGS\" .*closure"),
    ("SparseAdam", {}, "optimizer_kwargs.type \"SparseAdam\" .*dense gradients"),
    ("AdamW", {"lr": 1.0}, "with lm_lr 0.001 and kwargs {'lr': 1.0} fails: .*multiple values"),
    ("AdamW", {"momentum": 0.9}, "kwargs {'momentum': 0.9} fails: .*momentum"),
    ("AdamW", {"betas": [0.9, 2.0]}, "fails: Invalid beta"),
])
def test_errors_name_the_key(kind, kwargs, message):
    """Fault: a traceback of torch where a key of the config is wrong."""
    with pytest.raises(ConfigError, match=message):
        build_optimizer(tiny_gpt2(), optimizer_kwargs(type=kind, kwargs=kwargs))


def test_cosine_and_floor():
    """Fault: a decay that ends below its floor, or a cosine that is not one."""
    schedule = LRSchedule(1.0, 0, 100, "cosine", 0.1)
    assert [schedule.learning_rate(step) for step in (0, 50, 100, 500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert LRSchedule(1.0, 0, 100, "linear", 0.1).learning_rate(50) == pytest.approx(0.55)
