"""Which GPU, several of them, and full memory, on a CUDA GPU."""

import gc
import re
from pathlib import Path

import pytest
import torch
from torch import distributed

import train
import train_kd
from tests.conftest import write_rows
from tests.distillation.test_policy_runs import PENALTY, POLICY
from tests.evaluation import test_validate_model
from tests.gpu.test_cuda_runs import last
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import WORDS, changed, largest_difference, make_project, run, write_config
from tests.training.test_out_of_memory import last_error
from utils.errors import UserError
from utils.training.distributed import DistributedContext, init_distributed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# -- which GPU -------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there(tmp_path, capsys):
    """Fault: torch's "invalid device ordinal" in place of the GPUs that are present."""
    number = torch.cuda.device_count() + 4
    expected = f"is {number}: expected one of the GPUs present: 0 ({torch.cuda.get_device_name(0)})"
    config = changed(make_project(tmp_path, rows=4), trainer_kwargs={"device": "cuda"})
    assert run(tmp_path, changed(config, model_arch={"gpu_device_id": number})) == 2
    assert f"gpu_device_id {expected}" in last_error(capsys)
    kd = changed(make_kd_project(tmp_path, rows=4), trainer_kwargs={"device": "auto"})
    for key in ("teacher_gpu_device_id", "student_gpu_device_id"):
        assert run_kd(tmp_path, changed(kd, model_arch={key: number})) == 2
        assert f"model_arch.{key} {expected}" in last_error(capsys)
    csv = test_validate_model.write_news(tmp_path / "news.csv")
    assert test_validate_model.run(tmp_path, tmp_path / "model", csv, "--device_id", str(number))[0] == 2
    assert f"--device_id {expected}" in last_error(capsys)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="of a machine with one GPU")
def test_multi_gpu_with_one_gpu(tmp_path, capsys, monkeypatch):
    """Fault: multi_gpu fails or hangs where there is one GPU, or a second process takes the first one's."""
    config = changed(make_project(tmp_path, rows=4), trainer_kwargs={"device": "cuda", "multi_gpu": True})
    assert run(tmp_path, config) == 0
    assert "multi_gpu: there is only one GPU, so one process trains" in capsys.readouterr().err
    assert run(tmp_path, changed(config, trainer_kwargs={"multi_gpu_ids": [0, 3]})) == 2
    assert "multi_gpu_ids holds 3: expected numbers of the 1 GPUs present, from 0" in last_error(capsys)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"process 1 of the launcher has no GPU: multi_gpu_ids names \[0\]"):
        init_distributed("cuda", 0, "auto", "key", True)


def test_a_group_of_nccl(tmp_path):
    """Fault: NCCL, which takes tensors of the GPU alone, is handed others."""
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        context = DistributedContext(torch.device("cuda", 0), world_size=2)  # so that it asks the group
        assert context.all_reduce(torch.tensor([1.5, 2.0], device=context.device)).tolist() == [1.5, 2.0]
        assert context.all_gather_object({"loss": 1.5})[0] == {"loss": 1.5}
        assert context.broadcast_object(("a", 1)) == ("a", 1)
        context.barrier()
    finally:
        distributed.destroy_process_group()


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit_memory():
    """A function that leaves this process so many bytes of the GPU, beside what it holds."""
    def limit(size: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def heavy_project(folder: Path, **distillation) -> dict:
    """A model of 13 M parameters, 207 MB with gradients and moments, on rows of some 200 tokens, 19 MB each."""
    config = changed(make_project(folder, width=512, layers=4), dataset_kwargs={"train_batch_size": 48},
                     lr_scheduler_kwargs={"num_training_steps": 2},
                     trainer_kwargs={"device": "cuda", "monitor_val": False, "max_steps": 2})
    article = " ".join((WORDS * 3)[:30])
    write_rows(folder / "train.csv", [{"id": f"row-{number}", "article": article, "highlights": WORDS[number % 12]}
                                      for number in range(96)])
    return config


def find(folder: Path, config: dict, script=train) -> int:
    return script.main(["--config", str(write_config(folder, config)), "--find_batch_size"])


def test_full_memory_and_the_size_that_fits(tmp_path, capsys, limit_memory):
    """Fault: a full GPU ends in a traceback or spoils the checkpoint, or --find_batch_size finds what does not fit."""
    config = heavy_project(tmp_path)
    first = changed(config, dataset_kwargs={"train_batch_size": 2},
                    trainer_kwargs={"max_steps": 1, "gradient_accumulation_steps": 24})
    assert run(tmp_path, first) == 0
    before = last(tmp_path / "run")
    capsys.readouterr()

    limit_memory(600_000_000)
    assert run(tmp_path, config) == 1
    message = last_error(capsys)
    assert re.match(r"GPU out of memory: set dataset_kwargs.train_batch_size 24 \(now 48\) and "
                    r"trainer_kwargs.gradient_accumulation_steps 2 \(now (null|1)\): the optimizer steps stay the "
                    "same", message), message
    assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-1"
    assert largest_difference(before, last(tmp_path / "run")) == 0.0

    limit_memory(600_000_000)
    assert find(tmp_path, config) == 0
    printed = capsys.readouterr()
    size = int(re.search(r"largest batch that fits: (\d+) of the longest rows", printed.out)[1])
    assert 2 <= size < 48 and f"train_batch_size {size + 1}: does not fit" in printed.err, printed.err
    assert f"train_batch_size {size}: fits, peak " in printed.err
    batch, accumulation = (int(value) for value in re.findall(r"--set \S+=(\d+)", printed.out))
    assert batch <= size and batch * accumulation == 48
    fitting = changed(config, dataset_kwargs={"train_batch_size": batch},
                      trainer_kwargs={"gradient_accumulation_steps": accumulation})

    limit_memory(600_000_000)
    assert run(tmp_path, fitting) == 0
    assert (tmp_path / "run/model_checkpoints/last").resolve().name == "step-2"
    assert largest_difference(before, last(tmp_path / "run")) > 1e-5


@pytest.mark.parametrize("options", [{}, POLICY | PENALTY], ids=["divergence", "policy gradient"])
def test_find_batch_size_of_distillation(tmp_path, capsys, options):
    """Fault: teacher or rollouts cannot be tried on a GPU."""
    config = changed(make_kd_project(tmp_path, rows=8, **options), trainer_kwargs={"device": "cuda"})
    assert find(tmp_path, config, train_kd) == 0
    assert "largest batch that fits: 8 of the longest rows (all of them)" in capsys.readouterr().out
