"""Imports run downwards: scripts, rooms of utils/, then model/ and data/, which know neither each other nor utils/."""

import ast

from tests.conftest import ROOT

MAY_IMPORT = {"model": {"model"}, "data": {"data"}, "utils": {"model", "data", "utils"}}
ROOMS = {  # of utils/, and the rooms that each may import; beside them it has modules that any room may import
    "config": set(), "training": {"config"}, "evaluation": {"config", "training"},
    "distillation": {"config", "training", "evaluation"},
    "runs": {"config", "training", "evaluation", "distillation"},
}
SCRIPTS = {"train", "train_kd", "validate_model"}


def imported(path) -> set[str]:
    """Names of the project's modules and packages that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.partition(".")[0] in MAY_IMPORT.keys() | SCRIPTS}


def test_imports_run_downwards():
    """Fault: the mathematics know a config, data/ knows a model, or something imports a script."""
    wrong = [(str(path.relative_to(ROOT)), name) for floor, allowed in MAY_IMPORT.items()
             for path in sorted((ROOT / floor).rglob("*.py")) for name in imported(path)
             if name.partition(".")[0] not in allowed]
    assert not wrong


def test_rooms_of_utils():
    """Fault: the loop knows the run folder, or a config needs a model."""
    wrong = []
    for path in sorted((ROOT / "utils").rglob("*.py")):
        room = path.parent.name if path.parent.name in ROOMS else None
        allowed = ROOMS[room] | {room} if room else set()
        if path.name != "compare.py":  # a command
            wrong += [(str(path.relative_to(ROOT)), name) for name in imported(path)
                      if name.split(".")[0] == "utils" and name.split(".")[1] in ROOMS.keys() - allowed]
    assert not wrong


def test_losses_know_no_decoding_and_gpt2_is_one_room():
    """Fault: a loss needs the decoding loop, or GPT-2's fast path is called around the language model."""
    users = {str(path.relative_to(ROOT)): imported(path) for path in sorted((ROOT / "model").rglob("*.py"))}
    assert not [path for path, names in users.items() if path.startswith("model/losses/")
                and any(name.startswith(("model.decoding", "model.gpt2")) for name in names)]
    assert {path for path, names in users.items() if not path.startswith("model/gpt2/")
            and any(name.startswith("model.gpt2") for name in names)} == {
        "model/language_model.py", "model/decoding/kv_cache.py"}
