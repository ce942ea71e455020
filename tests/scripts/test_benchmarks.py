"""Distillation and decoding benchmarks, on tiny sizes: compared before they are timed. Peers run if installed."""


import pytest
import torch

from benchmarks import decode, interleaved, kd_step, loss_head

QUICK = ["--size", "tiny", "--rounds", "2", "--skip_memory"]
KD = [*QUICK, "--length", "40", "--labels", "9"]
DECODE = ["--size", "tiny", "--rounds", "2", "--prompts", "9", "--shortest", "2", "--longest", "40", "--new", "20",
          "--batch", "4"]


@pytest.mark.parametrize("variant", [name for name in loss_head.PACKAGES if name != "ours"])
def test_loss_heads_are_equal(variant, capsys):
    """Fault: A peer is driven with another divergence, division or set of positions than ours."""
    if package := loss_head.PACKAGES[variant]:
        pytest.importorskip(package)
    loss_head.main([*QUICK, "--total", "40", "--positions", "13", "--chunk_size", "5", "--variants", variant, "ours"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [variant, "ours"] and "gradients off by" in lines[2]
    assert lines[-1].startswith(f"time {variant} / ours: ")


@pytest.mark.parametrize(("lengths", "precision"), [
    ("full", "bfloat16"), ("real", "float32"), pytest.param("real", "bfloat16", marks=pytest.mark.slow)])
def test_distillation_steps_are_equal(lengths, precision, capsys):
    """Fault: A variant computes other rows, labels or gradients than full logits in float32."""
    kd_step.main([*KD, "--lengths", lengths, "--precision", precision])
    out = capsys.readouterr().out
    assert all(f"\n{variant:<15} loss " in out for variant in ("plain", "gathered", "packed", "cached"))
    assert "time plain / packed: " in out


def test_gradients_are_compared_too():
    """Fault: Equal losses with different gradients, or NaN, pass."""
    gradient = torch.tensor([3.0, 4.0])
    interleaved.compare("same", (1.0, [gradient]), (1.0, [gradient]), "float32")
    for wrong in (gradient * 1.001, gradient * float("nan")):  # off by 1e-3 of the norm, ten times what is allowed
        with pytest.raises(SystemExit, match="not equal"):
            interleaved.compare("other", (1.0, [wrong]), (1.0, [gradient]), "float32")


@pytest.mark.slow
def test_decoding_variants_take_turns(capsys):
    """Fault: A way to decode gives other tokens or is not run, or rows of short and long prompts end together."""
    decode.main(DECODE)
    lines = capsys.readouterr().out.splitlines()
    lengths = [int(length) for length in lines[2].partition("sorted: ")[2].split()]
    assert lines[2].startswith("new tokens of the rows") and len(lengths) == 9 and len(set(lengths)) >= 6
    assert min(lengths) <= 5 and max(lengths) >= 15
    assert [line.split("; ")[-1] for line in lines[3:6]] == ["the same"] * 3
    assert [line.split()[0] for line in lines[6:10]] == list(decode.VARIANTS)
    assert [line.partition(" / ours: ")[0] for line in lines[10:]] == [
        "time generate, batched", "time generate, batched, sorted", "time generate, one by one"]


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(capsys):
    """Fault: Memory cannot be measured, or the process that measures does not get the same sizes."""
    loss_head.main(["--size", "small", "--total", "512", "--positions", "8", "--rounds", "2",
                    "--variants", "plain", "ours"])
    ratios = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ours / plain: ")]
    assert len(ratios) == 1 and 0 < float(ratios[0].split()[-1]) < 0.5
