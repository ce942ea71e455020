"""The scripts on a CUDA GPU; test_cuda.py says how to try these tests on a CPU. Full memory: test_cuda_memory.py."""

import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.gpt2.cuda_graph import StepGraphs, round_up
from tests.data import test_demo_news_folder
from tests.distillation.test_policy_runs import PENALTY, POLICY
from tests.distillation.test_train_kd import HIDDEN, resumable
from tests.evaluation import test_validate_model
from tests.gpu.test_cuda import DEVICE
from tests.model.test_decoding import ending_model
from tests.runs.test_resume import start, wait_for_step
from tests.small_kd_runs import make_kd_project, run_kd, save_model
from tests.small_runs import changed, largest_difference, launch, make_project, metrics, run, weights, write_config

pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("one_thread"),
]
# With Adam's usual eps a gradient of 0 up to rounding makes a whole step, and no two devices round alike.
SMOOTH = {"lm_lr": 2e-3, "kwargs": {"eps": 1e-3}}
KINDS = {
    "live": {}, "reverse at 2": {"kl_div": "reverse", "temperature": 2.0}, "hidden": {"teacher_cache": HIDDEN},
    "top_k": {"teacher_cache": {"kind": "top_k", "top_k": 20}, "kl_div": "JS"},
    "policy gradient": POLICY | PENALTY | {"rollout_epochs": 2}, "labels": POLICY | {"rollout": "labels"},
    "on policy": {"on_policy_fraction": 1.0},
}
# cuBLAS asks for it where results must repeat; read when a process first uses the GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def last(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder / "model_checkpoints/last")


def assert_finite(lines: list[dict]) -> None:
    assert lines and all(math.isfinite(value) for line in lines for value in line.values()
                         if isinstance(value, float))


def assert_alike(ours: list[dict], theirs: list[dict], tolerance: float = 1e-3) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = ({key: line[key] for key in line if key != "split"} for line in (mine, other))
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance / 10)


def on_both(start_run, folder: Path, config: dict) -> list[Path]:
    """The same run on the CPU and on the device; their folders."""
    config = changed(config, optimizer_kwargs=SMOOTH)
    folders = [folder / "on-cpu", folder / "on-device"]
    for device, output in zip(("cpu", DEVICE.type), folders, strict=True):
        options = {"device": device, "output_dir": str(output)}
        assert start_run(folder, changed(config, trainer_kwargs=options)) == 0
    return folders


# -- train.py --------------------------------------------------------------------------------------------------------


def test_the_demo_model(tmp_path, capsys):
    """Fault: train.py as users start it does not run on a GPU, or takes another device or precision there."""
    assert test_demo_news_folder.run(tmp_path / "news") == 0
    config = {
        "model_arch": {"lang_model": "demo-student", "tokenizer": str(tmp_path / "news/tokenizer"),
                       "generation_kwargs": {"max_generation_length": 12}},
        "trainer_kwargs": {"output_dir": str(tmp_path / "run"), "epochs": 3, "log_every": 1, "metrics": ["rouge"]},
        "optimizer_kwargs": {"lm_lr": 0.003},
        "dataset_kwargs": {"data_dir": str(tmp_path / "news"), "train_dataset": "student.csv", "train_batch_size": 4},
    }
    assert run(tmp_path, config) == 0
    printed = capsys.readouterr().err
    if DEVICE.type == "cuda":
        assert re.search(r"device: cuda:0 \(NVIDIA .*\), bfloat16 autocast", printed)
    lines, validation = metrics(tmp_path / "run"), metrics(tmp_path / "run", "validation")
    assert_finite(lines + validation)
    assert lines[-1]["cross_entropy"] < 0.9 * lines[0]["cross_entropy"] and len(validation) == 3
    assert {"perplexity", "rougeL"} <= validation[0].keys()
    assert {tensor.dtype for tensor in last(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_steps_equal_those_of_the_cpu(tmp_path, precision, tolerance):
    """Fault: other rows, another learning rate, clipping or optimizer on a GPU, or TF32 under the name of float32."""
    config = changed(make_project(tmp_path, rows=6, width=32, layers=2), trainer_kwargs={"precision": precision})
    folders = on_both(run, tmp_path, config)
    assert largest_difference(*map(last, folders)) < tolerance
    assert largest_difference(last(folders[0]), weights(tmp_path / "model")) > 2 * tolerance
    for split in ("train", "validation"):
        assert_alike(*(metrics(folder, split) for folder in folders), 1e-3 if precision == "float32" else 0.03)


def difference_of_a_stop(start_run, folder: Path, config: dict, step: int) -> float:
    """Of the last weights of a whole run and of one that was stopped after `step` and started again."""
    config = changed(config, optimizer_kwargs=SMOOTH, trainer_kwargs={"device": DEVICE.type})
    for name, ends in (("whole", [None]), ("parts", [step, None])):
        for most in ends:
            options = {"output_dir": str(folder / name), "max_steps": most}
            assert start_run(folder, changed(config, trainer_kwargs=options)) == 0
    assert len(metrics(folder / "parts")) == len(metrics(folder / "whole"))
    return largest_difference(last(folder / "whole"), last(folder / "parts"))


def fine_tuning(folder: Path, **options) -> dict:
    """6 steps in 2 epochs, with dropout."""
    return changed(
        make_project(folder, rows=11, layers=2, dropout=0.1), lr_scheduler_kwargs={"num_training_steps": 6},
        trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 2, **options},
    )


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that give the same bits each time; plain attention, whose backward pass always does.

    Decoding steps are not recorded as graphs: what writes in a fixed order may look at its indices on the CPU.
    """
    def run_plainly(graphs, step, tokens, longest):
        graphs.tokens[: len(tokens)] = tokens
        return step(graphs.tokens, round_up(longest))[: len(tokens)].clone()

    monkeypatch.setattr(StepGraphs, "run", run_plainly)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_is_exact_with_deterministic_kernels(tmp_path, deterministic, precision):
    """Fault: dropout of the GPU, moments of the fused optimizer or rows are not those of the run without a stop."""
    assert difference_of_a_stop(run, tmp_path, fine_tuning(tmp_path, precision=precision), 2) == 0.0
    (states,) = [torch.load(path, weights_only=True) for path in
                 (tmp_path / "parts/model_checkpoints/last/trainer_state").glob("random.pt")]
    assert len(states[0]["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize("step", [2, 3])
def test_resume_with_the_usual_kernels(tmp_path, step):
    """Fault: as above. Atomic additions come in any order, so the weights may differ by rounding."""
    assert difference_of_a_stop(run, tmp_path, fine_tuning(tmp_path), step) < 1e-5


def test_a_killed_run_continues(tmp_path):
    """Fault: what SIGKILL leaves (a lock, a context of the GPU, half a checkpoint) keeps the run from continuing."""
    config = changed(
        make_project(tmp_path, rows=400, layers=2, dropout=0.1), optimizer_kwargs=SMOOTH,
        trainer_kwargs={"device": DEVICE.type, "monitor_val": False, "n_batch_ckpt_save": 10},
    )
    process = start(write_config(tmp_path, config))
    wait_for_step(tmp_path / "run", 25, process)
    process.send_signal(signal.SIGKILL)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL, printed
    assert 20 <= int((tmp_path / "run/model_checkpoints/last").resolve().name[5:]) < 200
    assert run(tmp_path, config) == 0
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "whole")})) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 201))
    assert largest_difference(last(tmp_path / "run"), last(tmp_path / "whole")) < 1e-3


def test_a_checkpoint_continues_on_another_device(tmp_path):
    """Fault: a checkpoint of a GPU can only be read where there is one, or its optimizer stays behind."""
    config = changed(make_project(tmp_path, rows=8), optimizer_kwargs=SMOOTH,
                     lr_scheduler_kwargs={"num_training_steps": 4})
    for name, devices in (("cpu", ["cpu", "cpu"]), ("there", ["cpu", DEVICE.type]), ("back", [DEVICE.type, "cpu"])):
        for device, most in zip(devices, (2, None), strict=True):
            options = {"device": device, "output_dir": str(tmp_path / name), "max_steps": most}
            assert run(tmp_path, changed(config, trainer_kwargs=options)) == 0
    for name in ("there", "back"):
        assert largest_difference(last(tmp_path / "cpu"), last(tmp_path / name)) < 1e-5


# -- train_kd.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_distillation_equals_that_of_the_cpu(tmp_path, capsys, options):
    """Fault: teacher, cache, rollouts or penalties mix up devices, or learn something else on a GPU."""
    config = changed(make_kd_project(tmp_path, rows=8, **options), trainer_kwargs={"epochs": 2})
    folders = on_both(run_kd, tmp_path, config)
    assert f"teacher: {tmp_path / 'teacher'}, on {DEVICE.type}" in capsys.readouterr().err
    for split in ("train", "validation"):
        assert_alike(*(metrics(folder, split) for folder in folders))
    assert largest_difference(*map(last, folders)) < 1e-4
    assert largest_difference(last(folders[0]), weights(tmp_path / "student")) > 1e-3


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_distillation_in_bfloat16(tmp_path, options):
    """Fault: a type that does not fit another under autocast, in the teacher's cache or while drawing."""
    config = changed(make_kd_project(tmp_path, rows=8, **options), trainer_kwargs={
        "epochs": 2, "device": DEVICE.type, "precision": "bfloat16"})
    found = []
    for precision in ("bfloat16", "float32"):
        output = tmp_path / precision
        own = changed(config, trainer_kwargs={"precision": precision, "output_dir": str(output)})
        assert run_kd(tmp_path, own) == 0
        found.append(metrics(output) + metrics(output, "validation"))
        assert_finite(found[-1])
    for name in ["cross_entropy"] if {"method", "on_policy_fraction"} & options.keys() else ["cross_entropy", "loss"]:
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=0.05), name


@pytest.mark.parametrize("options", [KINDS["live"], KINDS["hidden"], KINDS["policy gradient"], KINDS["on policy"]],
                         ids=["live", "hidden", "policy gradient", "on policy"])
def test_resumed_distillation_is_exact_with_deterministic_kernels(tmp_path, deterministic, options):
    """Fault: after a stop within a set other rollouts are drawn, or kept ones lie on another device."""
    epochs = 1 if "rollout_epochs" in options else 2
    config = changed(resumable(tmp_path, **options), trainer_kwargs={"epochs": epochs})
    assert difference_of_a_stop(run_kd, tmp_path, config, 3) == 0.0


# -- validate_model.py -----------------------------------------------------------------------------------------------


def test_predictions_equal_those_of_the_cpu(tmp_path):
    """Fault: in float32 the GPU writes other highlights than the CPU, or the flags do not choose the device."""
    folder = save_model(tmp_path / "model", ending_model().model, test_validate_model.TEMPLATE)
    csv = test_validate_model.write_news(tmp_path / "news.csv")
    number = "0" if DEVICE.type == "cuda" else "-1"
    for flags in (["--batch_size", "3"], ["--num_beams", "3"]):
        found = []
        for device in ("-1", number):
            code, predictions, scores = test_validate_model.run(tmp_path, folder, csv, "--device_id", device, *flags)
            assert code == 0 and scores["device"].startswith("cpu" if device == "-1" else "cuda:0")
            found.append(test_validate_model.texts(predictions))
        assert found[0] == found[1] and len(set(found[0])) > 5
    code, predictions, _ = test_validate_model.run(tmp_path, folder, csv, "--precision", "bfloat16")
    assert code == 0 and len(predictions) == len(found[0])


def test_one_process_of_the_launcher(tmp_path):
    """Fault: started through torch's launcher the one process trains elsewhere, or something else."""
    config = changed(make_project(tmp_path, rows=8), optimizer_kwargs=SMOOTH, trainer_kwargs={"device": DEVICE.type})
    assert run(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "plain")})) == 0
    printed = launch("train.py", tmp_path, config, 1)
    assert f"device: {'CPU' if DEVICE.type == 'cpu' else 'cuda:0'} (" in printed
    assert largest_difference(last(tmp_path / "plain"), last(tmp_path / "run")) < 1e-5
