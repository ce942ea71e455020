"""Two programs at one time: what they may share they share to the right results, what not is refused with a reason."""

import os
from pathlib import Path

import pytest

import utils.runs.build
import validate_model
from tests.faults.runs import fork_server
from tests.small_kd_runs import make_kd_project
from tests.small_runs import assert_equal_weights, changed, make_project, run, weights, write_config
from utils.runs import score_table
from utils.runs.run_lock import hold

TABLES = "data.token_cache:write_table"
CACHES = "utils.distillation.cached_teacher:make_cache"


@pytest.fixture(scope="module")
def server():
    with fork_server() as server:
        yield server


def together(server, folder: Path, script: str, configs: list[dict], meet_at: list[str]) -> str:
    """The configs at the same time, each of which ends well; what was told."""
    programs = []
    for number, config in enumerate(configs):
        place = folder / f"config-{number}"
        place.mkdir(exist_ok=True)
        programs.append([script, ["--config", str(write_config(place, config))]])
    outcome = server("tests.faults.locks:together", programs=programs, meet_at=meet_at, codes=folder / "codes")
    assert (folder / "codes").read_text().split() == ["0"] * len(configs), outcome.output
    assert "the other did not come" not in outcome.output
    return outcome.output


def into(config: dict, output_dir: Path) -> dict:
    return changed(config, trainer_kwargs={"output_dir": str(output_dir)})


def test_two_trainings_make_one_token_cache(server, tmp_path):
    """Two runs that tokenise into one folder at the same time spoil the table, or one of them ends for it."""
    config = make_project(tmp_path, rows=8)
    together(server, tmp_path, "train", [into(config, tmp_path / name) for name in "ab"], [TABLES])
    together(server, tmp_path, "train", [into(config, tmp_path / "c")], [])
    ends = [weights(tmp_path / f"{name}/model_checkpoints/last") for name in "abc"]
    assert_equal_weights(ends[0], ends[1])
    assert_equal_weights(ends[0], ends[2])
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["train", "validation"]


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_two_distillations_fill_one_teacher_cache(server, tmp_path, kind):
    """Two runs that write one teacher's outputs at the same time mix them up, or move each other's files away."""
    cache = {"kind": kind, "dir": str(tmp_path / "shared"), **({"top_k": 8} if kind == "top_k" else {})}
    config = make_kd_project(tmp_path, rows=8, kl_div="JS", teacher_cache=cache)
    config = changed(config, trainer_kwargs={"epochs": 2})
    together(server, tmp_path, "train_kd", [into(config, tmp_path / name) for name in "ab"], [TABLES, CACHES])
    told = together(server, tmp_path, "train_kd", [into(config, tmp_path / "c")], [])
    assert "8 of 8 rows of train" in told  # nothing was lost that the two had computed
    ends = [weights(tmp_path / f"{name}/model_checkpoints/last") for name in "abc"]
    assert_equal_weights(ends[0], ends[1])
    assert_equal_weights(ends[0], ends[2])
    assert not [path for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]


def arguments(folder: Path, output_dir: Path) -> list[str]:
    return ["--model_path", str(folder / "model"), "--csv_path", str(folder / "validation.csv"), "--device_id", "-1",
            "--max_generation_length", "4", "--output_dir", str(output_dir)]


def test_an_evaluation_holds_its_folder(tmp_path, capsys, monkeypatch):
    """Two evaluations in one folder leave the predictions of one beside the scores of the other."""
    make_project(tmp_path)
    with hold(tmp_path, "key"):
        assert validate_model.main(arguments(tmp_path, tmp_path)) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"validate_model.py: error: --output_dir: another run is writing to {tmp_path}: process "
                           f"{os.getpid()} on ")
    inside, evaluate = [], score_table.evaluate

    def second(*values):
        if not inside:
            inside.append(validate_model.main(arguments(tmp_path, tmp_path / "out")))
        return evaluate(*values)

    monkeypatch.setattr(score_table, "evaluate", second)
    assert validate_model.main(arguments(tmp_path, tmp_path / "out")) == 0
    assert inside == [2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.json", "scores.json"]


def test_a_training_and_an_evaluation_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    """An evaluation overwrites the scores.json of a training that is under way."""
    config = make_project(tmp_path, rows=4)
    codes, build = [], utils.runs.build.build_fine_tuning

    def evaluated_meanwhile(*values):
        codes.append(validate_model.main(arguments(tmp_path, tmp_path / "run")))
        return build(*values)

    monkeypatch.setattr(utils.runs.build, "build_fine_tuning", evaluated_meanwhile)
    assert run(tmp_path, config) == 0
    assert codes == [2]
    assert not (tmp_path / "run/scores.json").exists()
