"""Work on a CPU is refused what memory has no room for: utils/memory_limit.py. (Its size: test_find_batch_size.py.)"""

import resource

import pytest
import torch

import validate_model
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.small_runs import make_rows
from utils import memory_limit
from utils.memory_limit import PROC, Limit, field_of, within_memory
from utils.out_of_memory import memory_error

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.skipif(field_of(PROC / "self/status", "VmData:") is None, reason="this system has no /proc")]
ROOM = 100_000_000


@pytest.fixture
def small_machine(monkeypatch):
    """One that has ROOM left, and no swap."""
    monkeypatch.setattr(memory_limit, "memory_limit", lambda: Limit(ROOM, "available on this machine", False))
    monkeypatch.setattr(memory_limit, "field_of",
                        lambda path, name: field_of(path, name) if name == "VmData:" else None)


def test_more_than_there_is(small_machine):
    """Fault: zeros that the system promises and then ends the process for, without a word."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with within_memory("cpu"):
        torch.zeros(ROOM // 2, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(2 * ROOM, dtype=torch.uint8)
    assert memory_error(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.zeros(2 * ROOM, dtype=torch.uint8)


def test_a_gpu_is_left_alone(small_machine):
    """Fault: addresses that a GPU's libraries reserve count as memory."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with within_memory("cuda"):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_beams_that_do_not_fit(tmp_path, small_machine, capsys):
    """Fault: beams fill the machine's memory until the system ends the process."""
    tiny_gpt2(width=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    table = write_rows(tmp_path / "news.csv", make_rows(4))
    flags = {"csv_path": table, "model_path": tmp_path / "model", "output_dir": tmp_path / "out", "num_beams": 1000,
             "batch_size": 4, "max_generation_length": 4, "device_id": -1}
    assert validate_model.main([str(each) for name, value in flags.items() for each in (f"--{name}", value)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(error) == 1 and "memory is full in decoding predictions (4 rows" in error[0]
    assert "set --batch_size 2 (now 4): the predictions stay the same" in error[0]
