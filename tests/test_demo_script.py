"""./demo.sh from a bare checkout."""

import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_demo_teaches_and_reuses(tmp_path):
    """Fault: a demo that does not run, learns nothing, or does everything again when it is run again."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    if (ROOT / ".venv").is_dir():  # made by test.sh: the installation is not what is tested here
        (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}

    def demo() -> str:
        done = subprocess.run(["./demo.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    output = demo()
    noisy, clean = tables(output)
    for scores in (noisy, clean):
        assert scores["teacher"] > 60 > 35 > scores["lead-3"] > 20
        assert all(50 < scores[name] < scores["teacher"] + 2 for name in ("fine-tuning", "forward", "reverse", "JS"))
    assert all(50 < noisy[name] < noisy["teacher"] + 2 for name in OWN)
    assert max(noisy[name] for name in ("forward", "reverse", "JS")) > noisy["fine-tuning"]
    assert noisy["policy"] > noisy["fine-tuning"]
    again = demo()
    assert again.count("already finished") == 2 + 2 * 6 + 4
    assert again.count("already there") == 2 + 2 * 4 + 4
    assert tables(again) == [noisy, clean]


OWN = ("on-policy", "policy", "penalised", "longer")


def tables(output: str) -> list[dict[str, float]]:
    """ROUGE-1 in per cent by the first word of the row, for both tables."""
    names = ("lead-3", "teacher", "fine-tuning", "forward", "reverse", "JS")
    lines = [line for line in output.splitlines() if line.startswith((*names, *OWN))]
    rows = [re.match(r"(\S+).*?  +(\d+\.\d) \[", line) for line in lines]
    found = [(row[1], float(row[2])) for row in rows if row]
    assert [name for name, _ in found] == [*names, *OWN, *names]
    return [dict(found[:10]), dict(found[10:])]
