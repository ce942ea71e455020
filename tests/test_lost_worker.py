"""A worker process that the system ends, most often for want of memory: utils/cli.py."""

import pytest

from utils.cli import run_command


@pytest.mark.parametrize("message", [
    "DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker (pid(s) 7) exited unexpectedly",
])
def test_a_killed_worker_is_told(capsys, message):
    """A worker killed for its memory was told as "a fault of the program", without a word on what to do."""
    def fall() -> int:
        raise RuntimeError(message)

    assert run_command("train.py", fall) == 1
    assert capsys.readouterr().err == (
        f"train.py: error: {message.strip().rstrip('.')}: most often because memory is full: lower "
        "dataset_kwargs.num_workers or end other programs, and start the same command again\n"
    )
