"""Distillation and decoding benchmarks, on tiny sizes: compared before they are timed. Peers run if installed."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import decode, flops, interleaved, kd_step, kd_work, loss_head, row_attention
from model.losses.divergences import choose_divergence
from model.teacher_student import TeacherStudent

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


@pytest.mark.parametrize("lengths", ["full", "real"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_distillation_steps_are_equal(lengths, precision, capsys):
    """Fault: A variant computes other rows, labels or gradients than full logits in float32."""
    kd_step.main([*KD, "--lengths", lengths, "--precision", precision])
    out = capsys.readouterr().out
    assert all(f"\n{variant:<15} loss " in out for variant in ("plain", "gathered", "packed", "cached"))
    assert "time plain / packed: " in out


def test_another_divergence_is_refused(monkeypatch, capsys):
    """Fault: Times are printed for variants that compute different losses."""
    monkeypatch.setattr(loss_head, "choose_divergence", lambda name: choose_divergence("forward"))
    with pytest.raises(SystemExit, match="not equal to full logits in float32: ours"):
        loss_head.main([*QUICK, "--variants", "plain", "ours"])
    monkeypatch.setattr(kd_step, "TeacherStudent", lambda *given, **named: TeacherStudent(
        *given, **{**named, "kl_div": "forward"}))
    with pytest.raises(SystemExit, match="not equal to full logits in float32: packed"):
        kd_step.main([*KD, "--variants", "plain", "packed"])
    assert "median" not in capsys.readouterr().out


def test_gradients_are_compared_too():
    """Fault: Equal losses with different gradients, or NaN, pass."""
    gradient = torch.tensor([3.0, 4.0])
    interleaved.compare("same", (1.0, [gradient]), (1.0, [gradient]), "float32")
    for wrong in (gradient * 1.001, gradient * float("nan")):  # off by 1e-3 of the norm, ten times what is allowed
        with pytest.raises(SystemExit, match="not equal"):
            interleaved.compare("other", (1.0, [wrong]), (1.0, [gradient]), "float32")


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_rows_of_different_length(batch):
    """Fault: The peers' batches hold another share of padding than told, or ours other rows than theirs."""
    options = kd_step.parse(["--size", "tiny", "--lengths", "real", "--batch", str(batch)])
    work = kd_work.make_work(options)
    attended = sum(batch["attention_mask"].sum().item() for batch in work.of_peers)
    places = sum(batch["attention_mask"].numel() for batch in work.of_peers)
    assert abs(1 - attended / places - 0.25) < 0.005
    rows_of_both = [
        sorted(tuple(ids[mask == 1].tolist()) for each in batches
               for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True))
        for batches in (work.of_peers, work.ours)
    ]
    assert rows_of_both[0] == rows_of_both[1] and len(rows_of_both[0]) == 8 * batch
    for batches in (work.of_peers, work.ours):
        assert sum((each["labels"][:, 1:] != -100).sum().item() for each in batches) == work.tokens


def test_targets_belong_to_real_sizes():
    """Fault: A ratio of a small model, or of another precision, is held against a target for real sizes."""

    def target(size, lengths, precision, peer_precision, device="cpu"):
        return kd_step.step_target(argparse.Namespace(
            size=size, lengths=lengths, precision=precision, peer_precision=peer_precision, device=device))

    def of_decoding(size, variant, device="cpu"):
        return decode.target(argparse.Namespace(size=size, device=device), variant)

    assert str(target("real", "full", "float32", "float32")) == "; reach at least 1.35, goal 1.45"
    assert str(target("real", "full", "bfloat16", "bfloat16")) == "; reach at least 1.35, goal 1.6"
    assert str(target("real", "real", "float32", "float32")) == "; reach at least 1.7, goal 1.8"
    assert str(kd_step.MOST_MEMORY) == "; reach at most 0.2, goal 0.167"
    assert target("small", "full", "float32", "float32") is None
    assert target("real", "full", "float32", "bfloat16") is None
    assert str(target("real", "full", "bfloat16", "bfloat16", "cuda")) == "; reach at least 2.5, goal 3"
    assert str(target("real", "real", "bfloat16", "bfloat16", "cuda")) == "; reach at least 3.5, goal 4"
    assert target("real", "full", "float32", "float32", "cuda") is None
    assert str(of_decoding("real", "batched")) == "; reach at least 2.4, goal 3"
    assert str(of_decoding("real", "sorted")) == "; reach at least 1.9, goal 2.4"
    assert str(of_decoding("real", "batched", "cuda")) == "; reach at least 5, goal 5"
    assert of_decoding("small", "sorted") is None and of_decoding("real", "one_by_one") is None


def test_decoding_variants_take_turns(capsys):
    """Fault: A way to decode gives other tokens or is not run, or rows of short and long prompts end together."""
    decode.main(DECODE)
    lines = capsys.readouterr().out.splitlines()
    lengths = [int(each) for each in lines[2].partition("sorted: ")[2].split()]
    assert lines[2].startswith("new tokens of the rows") and len(lengths) == 9 and len(set(lengths)) >= 6
    assert min(lengths) <= 5 and max(lengths) >= 15
    assert [line.split("; ")[-1] for line in lines[3:6]] == ["the same"] * 3
    assert [line.split()[0] for line in lines[6:10]] == list(decode.VARIANTS)
    assert [line.partition(" / ours: ")[0] for line in lines[10:]] == [
        "time generate, batched", "time generate, batched, sorted", "time generate, one by one"]


def test_operations_are_counted():
    """Fault: a share of a GPU's peak is of products that are not computed. By hand, in GFLOP a token of 1,024."""
    def per_token(blocks, width, pruned):
        return flops.body_flops(blocks, width, [1024], [90], pruned) / 1024 / 1e9

    assert per_token(24, 1024, False) == pytest.approx(0.654, abs=1e-3)
    assert per_token(24, 1024, True) == pytest.approx(0.633, abs=1e-3)
    assert 3 * per_token(12, 768, False) == pytest.approx(0.566, abs=1e-3)
    assert 3 * per_token(12, 768, True) == pytest.approx(0.530, abs=1e-3)
    assert flops.head_flops(1024, 50257, 1) / 1e9 == pytest.approx(0.103, abs=1e-3)
    options = kd_step.parse(["--size", "real", "--batch", "16", "--length", "1024", "--labels", "90"])
    work = kd_work.make_work(options)
    of_peer, packed, cached = (kd_step.step_flops(name, options, work) for name in ("trl_gkd", "packed", "cached"))
    assert of_peer / 16 / 1024 / 1e9 == pytest.approx(1.555, abs=2e-3)
    assert packed / 16 / 1024 / 1e9 == pytest.approx(1.192, abs=5e-3)  # a row's last token predicts nothing
    assert cached / 16 / 1024 / 1e9 == pytest.approx(0.559, abs=5e-3)


def test_ways_to_attend_are_equal(capsys, monkeypatch):
    """Fault: Times are printed for attention that sees other rows."""
    quick = ["--heads", "2", "--rows", "4", "--shortest", "3", "--longest", "40", "--rounds", "5", "--precision"]
    row_attention.main([*quick, "float32"])
    out = capsys.readouterr().out
    assert all(f"\n{name:<12} output off by" in out for name in ("row_by_row", "padded"))
    assert "time padded / row_by_row, ours: " in out
    monkeypatch.setattr(row_attention, "make_variants", lambda *given: {
        "row_by_row": lambda heads: heads[:, 0], "padded": lambda heads: heads[:, 1]})
    with pytest.raises(SystemExit, match="padded: output off by"):
        row_attention.main([*quick, "float32"])


def test_rows_end_where_wanted():
    """Fault: The head ends rows elsewhere than asked, or changes the text before the end."""
    options = decode.parse(["--size", "tiny", "--prompts", "3", "--shortest", "5", "--longest", "30", "--new", "12"])
    model, prompts, wanted = decode.make_model("tiny"), decode.make_prompts(options), [7, 0, 3]
    assert sorted(map(len, prompts)) == [5, 18, 30]
    endless = decode.generate(model, prompts, 12)
    assert [len(row) for row in endless] == [12, 12, 12]
    decode.end_after(model, decode.states_of_continuations(model, prompts, 12, 2), wanted)
    assert decode.generate(model, prompts, 12) == [row[:end] for row, end in zip(endless, wanted, strict=True)]


def test_batches_of_generate(monkeypatch):
    """Fault: `generate` is given more padding than its batches need: unsorted, or batched where it runs one by one."""
    shapes = []

    def generate(model, prompts, new):
        shapes.append([len(prompt) for prompt in prompts])
        return prompts

    monkeypatch.setattr(decode, "generate", generate)
    prompts = [[7] * length for length in (3, 9, 1, 4, 8)]
    for name, expected in (("batched", [[3, 9], [1, 4], [8]]), ("sorted", [[9, 8], [4, 3], [1]]),
                           ("one_by_one", [[3], [9], [1], [4], [8]])):
        shapes.clear()
        assert decode.make_variant(name, None, prompts, 5, 2)() == prompts
        assert shapes == expected


def test_a_tie_is_no_other_token():
    """Fault: A row that rounding turns off at a tie counts as wrong, or a wrong row as a tie."""
    model, prompt = decode.make_model("tiny"), [5, 9, 3]
    with torch.inference_mode():
        logits = model.model(torch.tensor([[*prompt, 7]])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    gap = decode.apart(model, prompt, [7, best, 4], [7, second])
    assert gap == pytest.approx(float((logits[best] - logits[second]) / logits.abs().max()), rel=1e-4)
    assert gap > decode.TIE
    assert decode.apart(model, prompt, [7, best], [7, best, 4]) > decode.TIE  # one has ended


def test_other_tokens_are_refused(monkeypatch, capsys):
    """Fault: Times are printed for decoders that give different tokens."""
    ours = decode.greedy_decode
    monkeypatch.setattr(decode, "greedy_decode", lambda *given: [ids[:-1] for ids in ours(*given)])
    with pytest.raises(SystemExit, match=r"batched: other tokens than ours in \d rows"):
        decode.main([*DECODE, "--variants", "batched", "ours"])
    assert "median" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux alone")
def test_peak_memory_is_of_the_step():
    """Fault: What was used before hides what a step needs: the mark is that of the whole process."""

    def step(mebibytes):
        return torch.ones(mebibytes, 1024, 256).sum().item(), []

    step(200)
    assert 63 < interleaved.peak_above_rest(lambda: step(64)) < 100


def test_usage_errors_are_one_line(capsys, monkeypatch):
    """Fault: A peer that is not installed, or sizes that do not fit, end in a traceback."""
    monkeypatch.setattr(interleaved, "find_spec", lambda package: None)
    for main, arguments, told in (
        (loss_head.main, ["--variants", "liger"], "liger needs liger_kernel: pip install -r benchmarks/requirements"),
        (kd_step.main, ["--variants", "trl_gkd"], "trl_gkd needs trl: pip install -r benchmarks/requirements.txt"),
        (loss_head.main, ["--positions", "2000"], "--positions is 2000: expected 1 to 1024"),
        (kd_step.main, ["--labels", "384"], "--length is 384: expected at least 385"),
        (kd_step.main, ["--rounds", "1"], "--rounds is 1: expected at least 2"),
        (kd_step.main, ["--lengths", "real", "--batch", "1"], "--lengths real needs --batch 2 or more"),
        (decode.main, ["--longest", "199"], "--longest is 199: expected at least 200"),
        (decode.main, ["--new", "525"], "--longest and --new are 500 and 525: expected at most 1024 together"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        errors = capsys.readouterr().err
        assert caught.value.code == 2 and told in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(capsys):
    """Fault: Memory cannot be measured, or the process that measures does not get the same sizes."""
    loss_head.main(["--size", "small", "--total", "512", "--positions", "8", "--rounds", "2",
                    "--variants", "plain", "ours"])
    ratios = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ours / plain: ")]
    assert len(ratios) == 1 and 0 < float(ratios[0].split()[-1]) < 0.5
