"""What is imported before a config is known to be valid: nothing that takes seconds."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "transformers", "datasets", "nltk", "tensorboard", "pandas"}
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
print("imported:", sorted({name.partition(".")[0] for name in sys.modules}), "exit:", code)
"""


def end_of(*arguments: str) -> tuple[list[str], int]:
    """(heavy libraries that a program imported, its exit code)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=True)
    imported, code = done.stdout.splitlines()[-1].removeprefix("imported: ").split(" exit: ")
    return sorted(set(ast.literal_eval(imported)) & HEAVY), int(code)


@pytest.mark.parametrize(("arguments", "code"), [
    (("train.py", "--help"), 0), (("train.py", "--set", "trainer_kwargs.epochs=many"), 2),
    (("train.py", "--config", "nowhere.json"), 2), (("train.py", "--epochs", "3"), 2),
    (("train_kd.py", "--print_config"), 0), (("train_kd.py", "--set", "distillation_kwargs.kl_div=KL"), 2),
    (("validate_model.py", "--help"), 0), (("validate_model.py", "--csv_path", "x.csv"), 2),
    (("utils/compare.py", "--help"), 0),
], ids=str)
def test_help_and_errors_import_no_library(arguments, code):
    """Fault: `--help` took 20 seconds of CPU, and so did reporting a typing error in a config."""
    assert end_of(*arguments) == ([], code)


@pytest.mark.slow
def test_models_need_no_compiler():
    """Fault: importing the model calls torch.compile, which imports its compiler: 5 seconds that few runs need."""
    program = ("import sys; import utils.runs.build, utils.runs.run; "
               "print('torch._inductor.compile_fx' in sys.modules, 'tensorboard' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          check=True)
    assert done.stdout.split() == ["False", "False"]
