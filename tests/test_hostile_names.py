"""Names and links that lead out of a folder: nothing there is written, deleted, or read as the program's own."""

import pytest

from tests.faults import hostile_names
from tests.faults.hostile_attack import carry_out
from tests.small_runs import changed, make_project, metrics, run


@pytest.mark.parametrize("attack", hostile_names.ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, tmp_path):
    """Fault: a file outside of the folder is overwritten, deleted or taken for one in it."""
    outcome = carry_out(attack, tmp_path)
    assert outcome.kind != "FAILED", outcome.text


def test_folders_on_another_disk(tmp_path):
    """Fault: whoever keeps checkpoints and curves on another disk, by links to folders, is refused."""
    config = make_project(tmp_path, rows=4)
    config = changed(config, trainer_kwargs={"metrics": ["rouge"], "save_predictions": True})
    assert run(tmp_path, config) == 0
    (tmp_path / "disk").mkdir()
    for name in ("model_checkpoints", "tensorboard", "predictions"):
        (tmp_path / "run" / name).rename(tmp_path / "disk" / name)
        (tmp_path / "run" / name).symlink_to(tmp_path / "disk" / name)
    assert run(tmp_path, changed(config, trainer_kwargs={"epochs": 2})) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert {path.name for path in (tmp_path / "disk/predictions").iterdir()} == {
        "validation-step-2.json", "validation-step-4.json"}
