"""./demo.sh from a bare checkout."""

import os
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
    rows = {line.split()[0]: line for line in output.splitlines() if line.startswith(("teacher ", "lead-3 "))}
    scores = {name: float(line.split()[1]) for name, line in rows.items()}
    assert scores["teacher"] > 60 > 35 > scores["lead-3"] > 20
    again = demo()
    assert again.count("already finished") == 2
    assert again.count("already there") == 2
    assert [line for line in again.splitlines() if line.startswith(("teacher ", "lead-3 "))] == list(rows.values())
