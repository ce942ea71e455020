"""GPT-2 without padding and with a pruned last block equals the library's: model/gpt2/packed_forward.py."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from model.gpt2 import row_attention
from model.gpt2.packed_forward import Packing, attention, attention_at, can_pack, feed_forward
from model.gpt2.row_attention import row_layout
from model.language_model import LanguageModel
from tests.conftest import END, byte_tokenizer, tiny_gpt2
from tests.small_kd_runs import predicted_from, random_rows, randomised

SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
BATCHES = {
    "different lengths": [(12, [9, 10, 11]), (5, [4]), (9, [3, 4, 5, 6, 7, 8])],
    "equal lengths": [(7, [5, 6]), (7, [5, 6]), (7, [5, 6])],
    "equal lengths, labels end apart": [(7, [3]), (7, [5, 6])],
    "a row without labels first": [(8, []), (6, [4, 5])],
    "rows without labels between and last": [(4, [3]), (9, []), (6, [5]), (3, [])],
    "labels in the middle": [(10, [3, 4, 7]), (8, [2, 6]), (11, [1])],
    "first and last columns": [(6, [0, 1]), (6, [0]), (6, [0, 1, 2, 3, 4, 5])],
    "one row": [(9, [6, 7, 8])],
    "one token": [(2, [1]), (2, [1])],
}


@pytest.fixture(params=[(), ("cpu",)], ids=["row by row", "padded"])
def attended(request, monkeypatch) -> None:
    """Attention as on a CPU and as on a GPU."""
    monkeypatch.setattr(row_attention, "PADDED_ON", request.param)


def wrapped(network, pack_rows: bool = True, prune_last_block: bool = True) -> LanguageModel:
    model = LanguageModel(network, byte_tokenizer())
    model.pack_rows, model.prune_last_block = pack_rows, prune_last_block
    return model


def network_of(layers: int = 2, **config) -> GPT2LMHeadModel:
    return randomised(tiny_gpt2(seed=8, width=24, layers=layers, std=0.2, **config))


def library_states(network, input_ids, mask, labels) -> torch.Tensor:
    """Hidden states [N, D] of the library's padded forward pass, picked one by one."""
    states = network.base_model(input_ids, attention_mask=mask).last_hidden_state
    return torch.stack([states[place] for place in predicted_from(labels)])


def targets_of(labels: torch.Tensor) -> torch.Tensor:
    return torch.tensor([labels[row, column + 1] for row, column in predicted_from(labels)])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_equal_to_the_library(network, batch, pack_rows: bool, prune_last_block: bool, tolerance: float) -> None:
    """States, summed cross-entropy and the gradient of every parameter."""
    reference = copy.deepcopy(network)
    expected, targets = library_states(reference, *batch), targets_of(batch[2])
    their_loss = F.cross_entropy(reference.lm_head(expected), targets, reduction="sum")
    their_loss.backward()
    hidden, found_targets = wrapped(network, pack_rows, prune_last_block).label_hidden(*batch)
    loss = F.cross_entropy(network.lm_head(hidden), targets, reduction="sum")
    loss.backward()
    assert torch.equal(found_targets, targets)
    assert relative(hidden.detach(), expected.detach()) <= tolerance
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    for (name, ours), (_, theirs) in zip(network.named_parameters(), reference.named_parameters(), strict=True):
        assert relative(ours.grad, theirs.grad) <= tolerance, name


# -- equal to the library ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "dtype", "tolerance"), [
    (1, torch.float64, 1e-10), (3, torch.float64, 1e-10), (2, torch.float32, 1e-5)])
@pytest.mark.parametrize(("pack_rows", "prune_last_block"), SWITCHES)
def test_states_and_gradients_equal_the_library(pack_rows, prune_last_block, layers, dtype, tolerance, attended):
    """Fault: a row sees another's tokens, wrong positions, a wrong pick of states, or a weight without its gradient."""
    for rows in BATCHES.values():
        network = network_of(layers).to(dtype)
        batch = random_rows(rows, columns=2)
        assert_equal_to_the_library(network, batch, pack_rows, prune_last_block, tolerance)


@pytest.mark.parametrize("values", [
    {"activation_function": "gelu"}, {"activation_function": "relu"}, {"activation_function": "gelu_pytorch_tanh"},
    {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"n_inner": 40},
    {"layer_norm_epsilon": 0.1},
], ids=str)
def test_variants_of_gpt2(values):
    """Fault: the activation, the scale of attention or the norm of plain GPT-2 where the config says another."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=24, n_layer=3, n_head=3, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, initializer_range=0.3, **values)
    network = randomised(GPT2LMHeadModel(config)).double()
    for pack_rows, prune_last_block in SWITCHES[:3]:
        copied = copy.deepcopy(network)
        assert_equal_to_the_library(copied, random_rows(BATCHES["labels in the middle"]), pack_rows, prune_last_block,
                                    1e-10)





def test_a_batch_without_labels_has_no_states(attended):
    """Fault: an empty batch breaks the packing, or cuts the graph so that there is no gradient to speak of."""
    batch = random_rows([(4, []), (6, [0])])
    for pack_rows, prune_last_block in SWITCHES:
        network = network_of()
        hidden, targets = wrapped(network, pack_rows, prune_last_block).label_hidden(*batch)
        assert hidden.shape == (0, 24) and targets.shape == (0,)
        hidden.sum().backward()
        assert all(value.grad is None or not value.grad.any() for value in network.parameters())


# -- the ordinary path -------------------------------------------------------------------------------------------


def test_padding_on_the_left():
    """Fault: rows padded on the left are packed as if they began in column 0 (case A14)."""
    network = network_of()
    input_ids, mask, labels = random_rows([(9, [6, 7, 8]), (5, [3, 4])])
    expected = library_states(network, input_ids, mask, labels)
    shifted = [torch.stack([rows[0], rows[1].roll(4)]) for rows in (input_ids, mask, labels)]
    assert shifted[1].tolist()[1] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    ours, targets = wrapped(network).label_hidden(*shifted)
    assert torch.equal(targets, targets_of(labels))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_other_families_and_kinds_of_gpt2():
    """Fault: a family with other blocks, or GPT-2 with attention in another order or over an encoder, is computed by
    GPT-2's formulas; or states are picked wrongly; or no mask is not one of ones."""
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=257, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, bos_token_id=END, eos_token_id=END, initializer_range=0.3,
    ), dtype=torch.float32)
    assert not can_pack(llama)
    batches = [random_rows(rows, columns=2) for rows in BATCHES.values()]
    for batch in batches:
        ours, targets = wrapped(llama).label_hidden(*batch)
        assert torch.equal(targets, targets_of(batch[2]))
        torch.testing.assert_close(ours, library_states(llama, *batch), rtol=0, atol=1e-5)
    sizes = {"vocab_size": 257, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    assert can_pack(GPT2LMHeadModel(GPT2Config(**sizes)))
    for values in ({"reorder_and_upcast_attn": True}, {"add_cross_attention": True}):
        assert not can_pack(GPT2LMHeadModel(GPT2Config(**sizes, **values)))
    ids, _, labels = batches[0]
    for network in (llama, network_of()):
        ours, _ = wrapped(network).label_hidden(ids, None, labels)
        assert relative(ours, library_states(network, ids, None, labels)) <= 1e-5


# -- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
@pytest.mark.parametrize(("pack_rows", "prune_last_block"), SWITCHES[:3])
def test_each_dropout_is_there(pack_rows, prune_last_block, place):
    """Fault: one of the three dropouts is left out of the written-out forward pass, or stays on in eval mode."""
    torch.manual_seed(0)
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, place: 0.5}
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3, **rates)
    model = wrapped(GPT2LMHeadModel(config), pack_rows, prune_last_block)
    for batch in ("different lengths", "equal lengths"):
        arguments = random_rows(BATCHES[batch])
        drawn = [model.train().label_hidden(*arguments)[0] for _ in range(2)]
        still = [model.eval().label_hidden(*arguments)[0] for _ in range(2)]
        assert torch.equal(*still)
        for left, right in (drawn, (drawn[0], still[0]), (drawn[1], still[0])):
            assert (left - right).abs().max() > 0.01


@pytest.mark.parametrize(("attn_rate", "resid_rate"), [(0.0, 0.3), (0.2, 0.4)])
@pytest.mark.parametrize("path", ["equal lengths", "different lengths", "last block"])
def test_dropout_keeps_the_mean(path, attn_rate, resid_rate, attended):
    """Fault: a dropout at another rate, applied twice, or without its scale: attention's mean over draws moves."""
    draws = 1500
    attn = network_of(layers=1).transformer.h[0].attn
    attn.attn_dropout.p, attn.resid_dropout.p = attn_rate, resid_rate
    rows = [torch.randn(length, 24, generator=torch.Generator().manual_seed(length)) for length in (5, 4)]
    if path == "equal lengths":
        rows[1] = rows[0]
    lengths = [len(row) for row in rows]

    def states(times: int) -> torch.Tensor:
        """[draws, positions, D]: the same rows so many times, in one call."""
        hidden = torch.cat(rows).repeat(times, 1)
        if path == "last block":
            picked = [1, 3, 4, 5, 8]  # of the 9 tokens of two rows
            positions = torch.tensor([*range(5), *range(4)])
            selected = torch.cat([torch.tensor(picked) + 9 * draw for draw in range(times)])
            of_rows, queries = (row_layout(counts * times, hidden.device) for counts in (lengths, [3, 2]))
            packing = Packing(torch.arange(9 * times), positions.repeat(times), of_rows, selected, queries)
            mixed = attention_at(attn, hidden, packing)
            return attn.resid_dropout(attn.c_proj(mixed)).unflatten(0, (times, -1))
        mixed = attention(attn, hidden, row_layout(lengths * times, hidden.device))
        return attn.resid_dropout(attn.c_proj(mixed)).unflatten(0, (times, -1))

    torch.manual_seed(1)
    with torch.no_grad():
        expected, found = attn.eval() and states(1)[0], attn.train() and states(draws)
    error = found.std(0) / draws**0.5
    off = ((found.mean(0) - expected).abs() / error.clamp(min=1e-6)).max()
    assert off < 5  # standard errors, over at most 216 values
    # Var of an inverted dropout of x at rate p is x^2 p / (1 - p): the rate itself.
    if attn_rate == 0.0:
        variance = expected**2 * resid_rate / (1 - resid_rate)
        assert found.var(0).sum().item() == pytest.approx(variance.sum().item(), rel=0.1)


def test_dropout_of_the_mlp_keeps_the_mean():
    """Fault: the MLP's dropout is left out, or its rate is another."""
    block = network_of(layers=1).transformer.h[0]
    block.mlp.dropout.p = 0.3
    hidden = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    with torch.no_grad():
        expected = block.eval() and feed_forward(block, hidden)
        found = feed_forward(block.train(), hidden.repeat(3000, 1)).unflatten(0, (3000, 3))
    zeros = (found == 0).double().mean().item()
    assert abs(zeros - 0.3) < 5 * (0.3 * 0.7 / found.numel()) ** 0.5
    kept = found.where(found != 0, expected / 0.7)
    torch.testing.assert_close(kept, (expected / 0.7).expand_as(kept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pack_rows", "prune_last_block"), SWITCHES)
def test_work_that_is_really_done(pack_rows, prune_last_block):
    """Fault: padding, or states that predict nothing, are computed after all and thrown away."""
    network = network_of(layers=3)
    rows = [(12, [9, 10, 11]), (5, [4]), (9, [3, 7]), (10, [])]
    counts = []
    for block in network.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda part, inputs, output: counts.append(output[..., 0].numel()))
    wrapped(network, pack_rows, prune_last_block).label_hidden(*random_rows(rows, columns=4))
    # A row's last token predicts nothing: 11 + 4 + 7 real ones (the third ends with the label in column 7).
    everything, labels = 22 if pack_rows else 4 * 16, 3 + 1 + 2
    assert counts == [everything, everything, labels if prune_last_block else everything]
