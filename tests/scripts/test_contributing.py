"""CONTRIBUTING.md, followed to the letter: a new divergence trains."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.small_kd_runs import make_kd_project
from tests.small_runs import changed, write_config

FOLDERS = ("model", "data", "utils")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "demo", "cnn_dailymail")
PLACES = {"in DIVERGENCES": "DIVERGENCES = {\n", "at its end": None}


def follow(page: str, project) -> None:
    """Puts the page's Python blocks where their first lines say."""
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        first, _, code = block.partition("\n")
        path, where = re.fullmatch(r"# (\S+), (.*)", first).groups()
        text = (project / path).read_text(encoding="utf-8")
        mark = PLACES[where]
        changed_text = f"{text}\n\n{code}" if mark is None else text.replace(mark, mark + code)
        assert changed_text != text
        (project / path).write_text(changed_text, encoding="utf-8")


@pytest.fixture
def project(tmp_path) -> Path:
    """The product with the page's divergence in it."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "project" / name, ignore=LEFT_OUT)
    shutil.copy(ROOT / "train_kd.py", tmp_path / "project")
    follow((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), tmp_path / "project")
    return tmp_path / "project"


def test_the_page_s_blocks_fit(project):
    """Fault: CONTRIBUTING.md names a file or a place in it that is gone."""
    for path in ("model/losses/registry.py", "model/losses/divergences.py"):
        text = (project / path).read_text(encoding="utf-8")
        compile(text, path, "exec")
        assert "hellinger" in text and "hellinger" not in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_adds_a_divergence(tmp_path, project):
    """Fault: a divergence needs more than a row and a formula, or the page's formula is another one."""
    data = tmp_path / "data"
    data.mkdir()
    config = changed(make_kd_project(data, kl_div="hellinger", kd_weight=1.0), trainer_kwargs={"max_steps": 2})
    run = [sys.executable, "train_kd.py", "--config", str(write_config(data, config))]
    done = subprocess.run(run, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (data / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 1 for loss in losses)

    program = """
import torch
from model.losses.divergences import choose_divergence
torch.manual_seed(0)
teacher, student = 3 * torch.randn(2, 5, 40, dtype=torch.float64)
student.requires_grad_()
p, q = teacher.softmax(-1), student.softmax(-1)
values, gradient = choose_divergence("hellinger")(p.log(), q.log().detach(), q.detach())
expected = ((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2
(expected_gradient,) = torch.autograd.grad(expected.sum(), student)
print(float((values - expected).abs().max()), float((gradient - expected_gradient).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, timeout=300,
                          check=True)
    assert torch.tensor([float(number) for number in done.stdout.split()]).max() < 1e-12
