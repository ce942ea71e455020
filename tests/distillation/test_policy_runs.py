"""Policy-gradient runs of train_kd.py: what they log, sets of rollouts, exact resume, equal steps."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distillation.test_train_kd import STILL, assert_stopping_changes_nothing, batch_by_hand, resumable
from tests.small_kd_runs import make_kd_project, predicted_from, run_kd
from tests.small_runs import changed, largest_difference, launch, make_rows, metrics, weights

pytestmark = pytest.mark.usefixtures("one_thread")
POLICY = {"method": "policy_gradient"}
STUDENT = POLICY | {"rollout": "student"}
PENALTY = {"penalty": True, "frequency_weight": 0.3, "diversity_weight": 0.2, "entropy_weight": 0.05}
OF_POLICY = ("reward", "sequence_reverse_kl", "single_step", "long_term", "importance_weight_mean", "clip_fraction",
             "rollout_length", "entropy")
OF_PENALTY = ("frequency_penalty", "diversity_penalty", "entropy_penalty")


def strict_lines(folder) -> list[dict]:
    """Training lines; an error where one is not strict JSON."""
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


# -- what a run logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"rollout": "mixed", "alpha": 0.4, "temperature": 2.0}, {"rollout": "student", "lm_weight": 0.2},
    {"rollout": "teacher", "whiten": True, "clip_epsilon": None}, {"rollout": "labels", **PENALTY},
    {"rollout_epochs": 2, "importance_weight": "sequence"},
], ids=str)
def test_logged_parts_are_those_of_the_loss(tmp_path, options):
    """Fault: a part is missing from loss or log, counted over other tokens, or not the number that its name says."""
    config = changed(make_kd_project(tmp_path, rows=7, **POLICY, **options),
                     trainer_kwargs={"gradient_accumulation_steps": 2})
    assert run_kd(tmp_path, config) == 0
    lines = strict_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 2 * options.get("rollout_epochs", 1) + 1))
    share, names = options.get("lm_weight", 0.5), OF_PENALTY if "penalty" in options else ()
    for line in lines:
        assert {*OF_POLICY, *names, "cross_entropy", "loss", "learning_rate", "grad_norm", "label_tokens",
                "tokens_per_second"} <= line.keys()
        assert {*OF_PENALTY}.isdisjoint(line.keys() - {*names}) and "divergence" not in line
        policy = line["single_step"] + line["long_term"]
        policy += sum(line[name] * PENALTY[name.replace("penalty", "weight")] for name in names)
        expected = (1 - share) * policy + share * line["cross_entropy"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert line["sequence_reverse_kl"] == pytest.approx(-line["reward"] * line["rollout_length"], rel=1e-4)
        assert line["single_step"] > 0 and 0 < line["entropy"] <= math.log(257)
        assert 0 <= line["clip_fraction"] <= 1 and (names == () or line["frequency_penalty"] > 0)
        if options.get("rollout") == "labels":
            rows = 4 if line["step"] == 1 else 3
            assert line["rollout_length"] == pytest.approx(line["label_tokens"] / rows, rel=1e-6)
        else:
            assert 1 <= line["rollout_length"] <= 8
        if options.get("rollout") in ("labels", "student"):
            assert line["importance_weight_mean"] == pytest.approx(1, abs=1e-5)
        else:
            assert line["importance_weight_mean"] != pytest.approx(1, abs=1e-3)
    (validation,) = metrics(tmp_path / "run", "validation")
    assert {"loss", "cross_entropy", "perplexity", "single_step", "entropy"} <= validation.keys()
    assert largest_difference(weights(tmp_path / "student"), weights(tmp_path / "run/model_checkpoints/last")) > 1e-3


def policy_by_hand(teacher, student, batch) -> dict[str, float]:
    """Means over the label tokens, from both models' full logits in float64; the advantage is the mean later reward."""
    ids, mask, labels = batch
    places = predicted_from(labels)
    log_p, log_q = (network(ids, attention_mask=mask).logits.log_softmax(-1) for network in (teacher, student))
    reward = {(row, column): (log_p - log_q)[row, column, labels[row, column + 1]].item() for row, column in places}
    later = [[reward[other] for other in places if other[0] == row and other[1] > column] for row, column in places]
    sums = {
        "cross_entropy": -sum(log_q[row, column, labels[row, column + 1]].item() for row, column in places),
        "reward": sum(reward.values()),
        "long_term": -sum(sum(each) / len(each) for each in later if each),
        "single_step": sum((log_q[at].exp() * (log_q[at] - log_p[at])).sum().item() for at in places),
        "entropy": -sum((log_q[at].exp() * log_q[at]).sum().item() for at in places),
    }
    return {name: value / len(places) for name, value in sums.items()}


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (2, 3)])
def test_values_on_the_highlights_are_the_formula_s(tmp_path, batch, accumulation):
    """Fault: rewards, advantages or the single-step part are of other tokens or another teacher than the files say."""
    config = changed(make_kd_project(tmp_path, rows=6, **POLICY, rollout="labels"), optimizer_kwargs=STILL,
                     dataset_kwargs={"train_batch_size": batch},
                     trainer_kwargs={"gradient_accumulation_steps": accumulation})
    assert run_kd(tmp_path, config) == 0
    networks = [AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("teacher", "student")]
    with torch.no_grad():
        expected = policy_by_hand(*networks, batch_by_hand(make_rows(6)))
        unseen = policy_by_hand(*networks, batch_by_hand(make_rows(4, seed=1)))
    (line,), (validation,) = metrics(tmp_path / "run"), metrics(tmp_path / "run", "validation")
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    for name in ("cross_entropy", "single_step", "entropy"):
        assert validation[name] == pytest.approx(unseen[name], rel=1e-4)
    assert validation["loss"] == pytest.approx(0.5 * unseen["cross_entropy"] + 0.5 * unseen["single_step"], rel=1e-4)


def test_whitened_rewards_cancel_where_nothing_has_changed(tmp_path):
    """Fault: whitening over a micro-batch instead of the step; with weights of 1 the step's mean is -mean A = 0."""
    found = {}
    for whiten in (False, True):
        config = changed(make_kd_project(tmp_path, **STUDENT, whiten=whiten),
                         trainer_kwargs={"output_dir": str(tmp_path / str(whiten)), "gradient_accumulation_steps": 3})
        assert run_kd(tmp_path, config) == 0
        found[whiten] = [abs(line["long_term"]) for line in strict_lines(tmp_path / str(whiten))]
    assert max(found[True]) < 1e-4 < 0.01 < min(found[False])


def test_some_steps_on_the_students_own_rollouts(tmp_path):
    """Fault: on_policy_fraction takes all steps or none, or the cross-entropy is that of the rollouts."""
    found = {}
    for fraction in (0, 0.5, 1):
        config = changed(make_kd_project(tmp_path, on_policy_fraction=fraction), optimizer_kwargs=STILL,
                         trainer_kwargs={"output_dir": str(tmp_path / str(fraction)), "epochs": 4})
        assert run_kd(tmp_path, config) == 0
        found[fraction] = strict_lines(tmp_path / str(fraction))
        for line in found[fraction]:
            assert line["loss"] == pytest.approx(0.5 * line["cross_entropy"] + 0.5 * line["divergence"], rel=1e-5)
    for fraction in (0.5, 1):
        assert all(ours["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-5)
                   for ours, plain in zip(found[fraction], found[0], strict=True))
    own = {fraction: sum(ours["divergence"] != pytest.approx(plain["divergence"], rel=1e-5)
                         for ours, plain in zip(found[fraction], found[0], strict=True)) for fraction in (0.5, 1)}
    assert own[1] == 24 and 6 <= own[0.5] <= 18


# -- sets that several steps use ---------------------------------------------------------------------------------


def test_steps_in_a_row_use_one_set(tmp_path):
    """Fault: rollout_epochs draws anew in each step, or ratio and clip do not see that the student has changed."""
    found = {}
    for name, rate, clip in (("plain", 0.02, 0.2), ("wide", 0.02, None), ("still", 1e-12, 0.2)):
        config = changed(make_kd_project(tmp_path, **STUDENT, rollout_epochs=2, clip_epsilon=clip),
                         optimizer_kwargs={"lm_lr": rate}, lr_scheduler_kwargs={"num_warmup_steps": 0},
                         trainer_kwargs={"output_dir": str(tmp_path / name)})
        assert run_kd(tmp_path, config) == 0
        found[name] = strict_lines(tmp_path / name)
        assert len(found[name]) == 12  # 6 steps of rows, each twice
        for first, second in zip(found[name][::2], found[name][1::2], strict=True):
            for key in ("reward", "rollout_length", "label_tokens"):
                assert first[key] == pytest.approx(second[key], rel=1e-6)
            assert first["clip_fraction"] == 0
            assert (first["long_term"] == pytest.approx(second["long_term"], rel=1e-3)) == (name == "still")
        assert len({line["reward"] for line in found[name]}) == 6
    assert sum(line["clip_fraction"] for line in found["plain"]) > 0.1
    assert all(line["clip_fraction"] == 0 for line in (*found["wide"], *found["still"]))


# -- resume ------------------------------------------------------------------------------------------------------

TWICE = POLICY | {"rollout_epochs": 2, "whiten": True}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(("epochs", "options", "steps"), [
    pytest.param(2, POLICY | PENALTY, [2], id="mixed"),
    pytest.param(2, POLICY | PENALTY, [1, 3, 4, 5], id="mixed, other steps", marks=SLOW),
    pytest.param(1, TWICE, [3], id="within a set"),
    pytest.param(1, TWICE, [1, 2, 4, 5], id="within and between sets", marks=SLOW),
    pytest.param(1, TWICE | {"rollout": "labels"}, [3], id="labels", marks=SLOW),
    pytest.param(2, {"on_policy_fraction": 0.5}, [3], id="on policy"),
    pytest.param(2, {"on_policy_fraction": 0.5}, [1, 2, 4, 5], id="on policy, other steps", marks=SLOW),
])
def test_resume_repeats_the_run(tmp_path, capsys, epochs, options, steps):
    """Fault: after a stop other rollouts are drawn, or kept ones are lost, rewards and all (case A20)."""
    config = changed(resumable(tmp_path, **options), trainer_kwargs={"epochs": epochs})
    assert_stopping_changes_nothing(tmp_path, config, steps, capsys)


# -- the same step -----------------------------------------------------------------------------------------------


def assert_same_lines(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = ({key: line[key] for key in line if key != "split"} for line in (mine, other))
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", [POLICY | PENALTY | {"whiten": True}, {"on_policy_fraction": 1}],
                         ids=["policy gradient", "divergence"])
def test_same_step_for_every_split_into_micro_batches(tmp_path, options):
    """Fault: means of micro-batch means, or draws that depend on the rows beside a row (case A17)."""
    found = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        output = tmp_path / f"run-{batch}"
        config = changed(make_kd_project(tmp_path, rows=11, **options), optimizer_kwargs={"lm_lr": 1e-3},
                         dataset_kwargs={"train_batch_size": batch}, trainer_kwargs={
                             "output_dir": str(output), "gradient_accumulation_steps": accumulation})
        assert run_kd(tmp_path, config) == 0
        found.append((weights(output / "model_checkpoints/last"), metrics(output)))
    for other, lines in found[1:]:
        assert largest_difference(found[0][0], other) < 1e-5
        assert_same_lines(found[0][1], lines)


@pytest.mark.slow
@pytest.mark.parametrize("options", [TWICE | PENALTY, {"on_policy_fraction": 0.5}, POLICY | {"rollout": "labels"}],
                         ids=["policy gradient", "divergence", "labels"])
def test_two_processes_equal_one_and_one_goes_on(tmp_path, options):
    """Fault: rewards whitened or rollouts counted by process; a process without rows hangs; one that goes on alone
    starts the random numbers of the rollouts again."""
    # The last step has one row, so one micro-batch for two processes.
    project = changed(make_kd_project(tmp_path, rows=9, **options), optimizer_kwargs={"lm_lr": 1e-3},
                      lr_scheduler_kwargs={"num_training_steps": 8},
                      trainer_kwargs={"epochs": 2, "gradient_accumulation_steps": 4})
    assert run_kd(tmp_path, changed(project, trainer_kwargs={"output_dir": str(tmp_path / "1")})) == 0
    launch("train_kd.py", tmp_path, changed(project, trainer_kwargs={"output_dir": str(tmp_path / "2")}), 2)
    stopped = changed(project, trainer_kwargs={"output_dir": str(tmp_path / "both"), "max_steps": 2})
    launch("train_kd.py", tmp_path, stopped, 2)
    assert run_kd(tmp_path, changed(stopped, trainer_kwargs={"max_steps": None})) == 0
    one, *others = ((weights(tmp_path / name / "model_checkpoints/last"), metrics(tmp_path / name))
                    for name in ("1", "2", "both"))
    for found, lines in others:
        assert largest_difference(one[0], found) < 1e-5
        assert_same_lines(one[1], lines)
