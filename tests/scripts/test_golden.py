"""Results of whole runs on fixed seeds, recorded in tests/golden/: what a rebuilt part must give again.

    python -m tests.scripts.test_golden          records them anew; only where a change of numbers is meant

Each case is driven through the scripts' configs and read from the files they write, so it knows nothing of the inside.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.small_kd_runs import make_kd_project, run_kd
from tests.small_runs import changed, make_project, metrics, run

FOLDER = Path(__file__).parents[1] / "golden"
DIVERGENCES = ("forward", "reverse", "JS", "generalized_js", "skew_forward", "skew_reverse", "total_variation",
               "symmetric", "adaptive")
POLICY = {"method": "policy_gradient", "alpha": 0.3}
CASES: dict[str, dict | None] = {  # name -> distillation_kwargs; None is train.py
    "fine_tuning": None,
    **{f"divergence_{name}": {"kl_div": name, "temperature": 1.5} for name in DIVERGENCES},
    "cached_hidden": {"kl_div": "JS", "teacher_cache": {"kind": "hidden"}},
    "cached_top_k": {"kl_div": "reverse", "teacher_cache": {"kind": "top_k", "top_k": 16}},
    "on_policy_JS": {"kl_div": "JS", "on_policy_fraction": 1.0},
    "policy_gradient": POLICY,
    "policy_gradient_penalties": {**POLICY, "penalty": True, "frequency_weight": 1.0, "diversity_weight": 1.0,
                                  "entropy_weight": 1.0},
    "policy_gradient_sequence_weights": {**POLICY, "importance_weight": "sequence", "whiten": True,
                                         "rollout_epochs": 2},
    "policy_gradient_labels": {**POLICY, "rollout": "labels"},
}


def result(name: str, folder: Path) -> dict:
    """Losses of three steps, gradients of the first one, logits, predictions and scores behind the third."""
    options = CASES[name]
    config = make_project(folder) if options is None else make_kd_project(folder, **options)
    start = run if options is None else run_kd
    config = changed(config, trainer_kwargs={"gradient_accumulation_steps": 2, "metrics": ["rouge"],
                                             "save_predictions": True, "gradient_clipping": None},
                     dataset_kwargs={"validation_dataset": "validation.csv"})
    network = AutoModelForCausalLM.from_pretrained(folder / ("model" if options is None else "student"))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plain = {"type": "SGD", "lm_lr": 1.0, "decay_all": True, "kwargs": {}}
    one = changed(config, trainer_kwargs={"max_steps": 1, "output_dir": str(folder / "one"), "metrics": []},
                  optimizer_kwargs=plain, lr_scheduler_kwargs={"num_warmup_steps": 0})
    three = changed(config, trainer_kwargs={"max_steps": 3}, lr_scheduler_kwargs={"num_warmup_steps": 0})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert start(folder, one) == 0
        assert start(folder, three) == 0
    after = load_file(folder / "one/model_checkpoints/last/model.safetensors")
    last = folder / "run/model_checkpoints/last"
    network = AutoModelForCausalLM.from_pretrained(last).eval()
    ids = torch.tensor([list(b"storm court mayor\nTL;DR: rain")])
    with torch.no_grad():
        logits = network(ids).logits[0, [5, 15, -1]]
    predictions = json.loads((folder / "run/predictions/validation-step-3.json").read_text())
    timeless = [{key: value for key, value in line.items() if key != "time"} for line in metrics(folder / "run")]
    scores = json.loads((folder / "run/scores.json").read_text())["validation"]
    return {
        "train": timeless,
        "gradients": {key: fingerprint(key, before[key] - value) for key, value in sorted(after.items())},
        "logits": [[round(value, 6) for value in row[::4]] for row in logits.tolist()],
        "predictions": [each["generated_highlight"] for each in predictions],
        "scores": {key: value for key, value in scores.items() if key.startswith("rouge")},
        "validation": {key: value for key, value in metrics(folder / "run", "validation")[0].items() if key != "time"},
    }


def fingerprint(name: str, tensor: torch.Tensor) -> list[float]:
    """[norm, a fixed random projection], without GPT-2's key biases: they have no true gradient, only rounding."""
    if name.endswith("attn.c_attn.bias"):
        query, _, value = tensor.chunk(3)
        tensor = torch.cat([query, value])
    draw = torch.randn(tensor.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [tensor.double().norm().item(), (tensor.double().flatten() @ draw).item() / tensor.numel() ** 0.5]


def assert_close(found, expected, where: str, tolerance: float) -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}", tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_close(found[place], value, f"{where}[{place}]", tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_recorded_ones(name, tmp_path):
    """Fault: a rebuilt part changes a loss, a gradient, what is drawn, a text or a score."""
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    found = result(name, tmp_path)
    tolerances = {"train": 1e-5, "gradients": 1e-5, "logits": 1e-4, "predictions": 0, "scores": 1e-6,
                  "validation": 1e-4}
    for part, tolerance in tolerances.items():
        assert_close(found[part], expected[part], part, tolerance)


def record() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(result(name, Path(folder)), ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, flush=True)


if __name__ == "__main__":
    record()
