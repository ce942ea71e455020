"""`--find_batch_size`: the largest batch of the longest rows that fits, and the numbers for the same steps."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import train_kd
import utils.find_batch_size
from model.language_model import LanguageModel
from model.teacher import Teacher
from tests.conftest import ROOT
from tests.faults.memory import GPU, full_in, full_in_forward
from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import assert_equal_weights, changed, make_project, run, weights, write_config
from utils import memory_limit
from utils.config import FineTuneConfig
from utils.config_files import ConfigError
from utils.devices import Place
from utils.evaluation import NotFinite
from utils.find_batch_size import Answer, find_batch_size, in_child, largest_that_fits
from utils.memory_limit import Limit
from utils.out_of_memory import memory_error
from utils.run_log import RunLog
from utils.step_trial import make_trial, take_step, try_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def as_on_gpu(monkeypatch):
    """All tries in this process, as on a GPU of 16 GB where each step takes 1 GB."""
    monkeypatch.setattr(utils.find_batch_size, "in_child_processes", utils.find_batch_size.in_this_process)
    monkeypatch.setattr(utils.find_batch_size, "peak_on_gpu", lambda device, work: work() or 10**9)
    properties = type("Properties", (), {"total_memory": 16 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def find(folder: Path, config: dict, main=train.main) -> int:
    return main(["--config", str(write_config(folder, config)), "--find_batch_size"])


def files_of(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def written(printed: str, config: dict) -> dict:
    """The config with the lines that were printed, which must say what the --set arguments say."""
    config = json.loads(json.dumps(config))
    for section, pairs in re.findall(r'^  in "(\w+)": (.+)$', printed, re.MULTILINE):
        config[section].update(json.loads(f"{{{pairs}}}"))
        for key, value in json.loads(f"{{{pairs}}}").items():
            assert f" --set {section}.{key}={value}" in printed
    return config


# -- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_every_limit_is_found(most):
    """Fault: off by one at the limit or at the last row, more rows than there are, or a try for each size."""
    for limit in range(most + 3):
        tried = []
        assert largest_that_fits(lambda size: tried.append(size) or size <= limit, most) == min(limit, most)  # noqa: B023
        assert len(set(tried)) == len(tried) <= 12 and all(1 <= size <= most for size in tried)


@pytest.mark.parametrize(("batch", "accumulation", "fits", "expected"), [
    (4, 3, 10, (6, 2)), (4, 3, 12, (12, 1)), (4, 3, 40, (12, 1)), (2, 16, 11, (8, 4)), (7, 1, 3, (1, 7)),
])
def test_the_steps_stay_the_same(tmp_path, capsys, as_on_gpu, batch, accumulation, fits, expected):
    """Fault: numbers whose product is another, so that the model is trained otherwise; or that do not fit."""
    config = changed(make_project(tmp_path), dataset_kwargs={"train_batch_size": batch},
                     trainer_kwargs={"gradient_accumulation_steps": accumulation})
    longest = 228  # of the rows of make_rows
    with full_in_forward(GPU, most_tokens=fits * longest):
        assert find(tmp_path, config) == 0
    told = capsys.readouterr()
    assert f"largest batch that fits: {fits} of the longest rows" in told.out and "peak 1.00 GB" in told.out
    assert f"trying steps on the longest of 40 training rows (up to {longest} tokens); memory: 16.00 GB" in told.err
    assert f"{fits} row{'s' * (fits > 1)}: fits, peak 1.00 GB" in told.err
    assert (f"{fits + 1} rows: does not fit (memory is full in training step)" in told.err) == (fits < 40)
    result = written(told.out, config)
    assert (result["dataset_kwargs"]["train_batch_size"],
            result["trainer_kwargs"]["gradient_accumulation_steps"]) == expected


def test_tokens_per_batch(tmp_path, capsys, as_on_gpu):
    """Fault: rows are advised where tokens cut the batch."""
    config = changed(make_project(tmp_path), dataset_kwargs={"tokens_per_batch": 300, "train_batch_size": 8})
    with full_in_forward(GPU, most_tokens=5 * 228):
        assert find(tmp_path, config) == 0
        printed = capsys.readouterr().out
        assert '  in "dataset_kwargs": "tokens_per_batch": 1140\n' in printed and "train_batch_size" not in printed
        assert run(tmp_path, written(printed, config)) == 0


def test_not_even_one_row(tmp_path, capsys, as_on_gpu):
    """Fault: "largest batch: 0", or a traceback, where a row is too long for the memory."""
    with full_in_forward(GPU, most_tokens=100):
        assert find(tmp_path, make_project(tmp_path)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: not even one row of 228 tokens fits into 16.00 GB on cpu: ")
    assert "lower dataset_kwargs.max_length (such as 114)" in error


def test_other_errors_end_the_search(tmp_path, capsys, as_on_gpu, monkeypatch):
    """Fault: a fault of another kind counts as "does not fit"; or tries in a group of processes wait for each other."""
    with full_in(LanguageModel, "label_hidden", RuntimeError("shapes"), lambda model, ids, *others: len(ids) == 4):
        assert find(tmp_path, make_project(tmp_path)) == 1
    assert "unexpected RuntimeError: shapes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="in one process"):
        find_batch_size(FineTuneConfig(), train.build)


# -- what is tried, and what is left alone ---------------------------------------------------------------------------


def test_a_run_folder_stays_as_it_is(tmp_path, capsys, as_on_gpu):
    """Fault: the search writes into a run folder, takes its lock, or changes how the run goes on."""
    config = changed(make_project(tmp_path, dropout=0.1), trainer_kwargs={"max_steps": 4})
    config = changed(config, lr_scheduler_kwargs={"num_training_steps": 9})
    assert run(tmp_path, config) == 0
    before, model = files_of(tmp_path / "run"), files_of(tmp_path / "model")
    with full_in_forward(GPU, most_tokens=3 * 228):
        assert find(tmp_path, config) == 0
    assert files_of(tmp_path / "run") == before and files_of(tmp_path / "model") == model
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache", "config.json", "model", "run", "train.csv", "validation.csv"]
    go_on = changed(config, trainer_kwargs={"max_steps": 6})
    assert run(tmp_path, go_on) == 0
    whole = changed(go_on, trainer_kwargs={"output_dir": str(tmp_path / "whole")})
    assert run(tmp_path, whole) == 0
    assert_equal_weights(*(weights(tmp_path / name / "model_checkpoints/last") for name in ("run", "whole")))


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys, as_on_gpu):
    """Fault: an empty run folder is left behind."""
    with full_in_forward(GPU, most_tokens=300):
        assert find(tmp_path, make_project(tmp_path, rows=6)) == 0
    assert not (tmp_path / "run").exists()


def trial_of(folder: Path, config: dict, build=train.build, model=FineTuneConfig):
    from utils.config_files import load_config

    config = load_config(write_config(folder, config), (), model)
    return make_trial(config, build, Place(torch.device("cpu")), RunLog(folder, is_main=False))


def test_whole_steps_on_the_longest_rows(tmp_path, monkeypatch):
    """Fault: rows of average length, no optimizer state, or no gradients beside the second micro-batch are tried."""
    trial = trial_of(tmp_path, make_project(tmp_path))
    seen, label_hidden = [], LanguageModel.label_hidden

    def recorded(model, input_ids, mask, *others, **options):
        gradients = all(each.grad is not None for each in trial.parameters)
        seen.append((mask.sum(1).tolist(), gradients, bool(trial.optimizer.state)))
        return label_hidden(model, input_ids, mask, *others, **options)

    monkeypatch.setattr(LanguageModel, "label_hidden", recorded)
    before = {name: value.clone() for name, value in trial.objective.state_dict().items()}
    try_step(trial, 5)
    longest = sorted(trial.table.lengths.tolist(), reverse=True)
    assert seen == [([longest[-1]], False, False), (longest[:5], False, True), (longest[:5], True, True)]
    assert_equal_weights(before, trial.objective.state_dict())
    moments = [each["exp_avg"] for each in trial.optimizer.state.values()]
    assert len(moments) == len(trial.parameters) and any(bool(each.any()) for each in moments)


def test_a_loss_that_is_not_finite_spoils_no_later_try(tmp_path):
    """Fault: NaN weights of one try end the next one, whose rollouts have no rewards."""
    trial = trial_of(tmp_path, make_project(tmp_path, rows=6))
    with torch.no_grad():
        trial.objective.language_model.model.transformer.wte.weight[ord("s")] = 3e38
    take_step(trial, [trial.order[:2]])
    assert all(each.isfinite().all() for each in trial.parameters)


@pytest.mark.parametrize(("options", "drawn"), [
    ({"method": "policy_gradient"}, 12), ({"on_policy_fraction": 0.1}, 12), ({}, 0),
], ids=str)
def test_distillation_tries_teacher_and_rollouts(tmp_path, capsys, as_on_gpu, monkeypatch, options, drawn):
    """Fault: a step without teacher, or with rollouts of two micro-batches where a step draws for all its rows."""
    import model.rollout_sets

    config = changed(make_kd_project(tmp_path, **options), dataset_kwargs={"train_batch_size": 4},
                     trainer_kwargs={"gradient_accumulation_steps": 3})
    prompts, of_teacher = [], []
    draw, hidden = model.rollout_sets.draw_rollouts, Teacher.hidden
    monkeypatch.setattr(model.rollout_sets, "draw_rollouts",
                        lambda *given: prompts.append(len(given[2])) or draw(*given))
    monkeypatch.setattr(Teacher, "hidden", lambda *given: of_teacher.append(len(given[1])) or hidden(*given))
    with full_in_forward(GPU, most_tokens=2 * 228):
        assert find(tmp_path, config, train_kd.main) == 0
    told = capsys.readouterr()
    assert "largest batch that fits: " in told.out and "4 rows: does not fit" in told.err
    assert set(prompts[1:]) == ({drawn} if drawn else set())  # after the first step, of one row
    assert drawn or {1, 2, 4} <= set(of_teacher)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_teacher_cache_is_not_made_but_used(tmp_path, capsys, as_on_gpu, monkeypatch, kind):
    """Fault: gigabytes are written to try a few steps; or a teacher that the run does not need takes its memory."""
    loads, load = [], train_kd.load_teacher
    monkeypatch.setattr(train_kd, "load_teacher", lambda *given: loads.append(1) or load(*given))
    config = make_kd_project(tmp_path, teacher_cache={"kind": kind, "dir": str(tmp_path / "shared")})
    with full_in_forward(GPU, most_tokens=500):
        assert find(tmp_path, config, train_kd.main) == 0
    assert loads and not (tmp_path / "shared").exists() and not (tmp_path / "run").exists()
    assert run_kd(tmp_path, config) == 0
    loads.clear()
    before = files_of(tmp_path / "shared")
    with full_in_forward(GPU, most_tokens=500):
        assert find(tmp_path, config, train_kd.main) == 0
    assert not loads and files_of(tmp_path / "shared") == before


# -- limits on a CPU -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that writes files of /proc and /sys/fs/cgroup; no limits of the user."""
    monkeypatch.setattr(memory_limit, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


AVAILABLE = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:   5000 kB\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/user/job\n", "cgroup/user/job/memory.max": "max\n", "cgroup/user/memory.max": "3000000\n",
    "cgroup/user/memory.current": "1500000\n", "cgroup/user/memory.stat": "anon 5\ninactive_file 500000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/job\n", "cgroup/memory/job/memory.limit_in_bytes": "2000000\n",
    "cgroup/memory/job/memory.usage_in_bytes": "300000\n", "cgroup/memory/job/memory.stat": "total_inactive_file 0\n",
    "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n", "cgroup/memory/memory.usage_in_bytes": "1\n",
}


@pytest.mark.parametrize(("files", "expected"), [
    ({}, None), (AVAILABLE, (5_120_000, "available on this machine")),
    ({**AVAILABLE, **VERSION_2}, (2_000_000, "left in the control group")),
    ({**AVAILABLE, **VERSION_1}, (1_700_000, "left in the control group")),
    ({**AVAILABLE, "proc/self/cgroup": "0::/gone\n"}, (5_120_000, "available on this machine")),
    ({**AVAILABLE, "proc/self/cgroup": "damaged"}, (5_120_000, "available on this machine")),
])
def test_what_a_machine_has_left(machine, files, expected):
    """Fault: a control group's limit, or what it has used already, is not seen, and the try ends other processes."""
    machine(files)
    limit = memory_limit.memory_limit()
    assert (limit and limit[:2]) == expected and (limit is None or not limit.imposed)


def test_limits_of_the_user(machine, monkeypatch):
    """Fault: `ulimit -v` is not seen, or counts although less is available."""
    machine(AVAILABLE)
    for size, name in ((4_000_000, "ulimit -v (address space)"), (6_000_000, "available on this machine")):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, size=size: (
            size if kind == resource.RLIMIT_AS else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert memory_limit.memory_limit().name == name


def give(value):
    return value


def fail(name: str):
    raise ConfigError(name)


def end(number: int):
    os.kill(os.getpid(), number)


def take(size: int, limit: Limit) -> str:
    memory_limit.impose(limit)
    try:
        return f"{torch.ones(size // 4).sum()}"
    except Exception as error:
        if memory_error(error) is None:
            raise
        return "full"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory of a process is limited on Linux alone")
def test_tries_in_processes_of_their_own():
    """Fault: a process that the system ends takes the search with it, its errors are lost, or it has no limit."""
    assert in_child(give, [1, 2]) == [1, 2]
    with pytest.raises(ConfigError, match=r"^a name$"):
        in_child(fail, "a name")
    assert in_child(end, signal.SIGKILL) == Answer(None, "its process was ended by SIGKILL")
    limit = Limit(1_500_000_000, "left", False)
    assert in_child(take, 4_000_000, limit) == "1000000.0" and in_child(take, 2_000_000_000, limit) == "full"
    assert in_child(take, 2_000_000_000, limit._replace(imposed=True)) != "full"  # the system's own, so none here


def fall(error: Exception):
    raise error


def not_finite():
    raise NotFinite("validation loss", 1.0, None, [1])


def test_an_error_that_cannot_be_put_together_again():
    """Fault: an error with more arguments than its message is told as TypeError: missing arguments."""
    with pytest.raises(RuntimeError, match=r"^NotFinite: .*validation loss"):
        in_child(not_finite)
    error = ConfigError("a name")
    error.doing = ["loading"]
    with pytest.raises(ConfigError, match=r"^a name$") as caught:
        in_child(fall, error)
    assert caught.value.doing == ["loading"]


ENDED = """
import os, signal
from pathlib import Path
from types import SimpleNamespace
from utils import find_batch_size
in_child = find_batch_size.in_child
find_batch_size.in_child = lambda *arguments: in_child(os.kill, os.getpid(), signal.SIGTERM)
with find_batch_size.in_child_processes(None, None, None, SimpleNamespace(path=Path("log"))):
    print("goes on")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
def test_nothing_is_left_of_a_search_that_is_ended(tmp_path):
    """Fault: SIGTERM leaves the folder of the process that forks the tries in the system's temporary folder."""
    done = subprocess.run([sys.executable, "-c", ENDED], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
    assert not list(tmp_path.iterdir())


def address_space_of_one_row(config_path: str) -> int:
    """Bytes."""
    from utils.config_files import load_config

    config = load_config(config_path, (), FineTuneConfig)
    place = Place(torch.device("cpu"))
    try_step(make_trial(config, train.build, place, RunLog(Path(config_path).parent, is_main=False)), 1)
    return memory_limit.field_of(Path("/proc/self/status"), "VmPeak:")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux alone")
def test_under_a_limit_of_the_user(tmp_path):
    """Fault: under `ulimit -v` the search is killed, finds what does not fit, or changes the run folder."""
    config = changed(make_project(tmp_path, rows=60, width=512, layers=4), trainer_kwargs={"max_steps": 1},
                     dataset_kwargs={"train_batch_size": 2})
    assert run(tmp_path, config) == 0
    before = files_of(tmp_path / "run")
    path = write_config(tmp_path, config)
    # A row of 228 tokens takes some 40 MB: 4 fit for certain, 60 do not.
    limit = in_child(address_space_of_one_row, str(path)) + 600_000_000
    found = subprocess.run(
        [sys.executable, "train.py", "--config", str(path), "--find_batch_size"], cwd=ROOT, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, text=True, timeout=500, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert found.returncode == 0, found.stderr
    size = int(re.search(r"largest batch that fits: (\d+) of the longest rows, peak [\d.]+ GB; memory: [\d.]+ GB "
                         r"ulimit -v", found.stdout)[1])
    assert 4 <= size < 60
    assert f"{size} rows: fits" in found.stderr and f"{size + 1} rows: does not fit" in found.stderr
    assert files_of(tmp_path / "run") == before
    assert np.prod([int(each) for each in re.findall(r"--set \S+=(\d+)", found.stdout)]) == 2
