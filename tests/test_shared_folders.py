"""Two programs at one time share the caches of token ids and teacher outputs, to the right results."""

from pathlib import Path

import pytest

from tests.faults.runs import fork_server
from tests.small_kd_runs import make_kd_project
from tests.small_runs import assert_equal_weights, changed, make_project, weights, write_config

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
