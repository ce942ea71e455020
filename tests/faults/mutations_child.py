"""One run of a script in a forked child: bounded in time, memory and file size, and kept inside its folder."""

import gc
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import train
import train_kd
import validate_model
from utils import cli as command_line

MAINS = {"train.py": train.main, "train_kd.py": train_kd.main, "validate_model.py": validate_model.main}
LEFT_THE_FOLDER = 97
MEMORY = 12 << 30  # bytes of address space
FILE_SIZE = 1 << 30
PATIENCE = 10
# Where a program may open files to write that are none.
DEVICES = ("/dev/null", "/dev/full", "/dev/tty", "/proc", "/sys")
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
           "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1}


class Outcome(NamedTuple):
    """code: as a shell would see it, 128 + n for signal n. stopped: by SIGTERM after its time; killed: after that."""

    code: int
    stdout: str
    stderr: str
    stopped: bool = False
    killed: bool = False


def run_in_child(script: str, arguments: list[str], folder: Path, temporary: Path, seconds: float = 20.0) -> Outcome:
    """main() of `script` with `folder` as working folder; stopped by SIGTERM after `seconds`, killed after as many.

    Seconds of computing; of waiting (for a lock, or for a processor that others take) it may be PATIENCE times as many.

    Where it changes a file outside of the folder around `folder` it ends with LEFT_THE_FOLDER. The process that calls
    must have no threads that the child would wait for.
    """
    texts = [temporary / name for name in (".stdout", ".stderr")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            enter(folder, temporary, texts)
            code = call(script, arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code, stopped = wait(child, seconds), False
    if code is None:
        os.kill(child, signal.SIGTERM)
        stopped, code = True, wait(child, seconds)
    killed = code is None
    if killed:
        os.killpg(child, signal.SIGKILL)
        code = wait(child, None)
    stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in texts)
    for path in texts:
        path.unlink()
    return Outcome(code if code >= 0 else 128 - code, stdout, stderr, stopped, killed)


def enter(folder: Path, temporary: Path, texts: list[Path]) -> None:
    """Make this process, a fresh child, one that runs in `folder` and leaves nothing outside."""
    gc.disable()  # a collection would copy every page that is shared with the parent
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for descriptor, path in zip((1, 2), texts, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb"), "utf-8", errors, write_through=True, line_buffering=True)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    for what, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_SIZE)):
        resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    command_line.fail = partial(tell_place, command_line.fail)
    allowed = tuple(os.path.realpath(place) for place in (folder.parent, temporary))
    sys.addaudithook(lambda event, of_event: watch(event, of_event, allowed))


def watch(event: str, of_event: tuple, allowed: tuple[str, ...]) -> None:
    """Ends the process where it is about to change a file outside of the folders `allowed`."""
    if event == "open":
        path, mode, flags = of_event
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
        paths = [path] if writes else []
    else:
        paths = of_event[: CHANGES.get(event, 0)]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)) and not is_inside(os.fsdecode(path), allowed):
            os.write(2, f"changed outside of its folders: {event} {path!r}\n".encode(errors="backslashreplace"))
            os._exit(LEFT_THE_FOLDER)


def is_inside(path: str, allowed: tuple[str, ...]) -> bool:
    try:
        parent, name = Path.cwd().joinpath(path).parent, Path(path).name
        place = f"{os.path.realpath(parent)}/{name}" if name not in ("", "..") else os.path.realpath(path)
    except ValueError:  # a NUL: no file can be meant
        return True
    return any(place == root or place.startswith(f"{root}/") for root in (*allowed, *DEVICES))


def tell_place(fail: Callable, name: str, message: str, code: int, debug: bool) -> int:
    """`fail`, with the traceback of an error that is no kind that the program foresees."""
    return fail(name, message, code, debug or message.startswith("unexpected "))


def call(script: str, arguments: list[str]) -> int:
    try:
        return MAINS[script](arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def wait(child: int, seconds: float | None) -> int | None:
    """The child's exit code (minus the signal that killed it); None where it still runs after `seconds` of computing,
    or PATIENCE times as long in all."""
    started, before, pause = time.monotonic(), computed(child), 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if seconds is not None and (
            passed > PATIENCE * seconds or (passed > seconds and computed(child) - before > seconds)
        ):
            return None
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


def computed(child: int) -> float:
    """Processor seconds that the child has used."""
    fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
