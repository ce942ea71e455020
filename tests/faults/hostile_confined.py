"""Attacks on memory and patience, each in a process of its own that may take only so much of both.

    python -m tests.faults.hostile_confined tests.faults.hostile_sizes FOLDER [slow]

prints one JSON object a line for each quick (or slow) attack of that module: its name and outcome.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests.faults.hostile_attack import Attack, Outcome, carry_out

ROOM = 1 << 30  # bytes that an attack may take beyond what the program has taken by then
SECONDS = 300  # after which it counts as endless; most take less than one
CAN_CONFINE = Path("/proc/self/statm").exists()
ROOT = Path(__file__).resolve().parents[2]


def outcomes(module: str, folder: Path, slow: bool = False) -> dict[str, Outcome]:
    """Of each quick attack of a module, by its name, or of each slow one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MALLOC_ARENA_MAX": "2", "HF_HUB_CACHE": str(folder / "hub")}
    command = [sys.executable, "-m", "tests.faults.hostile_confined", module, str(folder), *["slow"] * slow]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("name"): Outcome(**line) for line in lines}


def main(module: str, folder: str, pace: str = "quick") -> None:
    attacks = [attack for attack in importlib.import_module(module).ATTACKS if attack.slow == (pace == "slow")]
    for number, attack in enumerate(attacks):
        place = Path(folder, str(number))
        place.mkdir()
        print(json.dumps({"name": attack.name, **asdict(confined(attack, place))}), flush=True)


def confined(attack: Attack, folder: Path) -> Outcome:
    """The attack in a copy of this process, with ROOM for its memory."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
            signal.alarm(SECONDS)
            outcome = carry_out(attack, folder)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            os.write(writer, json.dumps(asdict(outcome) | {"megabytes": grown}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        told = file.read()
    _, status = os.waitpid(pid, 0)
    if told:
        return Outcome(**json.loads(told))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Outcome("FAILED", "it is endless" if number == signal.SIGALRM else f"ended by signal {number}")


if __name__ == "__main__":
    main(*sys.argv[1:])
