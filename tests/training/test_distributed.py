"""Two processes of torch's launcher on the CPU (gloo) train what one process trains."""

import pytest
import torch

from tests.small_runs import (
    assert_equal_weights,
    changed,
    largest_difference,
    launch,
    make_project,
    metrics,
    weights,
)
from utils.errors import UserError
from utils.training.distributed import init_distributed


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Fault: gradients averaged over processes instead of divided by all label tokens, or rows done twice."""
    project = changed(
        make_project(tmp_path, rows=21), trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 4,
                                                         "metrics": ["rouge"], "save_predictions": True},
    )
    for processes in (1, 2):
        own = changed(project, trainer_kwargs={"output_dir": str(tmp_path / str(processes))})
        launch("train.py", tmp_path, own, processes, torchrun=processes == 2)
    one, two = tmp_path / "1", tmp_path / "2"
    found = [weights(folder / "model_checkpoints/last") for folder in (one, two)]
    assert largest_difference(*found) < 1e-5
    for split in ("train", "validation"):
        left, right = metrics(one, split), metrics(two, split)
        assert [line["step"] for line in left] == [line["step"] for line in right]
        for mine, theirs in zip(left, right, strict=True):
            assert mine.pop("split") == theirs.pop("split") == split
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    names = [path.name for path in (one / "predictions").iterdir()]
    assert sorted(names) == sorted(path.name for path in (two / "predictions").iterdir())


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    """Fault: only the main process's random generators are saved, so dropout of the others does not repeat."""
    project = changed(
        make_project(tmp_path, rows=16, dropout=0.2),
        trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 2}, lr_scheduler_kwargs={"num_training_steps": 8},
    )
    whole = changed(project, trainer_kwargs={"output_dir": str(tmp_path / "whole")})
    launch("train.py", tmp_path, whole, 2)
    parts = changed(project, trainer_kwargs={"output_dir": str(tmp_path / "parts"), "max_steps": 3})
    launch("train.py", tmp_path, parts, 2)
    assert "resuming from" in launch("train.py", tmp_path, changed(parts, trainer_kwargs={"max_steps": None}), 2)
    assert_equal_weights(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("whole", "parts")))


@pytest.mark.parametrize(("ids", "expected"), [((2,), "cuda:2"), ((), "cuda:1")])
def test_a_group_of_one(monkeypatch, ids, expected):
    """Fault: multi_gpu with one GPU trains on another than the one it names, or says nothing of it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in (("is_available", True), ("device_count", 4), ("set_device", None), ("get_device_name", "A"),
                        ("get_device_capability", (8, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    context = init_distributed("auto", 1, "auto", "key", True, ids)
    assert (str(context.device), context.precision, context.world_size) == (expected, "bfloat16", 1)
    assert context.notices == ["multi_gpu: there is only one GPU, so one process trains"]
    assert init_distributed("auto", 1, "float32", "key").notices == []
    with pytest.raises(UserError, match=r"^key is 5: expected one of the GPUs present: 0 \(A\), 1 \(A\), "):
        init_distributed("auto", 5, "auto", "key")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 of the launcher has no GPU"):
        init_distributed("auto", 1, "auto", "key", True, (3,))
