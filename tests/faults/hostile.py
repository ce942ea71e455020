"""Every hostile file that is tried, and what comes of it, as a table; exit code 1 where one does harm.

    python -m tests.faults.hostile [--quick]

"refused": one line and no more. "harmless": taken as what it seems to be, or left alone. The attacks on memory run in
processes that may take one gigabyte more than the program before; "MB" is what they took, their own file's making
included.
"""

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

GROUPS = {
    "code in pickles": "hostile_pickles", "code in model folders and data": "hostile_models",
    "names and links": "hostile_names", "texts that are shown": "hostile_texts",
    "sizes: tables and JSON": "hostile_sizes", "sizes: models and checkpoints": "hostile_claims",
}
CONFINED = ("hostile_sizes", "hostile_claims")


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without the attacks that take more than a second")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from tests.faults.hostile_attack import carry_out
    from tests.faults.hostile_confined import outcomes
    from untrusted.text import shorten

    kinds = Counter()
    for title, name in GROUPS.items():
        print(f"\n{title}\n")
        for slow in (False, True)[: 1 if options.quick else 2]:
            with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
                module = f"tests.faults.{name}"
                if name in CONFINED:
                    found = outcomes(module, Path(folder), slow)
                else:
                    found = {}
                    for number, attack in enumerate(importlib.import_module(module).ATTACKS):
                        place = Path(folder, str(number))
                        place.mkdir()
                        if attack.slow == slow:
                            with quiet():
                                found[attack.name] = carry_out(attack, place)
            for attack_name, outcome in found.items():
                kinds[outcome.kind] += 1
                memory = f"{outcome.megabytes:>5} MB  " if name in CONFINED else ""
                text = f"  {shorten(outcome.text.replace(folder, ''), 110)}" if outcome.text else ""
                print(f"  {outcome.kind:<8}  {memory}{attack_name}{text}", flush=True)
    print(f"\n{kinds.total()} attacks: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    return 1 if kinds["FAILED"] else 0


@contextlib.contextmanager
def quiet():
    """Without what the program itself prints."""
    with Path(os.devnull).open("w") as end, contextlib.redirect_stdout(end), contextlib.redirect_stderr(end):
        yield


if __name__ == "__main__":
    sys.exit(main())
