"""`--find_batch_size`: the search, the numbers for the same steps, and the steps that are tried (on a GPU: test_cuda*).
"""

import re
from pathlib import Path

import pytest
import torch

from model.language_model import LanguageModel
from tests.faults.memory import GPU, full_in_forward
from tests.small_kd_runs import make_kd_project
from tests.small_runs import assert_equal_weights, changed, make_project, write_config
from utils.config.distill import DistillConfig
from utils.config.fine_tune import FineTuneConfig
from utils.config.load import load_config
from utils.runs.build import build_distillation, build_fine_tuning
from utils.runs.find_batch_size import make_probe, report
from utils.runs.run_log import RunLog
from utils.training.distributed import DistributedContext
from utils.training.memory_probe import MemoryProbe, largest_that_fits

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 228  # tokens, of the rows of make_rows


def cpu_probe(folder: Path, config: dict, build=build_fine_tuning, model=FineTuneConfig) -> MemoryProbe:
    """On the CPU."""
    config = load_config(write_config(folder, config), (), model)
    return make_probe(config, build, DistributedContext(torch.device("cpu")), RunLog(folder, is_main=False))


@pytest.mark.parametrize("most", [1, 2, 7, 40])
def test_the_search(most):
    """Fault: off by one at the limit or at the last row, or a try for each size."""
    for limit in range(most + 3):
        tried = []
        assert largest_that_fits(lambda size: tried.append(size) or size <= limit, most) == min(limit, most)  # noqa: B023
        assert len(set(tried)) == len(tried) <= 12 and all(1 <= size <= most for size in tried)


@pytest.mark.parametrize(("dataset", "accumulation", "fits", "expected"), [
    ({"train_batch_size": 4}, 3, 10, (6, 2)), ({"train_batch_size": 4}, 3, 40, (12, 1)),
    ({"train_batch_size": 7}, 1, 3, (1, 7)), ({"train_batch_size": 7, "tokens_per_batch": 9}, 1, 3, (684,)),
])
def test_the_steps_stay_the_same(dataset, accumulation, fits, expected):
    """Fault: numbers whose product is another, so that another model is trained; or that do not fit."""
    config = FineTuneConfig.model_validate({
        "dataset_kwargs": dataset, "trainer_kwargs": {"gradient_accumulation_steps": accumulation}})
    lines = report(config, fits, 40, LONGEST)
    assert lines[0] == f"largest batch that fits: {fits} of the longest rows{' (all of them)' * (fits == 40)}"
    assert tuple(int(value) for value in re.findall(r"--set \w+\.\w+=(\d+)", lines[-1])) == expected


def test_steps_on_the_longest_rows(tmp_path, monkeypatch):
    """Fault: rows of average length, no optimizer state, no gradients in the second micro-batch, or a weight moves."""
    probe = cpu_probe(tmp_path, changed(make_project(tmp_path), dataset_kwargs={"train_batch_size": 12}))
    seen, label_hidden = [], LanguageModel.label_hidden

    def recorded(model, input_ids, mask, *others, **options):
        gradients = all(each.grad is not None for each in model.parameters())
        seen.append((mask.sum(1).tolist(), gradients, bool(probe.optimizer.state)))
        return label_hidden(model, input_ids, mask, *others, **options)

    monkeypatch.setattr(LanguageModel, "label_hidden", recorded)
    before = {name: value.clone() for name, value in probe.objective.named_parameters()}
    assert probe.fits(5)
    longest = sorted(probe.table.lengths.tolist(), reverse=True)
    assert seen == [([longest[-1]], False, False), (longest[:5], False, True), (longest[:5], True, True)]
    assert_equal_weights(before, dict(probe.objective.named_parameters()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [
    {}, {"method": "policy_gradient"}, {"on_policy_fraction": 0.1}, {"teacher_cache": {"kind": "hidden"}},
], ids=str)
def test_what_does_not_fit(tmp_path, options):
    """Fault: full memory ends the search, or counts against the next size; teacher or rollouts cannot be tried."""
    config = changed(make_kd_project(tmp_path, **options), trainer_kwargs={"gradient_accumulation_steps": 3})
    probe = cpu_probe(tmp_path, config, build_distillation, DistillConfig)
    with full_in_forward(GPU, most_tokens=2 * LONGEST):
        assert [probe.fits(size) for size in (1, 2, 4, 2)] == [True, True, False, True]
    with full_in_forward(RuntimeError("shapes"), most_tokens=LONGEST), pytest.raises(RuntimeError, match="shapes"):
        probe.fits(4)
    assert not (tmp_path / "run").exists()  # nor a teacher cache in it
