"""The rollout benchmark, on tiny sizes: compared before it is timed. TRL's part runs where TRL is."""

import pytest
import torch

from benchmarks import rollout

QUICK = ["--size", "tiny", "--rounds", "2", "--batch", "3", "--shortest", "2", "--longest", "9", "--new", "5"]
PROMPTS = [[7, 8, 9, 10], [11], [12, 13]]


def test_rollouts_are_equal_and_timed(capsys):
    """Fault: A variant draws from another distribution, notes other log-probabilities, or is left out."""
    rollout.main(QUICK)
    lines = capsys.readouterr().out.splitlines()
    compared = [line.split()[:3] for line in lines if "off by at most" in line]
    kinds = [["log", kind, "of"] for kind in ("q", "p", "p~")]
    assert [each[0] for each in compared] == ["ours"] * 3 + ["processor"] * 2 + ["minillm"] * 3
    assert [line.split()[1:4] for line in lines[2:5]] == kinds == [line.split()[1:4] for line in lines[7:10]]
    assert lines[-2].startswith("time generate + processor / ours: ")
    assert lines[-1].startswith("time MiniLLM's recipe / ours: ")
    assert "reach" not in lines[-1], "a ratio of tiny models is held against a target for real sizes"


def test_the_recipe_does_its_work():
    """Fault: MiniLLM's recipe reads less or more than told, so that its ratio says nothing; or its parts are mixed up.
    """
    pair = rollout.make_pair("tiny")
    of_teacher, of_student = [], []  # positions with logits, of each forward pass
    hooks = [
        each.model.register_forward_hook(lambda _, given, output, counts=counts: counts.append(output.logits.shape[1]))
        for each, counts in zip(pair, (of_teacher, of_student), strict=True)
    ]
    tokens, log_q, log_p, log_mixed, rewards, weights, _ = rollout.minillm_rollouts(*pair, PROMPTS, 5, 0.2)
    for hook in hooks:
        hook.remove()
    assert of_teacher.count(4 + 5) == of_student.count(4 + 5) == 3  # longest prompt and what was drawn
    assert of_teacher.count(1) == 5 and of_student.count(1) == 10  # one `generate` of both, one of the student alone
    assert len(of_teacher) == 8 and len(of_student) == 13
    assert tokens.shape == (3, 5)
    torch.testing.assert_close(rewards, log_p - log_q)
    torch.testing.assert_close(weights, log_q.exp() / (0.8 * log_q.exp() + 0.2 * log_p.exp()))
    assert not torch.allclose(log_mixed, log_q)


def test_our_step_is_equal_to_full_logits(capsys):
    """Fault: Our step takes another divergence, division or set of tokens than full logits on what it drew."""
    rollout.main([*QUICK, "--step", "--variants", "ours"])
    out = capsys.readouterr().out
    assert f"\n{'ours':<15} loss " in out and f"\n{'ours':<15} median " in out


def test_trl_step_is_equal_to_full_logits(capsys):
    """Fault: TRL's trainer is driven with another divergence, division, precision or number of tokens."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install -r benchmarks/requirements.txt")
    rollout.main([*QUICK, "--step"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["ours", "loss"], ["trl", "loss"]]
    assert lines[-1].startswith("time TRL DistillationTrainer / ours: ")
