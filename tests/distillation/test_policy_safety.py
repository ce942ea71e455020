"""Policy-gradient runs of train_kd.py: what stops them or is warned of, room for what is drawn, dropout."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.articles import DataError
from data.prompts import PromptFormat
from tests.conftest import END, byte_tokenizer, tiny_gpt2, write_rows
from tests.distillation.test_policy_runs import POLICY, STUDENT, strict_lines
from tests.distillation.test_train_kd import STILL
from tests.runs.test_train_script import last_error
from tests.small_kd_runs import POSITIONS, make_kd_project, run_kd, save_model
from tests.small_runs import assert_equal_weights, changed, make_rows, weights
from utils.runs import build

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(folder, name: str = "last"):
    return folder / "run/model_checkpoints" / name


# -- what stops a run or is warned of ----------------------------------------------------------------------------


@pytest.mark.parametrize("rollout", ["mixed", "student", "labels"])
def test_a_teacher_that_gives_nan(tmp_path, capsys, monkeypatch, rollout):
    """Fault: NaN rewards of one row spoil the weights; the error hides row or remedy; going on draws other rollouts."""
    config = changed(make_kd_project(tmp_path, **POLICY, rollout=rollout),
                     model_arch={"generation_kwargs": {"max_generation_length": 1}})  # a "^" that is drawn is not read
    rows = make_rows(12)
    rows[4]["article"] = "^ " + rows[4]["article"]
    write_rows(tmp_path / "train.csv", rows)
    assert run_kd(tmp_path, changed(config, trainer_kwargs={"output_dir": str(tmp_path / "whole")})) == 0
    load = build.load_teacher

    def spoilt(*arguments):
        teacher = load(*arguments)
        teacher.head = teacher.head._replace(weight=teacher.head.weight.clone())
        teacher.language_model.model.get_input_embeddings().weight[ord("^")] = math.nan
        return teacher

    with monkeypatch.context() as patch:
        patch.setattr(build, "load_teacher", spoilt)
        assert run_kd(tmp_path, config) == 1
    error = last_error(capsys)
    step = int(re.search(r"optimizer step (\d+): ", error)[1])
    assert step > 1 and len(strict_lines(tmp_path / "run")) == step - 1
    assert re.search(r"rows: \S*row-4\W", error) and "optimizer_kwargs.lm_lr" in error
    assert checkpoint(tmp_path).resolve().name == f"step-{step - 1}"
    AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path))
    assert run_kd(tmp_path, config) == 0
    assert_equal_weights(weights(tmp_path / "whole/model_checkpoints/last"), weights(checkpoint(tmp_path)))


def biased_student(folder, token: int, logit: float) -> None:
    """A student that gives this logit to one token and 0 to all others, in every state."""
    network = tiny_gpt2(positions=POSITIONS)
    with torch.no_grad():
        network.transformer.ln_f.weight.zero_()
        network.transformer.ln_f.bias.fill_(1)
        network.transformer.wte.weight.zero_()
        network.transformer.wte.weight[token] = logit / network.config.n_embd
    save_model(folder / "student", network)


EMPTY, LOW, ENDLESS = "all rollouts are empty", "entropy along its rollouts", "no rollout ended before 8 tokens"


@pytest.mark.parametrize(("token", "logit", "warnings"), [
    (END, 13.0, [EMPTY]), (END, 40.0, [EMPTY, LOW]), (ord("a"), 40.0, [LOW, ENDLESS]), (END, -20.0, [ENDLESS]),
], ids=["empty", "empty and certain", "certain", "endless"])
def test_a_policy_that_has_collapsed(tmp_path, capsys, token, logit, warnings):
    """Fault: a collapsed student trains on without a word, or is warned of at each step."""
    config = changed(make_kd_project(tmp_path, rows=6, **STUDENT), optimizer_kwargs=STILL)
    biased_student(tmp_path, token, logit)
    assert run_kd(tmp_path, config) == 0
    told = capsys.readouterr().err
    assert "Traceback" not in told
    found = [line for line in told.splitlines() if "warning: " in line]
    for text in (EMPTY, LOW, ENDLESS):
        assert len([line for line in found if text in line]) == (text in warnings)
    assert len(strict_lines(tmp_path / "run")) == 3


# -- room for what is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "cut"), [(29, 0), (30, 0), (31, 1), (40, 10)])
def test_a_prompt_is_cut_at_its_articles_end(length, cut):
    """Fault: off by one, or the cut takes the template's text instead of the article's end."""
    prompt_format = PromptFormat(byte_tokenizer(), "News: {article} TL;DR:", 40)
    article = bytes(range(97, 123))[: length - 13] + b"+" * max(0, length - 39)
    prompt = list(b"News: " + article + b" TL;DR:")
    assert len(prompt) == length
    kept = article[: len(article) - cut]
    assert prompt_format.shorten(prompt, 10) == list(b"News: " + kept + b" TL;DR:")


def test_rows_that_fill_the_context(tmp_path, capsys):
    """Fault: a full row has no room for its rollout; or no room at all is found out in the first step."""
    config = changed(make_kd_project(tmp_path, **POLICY), dataset_kwargs={"max_length": 80})
    for options, length, code in ((POLICY, 40, 0), (POLICY, 73, 2), ({"on_policy_fraction": 1}, 73, 2)):
        output = tmp_path / f"run-{length}"
        own = changed(config, model_arch={"generation_kwargs": {"max_generation_length": length}},
                      trainer_kwargs={"output_dir": str(output)})
        assert run_kd(tmp_path, {**own, "distillation_kwargs": options}) == code
        if code:  # the template takes 7 tokens, an article at least 1
            assert "max_generation_length is 73: too big" in (error := last_error(capsys)) and "at most 72" in error
            assert not (output / "metrics.jsonl").exists()
    with pytest.raises(DataError):
        PromptFormat(byte_tokenizer(), max_length=80).prediction_prompts([], 73)


# -- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "dropout", "resolved", "of_model"), [
    (POLICY, None, 0.0, 0.0), ({}, None, None, 0.1), ({"on_policy_fraction": 1}, None, None, 0.1),
    (POLICY, 0.2, 0.2, 0.2),
])
def test_dropout_that_is_not_set(tmp_path, capsys, options, dropout, resolved, of_model):
    """Fault: probabilities differ between drawing and loss by the model's own dropout, or divergence loses it."""
    config = changed(make_kd_project(tmp_path, rows=2, dropout=0.1, **options), model_arch={"dropout": dropout})
    assert run_kd(tmp_path, config) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["model_arch"]["dropout"] == resolved
    assert json.loads((checkpoint(tmp_path) / "config.json").read_text())["resid_pdrop"] == of_model
    assert ("model_arch.dropout is 0.2" in capsys.readouterr().err) == (dropout is not None)


def test_labels_may_go_on_with_longer_predictions(tmp_path):
    """Fault: max_generation_length, which decides predictions alone where nothing is drawn, forbids to go on."""
    config = changed(make_kd_project(tmp_path, rows=4, method="policy_gradient", rollout="labels"),
                     trainer_kwargs={"max_steps": 1})
    assert run_kd(tmp_path, config) == 0
    assert run_kd(tmp_path, changed(config, trainer_kwargs={"max_steps": 2},
                                    model_arch={"generation_kwargs": {"max_generation_length": 9}})) == 0


def test_validation_has_no_penalties(tmp_path):
    """Fault: a validation loss that holds penalties which no line shows; or a penalty that was not measured is 0."""
    config = changed(make_kd_project(tmp_path, rows=4, method="policy_gradient", penalty=True, diversity_weight=0),
                     trainer_kwargs={"max_steps": 1}, dataset_kwargs={"validation_dataset": "validation.csv"})
    assert run_kd(tmp_path, config) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if line["split"] == "validation")
    assert measured["loss"] == pytest.approx(0.5 * measured["single_step"] + 0.5 * measured["cross_entropy"], rel=1e-5)
    trained = next(line for line in lines if line["split"] == "train")
    assert "diversity_penalty" not in trained and trained["frequency_penalty"] > 0
