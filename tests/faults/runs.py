"""Runs of the scripts in children of one process that has imported everything once, so that a run starts in no time.

A child runs a script as `python train.py ...` would, and knows nothing of what is inside it. It can be killed after
some processor time, or be stopped or refused at its N-th file operation (interpose.c). `python -m tests.faults.runs`
is the process that forks them; `fork_server` starts it.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("interpose.c")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "CUDA_VISIBLE_DEVICES": ""}
MEMORY = 12 << 30  # bytes of address space of a child
PERIOD = 0.02  # seconds between two looks at a child


@dataclass(frozen=True)
class Fault:
    """At the `number`-th operation on files below `folder`: SIGKILL, or an errno (`lasting`: from then on).

    number 0: none. log: a file that gets a line `operation path` for each operation.
    """

    folder: str
    number: int = 0
    error: int = 0
    lasting: bool = False
    log: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended. code: exit code, or minus the signal. seconds: of processor time. output, errors: its stdout
    and stderr. hung: it had to be stopped, by SIGTERM after its limit. samples: (memory, open files, threads) of it."""

    code: int
    seconds: float
    hung: bool
    samples: list
    output: str
    errors: str


Run = Callable[..., Outcome]


class NoFaultsHere(RuntimeError):
    """This system cannot fail a process at a file operation; the message says why."""


def build_interposer(folder: Path) -> Path:
    """Compiles interpose.c. Raises NoFaultsHere."""
    library, compiler = folder / "interpose.so", shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        raise NoFaultsHere("failing file operations needs Linux and a C compiler (cc)")
    command = [compiler, "-std=gnu11", "-O1", "-Wall", "-fPIC", "-shared", "-o", library, SOURCE, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoFaultsHere(f"cc cannot compile {SOURCE.name}: {done.stderr[-300:]}")
    return library


@contextmanager
def fork_server() -> Iterator[Run]:
    """Gives `run(script, arguments, folder, beside=None, kill_after=None, limit=60.0, fault=None, watch=False)`.

    script: `train.py`, or a module such as `utils.compare`. folder: the working folder. beside: arguments of a second
    run of it at the same time; the code is the higher one of both. kill_after: seconds of processor time after which
    the child gets SIGKILL. limit: of processor time, after which it gets SIGTERM. watch: take samples. Raises
    NoFaultsHere if a fault is asked for that this system cannot make.
    """
    with tempfile.TemporaryDirectory(prefix="faults-server-") as own:
        environment = {**os.environ, **ENVIRONMENT}
        try:
            environment["LD_PRELOAD"] = str(build_interposer(Path(own)))
        except NoFaultsHere as error:
            cannot: NoFaultsHere | None = error
        else:
            cannot = None
        server = subprocess.Popen([sys.executable, "-m", "tests.faults.runs"], cwd=ROOT, env=environment, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)

        def run(script: str, arguments: list[str], folder: Path, beside: list[str] | None = None,
                kill_after: float | None = None, limit: float = 60.0, fault: Fault | None = None,
                watch: bool = False) -> Outcome:
            if fault is not None and cannot is not None:
                raise cannot
            job = {"script": script, "arguments": arguments, "folder": str(folder), "beside": beside, "own": own,
                   "limit": limit, "kill_after": kill_after, "fault": fault and asdict(fault), "watch": watch}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            texts = (Path(own, name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
            return Outcome(**answer, output=next(texts), errors=next(texts))

        try:
            if server.stdout.readline() != "ready\n":
                raise RuntimeError("the process that forks the runs does not start")
            yield run
        finally:
            server.stdin.close()
            server.wait(60)
            server.stdout.close()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a while, in memory if there is room: syncing a disk is most of a small run's time, and a kill of a
    process loses nothing that it has written, wherever that is."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 500e6
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory if room else None) as folder:
        yield Path(folder)


# -- the process that forks ----------------------------------------------------------------------------------------


def serve() -> None:
    """Answers each line of stdin, a job, with a line on stdout; ends with its input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        gc.freeze()  # a collection in a child would copy every page
        print(json.dumps(do(job)), file=answers, flush=True)
        learn(Path(job["own"], "modules"))


def learn(imported: Path) -> None:
    """Imports what a child had to import, so that the next one need not."""
    if imported.exists():
        for name in imported.read_text(encoding="utf-8").split():
            with suppress(Exception):
                importlib.import_module(name)
        imported.unlink()


def do(job: dict) -> dict:
    """Forks a child for the job and waits for its end."""
    child = os.fork()
    if child == 0:
        work(job)
    ended, samples, hung, killed = os.pidfd_open(child), [], False, False
    clock = ~child << 3 | 2  # of the child's processor time, as clock_getcpuclockid gives it
    kill_after, limit, deadline = job["kill_after"], job["limit"], time.monotonic() + 10 * job["limit"]
    while not killed:
        used = time.clock_gettime(clock)
        wait = PERIOD if kill_after is None else min(PERIOD, max(kill_after - used, 0.0005))
        if select.select([ended], [], [], wait)[0]:
            break
        if job["watch"]:
            samples.append(sample(child))
        over = used > limit or time.monotonic() > deadline
        killed = (kill_after is not None and used >= kill_after) or (hung and over)
        if killed or over:
            hung, limit, deadline = hung or over, used + 20, time.monotonic() + 60
            os.kill(child, signal.SIGKILL if killed else signal.SIGTERM)
    _, status, usage = os.wait4(child, 0)
    os.close(ended)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime, "hung": hung,
            "samples": samples}


def sample(child: int) -> list[int]:
    """[resident bytes, open files, threads]."""
    place = Path(f"/proc/{child}")
    pages = int((place / "statm").read_text().split()[1])
    return [pages * os.sysconf("SC_PAGE_SIZE"), *(len(os.listdir(place / name)) for name in ("fd", "task"))]  # noqa: PTH208


def work(job: dict) -> None:
    """In the child: runs the script, and never comes back."""
    code = 70
    try:
        before = set(sys.modules)
        own, fault = Path(job["own"]), job["fault"]
        files = [os.open(os.devnull, os.O_RDONLY), *(os.open(own / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                                                     for name in ("stdout", "stderr"))]
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin.close()
        os.chdir(job["folder"])
        os.environ["HOME"] = job["folder"]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if fault:
            log = os.open(fault["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) if fault["log"] else -1
            below = os.fsencode(os.path.realpath(fault["folder"]))
            ctypes.CDLL(None).interpose_start(below, ctypes.c_long(fault["number"]), fault["error"],
                                              int(fault["lasting"]), log)
        other = os.fork() if job["beside"] is not None else None
        code = execute(job["script"], job["beside"] if other == 0 else job["arguments"])
        if other:
            code = max(code, os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
        if code == 0 and (new := sys.modules.keys() - before):
            (own / "modules").write_text("\n".join(sorted(new)), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def execute(script: str, arguments: list[str]) -> int:
    """As the command line would; its exit code."""
    sys.argv = [script, *arguments]
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    serve()
