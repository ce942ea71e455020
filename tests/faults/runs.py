"""A process that has imported torch, transformers and the scripts once, and forks a child for each run.

So a run starts in milliseconds, and hundreds can be killed in minutes. The server has one thread: a fork of a process
with more may hang. `python -m tests.faults.runs` is the server; `fork_server` starts it and gives the way to ask it.
"""

import importlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "CUDA_VISIBLE_DEVICES": ""}
IMPORTED = ("train", "train_kd", "validate_model", "tensorboard.compat.proto.event_pb2",
            "tensorboard.summary.writer.record_writer", "tests.faults.crash_child")
ROOM = 100e6  # bytes
FAILED = 70  # exit code of a child that ended with an exception


@dataclass(frozen=True)
class Outcome:
    """How a child ended. code: its exit code, or minus the signal. killed: by `kill_after`. seconds: of processor time.
    output: both streams."""

    code: int
    killed: bool
    seconds: float
    output: str


Run = Callable[..., Outcome]


@contextmanager
def fork_server() -> Iterator[Run]:
    """Gives `run(function, kill_after=None, limit=120.0, **arguments)`: `module:function` in a fresh child.

    kill_after: seconds of its processor time after which it gets SIGKILL; the same moment of a run on a busy machine
    too. limit: seconds after which a child counts as hanging, which is a RuntimeError.
    """
    with tempfile.TemporaryDirectory() as kept:
        output = Path(kept, "output")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runs"], cwd=ROOT, env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

        def run(function: str, kill_after: float | None = None, limit: float = 120.0, **arguments) -> Outcome:
            job = {"function": function, "arguments": arguments, "output": str(output), "kill_after": kill_after,
                   "limit": limit}
            process.stdin.write(json.dumps(job, default=str) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            text = output.read_text(encoding="utf-8", errors="replace")
            if answer["hangs"]:
                raise RuntimeError(f"{function} {arguments} hangs; its output ends:\n{text[-2000:]}")
            return Outcome(answer["code"], answer["killed"], answer["seconds"], text)

        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the server of the runs does not start")
            yield run
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while: in memory where there is room, since flushing a disk is most of a small run's time. A kill
    of a process loses nothing that it has written, wherever that is."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory if room else None) as folder:
        yield Path(folder)


# -- the server ----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers each line of stdin, a job, with a line on stdout; ends with its input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), file=answers, flush=True)


def do(job: dict) -> dict:
    """Fork a child for the job and wait for its end."""
    deadline, kill_after = time.monotonic() + job["limit"], job["kill_after"]
    child = os.fork()
    if child == 0:
        work(job)
    ended = os.pidfd_open(child)
    clock = ~child << 3 | 2  # of the child's processor time: what clock_getcpuclockid gives
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    try:
        over = hangs = killed = False
        while not (over or hangs or killed):
            left = deadline - time.monotonic()
            hangs = left <= 0
            if kill_after is not None:
                # A process of one thread uses no more processor time than time passes.
                to_go = kill_after - time.clock_gettime(clock)
                killed, left = to_go <= 0, min(left, to_go)
            if hangs or killed:
                os.kill(child, signal.SIGKILL)
            else:
                over = bool(poll.poll(max(1, math.ceil(1000 * left))))
        _, status, used = os.wait4(child, 0)
    finally:
        os.close(ended)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "killed": killed and code == -signal.SIGKILL, "hangs": hangs and not killed,
            "seconds": used.ru_utime + used.ru_stime}


def work(job: dict) -> None:
    """In the child: the job's function, and never back."""
    code = FAILED
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for target, descriptor in enumerate((null, output, output)):
            os.dup2(descriptor, target)
        module, name = job["function"].split(":")
        code = getattr(importlib.import_module(module), name)(**job["arguments"]) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
