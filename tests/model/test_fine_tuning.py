"""The fine-tuning objective against its formula: model/fine_tuning.py."""

import copy

import pytest
import torch

from model.decoding.loop import greedy_decode
from model.fine_tuning import FineTuning
from model.language_model import LanguageModel
from tests.conftest import END, byte_tokenizer, tiny_gpt2, tiny_language_model
from tests.model.test_vocabulary_loss import Tensors

ROWS = [(b"Q: a long question?", b" yes"), (b"Q:", b" no!"), (b"Q: and this one", b" perhaps")]


def right_padded(rows, columns=0, pad=END):
    """input_ids, attention_mask, labels of (prompt, highlights) byte pairs, each closed by end-of-text."""
    width = max(len(prompt) + len(text) + 1 for prompt, text in rows) + columns
    ids, mask, labels = [], [], []
    for prompt, text in rows:
        row = [*prompt, *text, END]
        rest = width - len(row)
        ids.append(row + [pad] * rest)
        mask.append([1] * len(row) + [0] * rest)
        labels.append([-100] * len(prompt) + row[len(prompt) :] + [-100] * rest)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def gpt2_with_constant_logits(logits: dict[int, float], positions: int = 128):
    """A GPT-2 with the same next-token logits at each position; ids that are not named get -10^4."""
    network = tiny_gpt2(positions=positions)
    with torch.no_grad():
        final = network.transformer.ln_f
        final.weight.zero_()
        final.bias.zero_()
        final.bias[0] = 1.0
        network.transformer.wte.weight[:, 0] = -1e4
        for token, value in logits.items():
            network.transformer.wte.weight[token, 0] = value
    return network


def formula(network, rows) -> torch.Tensor:
    """-sum log q(token | before) from full logits of the library, row by row without padding."""
    total = 0
    for prompt, text in rows:
        row = torch.tensor([[*prompt, *text, END]])
        q = torch.softmax(network(row).logits[0], dim=-1)
        for column in range(len(prompt), row.shape[1]):
            total = total - torch.log(q[column - 1, row[0, column]])
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_the_formula(dtype, tolerance):
    """Loss or gradients differ from the formula's with full logits, in float64."""
    network = tiny_gpt2(seed=3, width=32, layers=2, std=0.2)
    reference = copy.deepcopy(network).double()
    expected = formula(reference, ROWS)
    expected.backward()
    terms = FineTuning(LanguageModel(network.to(dtype), byte_tokenizer()))(*right_padded(ROWS))
    terms.loss_sum.backward()
    assert terms.token_count == sum(len(text) + 1 for _, text in ROWS)
    assert terms.loss_sum.item() == pytest.approx(expected.item(), rel=tolerance)
    assert terms.parts["cross_entropy"].item() == terms.loss_sum.item()
    assert not terms.parts["cross_entropy"].requires_grad
    for (name, ours), (_, theirs) in zip(network.named_parameters(), reference.named_parameters(), strict=True):
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error <= tolerance, name


def test_no_label_at_all():
    """A batch without labels gives NaN, as a mean over nothing does (A11)."""
    model = tiny_language_model()
    ids = torch.tensor([[1, 2, 3]])
    terms = FineTuning(model)(ids, torch.ones_like(ids), torch.full((1, 3), -100))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0 and terms.token_count == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_end_of_text_is_learnt_where_it_also_pads():
    """pad = end-of-text is never learnt, so that a fine-tuned model does not stop (A12)."""
    model = tiny_language_model(seed=1, width=32, std=0.1)
    assert model.tokenizer.pad_token_id == END
    rows = [(b"Q:", b"ok"), (b"Q: why?", b"no!")]
    objective, optimizer = FineTuning(model), torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        objective(*right_padded(rows)).loss_sum.backward()
        optimizer.step()
    decoded = greedy_decode(model, [[*prompt] for prompt, _ in rows], max_new_tokens=20)
    assert decoded == [[*text] for _, text in rows]


def test_full_logits_never_exist():
    """A [B, T, V] tensor is made in the forward or the backward pass (A24, memory)."""
    model = tiny_language_model()
    rows = right_padded([(b"p" * 100, b"ab" * 10), (b"p" * 60, b"cde" * 10)])
    for chunk_size, most in ((20, 20), (5, 16)):  # 16: the transposed weight [16, V]; full logits have 2 * 121 rows
        with Tensors() as made:
            FineTuning(model, chunk_size)(*rows).loss_sum.backward()
        assert max(shape.numel() // 257 for shape in made.shapes if shape and shape[-1] == 257) == most
