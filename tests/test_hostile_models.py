"""Code that lies beside a model, a tokenizer or a data set is never run; claims take no memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from model.claims import check_amount, stored_in
from model.loading import build_model
from model.model_folder import numbers_in, weight_files
from tests.conftest import tiny_gpt2
from tests.faults import hostile_claims, hostile_models, hostile_mutations
from tests.faults.hostile_attack import carry_out
from tests.faults.hostile_confined import CAN_CONFINE, outcomes
from tests.faults.hostile_pickles import model_folder


@pytest.mark.parametrize("attack", hostile_models.ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, tmp_path):
    """Fault: code of a stranger's folder is run, or his files lead to others."""
    outcome = carry_out(attack, tmp_path)
    assert outcome.kind != "FAILED", outcome.text


@pytest.mark.skipif(not CAN_CONFINE, reason="memory is bounded through Linux's /proc")
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_claims_take_no_memory(tmp_path, slow):
    """Fault: a model folder or checkpoint that claims much, or is endless, takes all memory or for ever."""
    found = outcomes(hostile_claims.__name__, tmp_path, slow)
    assert list(found) == [attack.name for attack in hostile_claims.ATTACKS if attack.slow == slow]
    assert {name: outcome.text for name, outcome in found.items() if outcome.kind == "FAILED"} == {}


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutations(tmp_path, count):
    """Fault: a value in a model's JSON files ends in a traceback, at once or when hours later it is saved."""
    found, worked = hostile_mutations.problems(model_folder(tmp_path), tmp_path, count, seed=count)
    assert found == []
    assert count / 5 < worked < count / 2


def test_counting_draws_no_random_numbers():
    """Fault: a model's random weights change because it was counted first."""
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(3)
    counted = build_model("gpt2", config)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert torch.equal(after, torch.rand(1))
    for name, value in plain.state_dict().items():
        assert torch.equal(counted.state_dict()[name], value), name


@pytest.mark.parametrize("safe", [True, False])
def test_amount_that_is_stored(tmp_path, safe):
    """Fault: weights in a file are counted wrongly, so that honest models are refused or claims believed."""
    folder = model_folder(tmp_path)
    model = tiny_gpt2(seed=7)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    stored = stored_in(weight_files(folder))
    # 9472 by hand in test_loading; a file of torch.save lists the tied head once more.
    assert stored.weights == 9472 + (0 if safe else 257 * 16)
    assert stored.tensors == len(model.state_dict()) - (1 if safe else 0)
    check_amount("model", model.config, stored)


def test_numbers_of_a_config():
    """Fault: a number deep in a config, or in a list, is not looked at; a boolean counts as one."""
    values = {"a": 1, "b": {"c": [2, {"d": 3.5}], "e": "4"}, "f": None}
    assert list(numbers_in(values)) == [("a", 1), ("c", 2), ("d", 3.5)]
