"""What a child of the fork server does: several programs at the same time, which meet where they share something."""

import os
import threading
from multiprocessing import get_context

from tests.faults.crash_child import replace
from tests.faults.disk_child import program

SECONDS = 60.0  # a process that waits longer for the others goes on alone


def together(programs: list[list], meet_at: list[str], codes: str) -> int:
    """Runs the programs, [name, arguments] each, in processes of their own; the exit codes go to the file `codes`.

    meet_at: functions (`module:name`) at whose first call each process waits for the others.
    """
    barriers = {target: get_context("fork").Barrier(len(programs)) for target in meet_at}
    children = [start(name, arguments, barriers) for name, arguments in programs]
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with open(codes, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(" ".join(map(str, ended)))
    return 0


def start(name: str, arguments: list[str], barriers: dict) -> int:
    child = os.fork()
    if child == 0:
        for target, barrier in barriers.items():
            replace(target, waiting_once(barrier))
        code = 70
        try:
            code = program(name, arguments)
        finally:
            os._exit(code)
    return child


def waiting_once(barrier):
    waited = []

    def call(original, *arguments, **named):
        if not waited:
            waited.append(True)
            try:
                barrier.wait(SECONDS)
            except threading.BrokenBarrierError:
                print("the other did not come", flush=True)
        return original(*arguments, **named)

    return call
