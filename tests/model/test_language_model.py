"""Label positions, padding, hidden states and head: model/language_model.py."""

import pytest
import torch

from model.errors import ModelError
from model.language_model import LanguageModel, is_right_padded, label_positions
from tests.conftest import END, byte_tokenizer, tiny_gpt2, tiny_language_model

HELLO = [72, 101, 108, 108, 111]


def last_logits(model, ids, mask=None):
    """Logits [V] of the last token, through the wrapper's two operations."""
    hidden = model.hidden_states(torch.tensor(ids), None if mask is None else torch.tensor(mask))
    return model.lm_head(hidden[:, -1])[0]


def test_label_positions_of_a8():
    """The mask is off by one; a label in column 0, which nothing predicts, counts; a batch without labels fails."""
    index, targets = label_positions(torch.tensor([[-100, -100, 2, 1], [7, 0, -100, -100]]))
    assert index.tolist() == [0 * 4 + 1, 0 * 4 + 2, 1 * 4 + 0]
    assert targets.tolist() == [2, 1, 0]
    for labels in (torch.tensor([[3], [4]]), torch.full((2, 3), -100)):
        assert [tensor.shape for tensor in label_positions(labels)] == [(0,), (0,)]


def test_left_padding_of_a14():
    """Left padding changes the logits: by 0.285 without position ids, by 0.298 without the mask (A14)."""
    model = tiny_language_model(seed=5, width=32, layers=2).eval()
    ids, mask = [[END] * 3 + HELLO], [[0, 0, 0, 1, 1, 1, 1, 1]]
    with torch.no_grad():
        alone = last_logits(model, [HELLO])
        library = model.model(torch.tensor([HELLO])).logits[0, -1]
        no_positions = model.model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[0, -1]
        torch.testing.assert_close(alone, library, rtol=0, atol=1e-6)
        torch.testing.assert_close(last_logits(model, ids, mask), library, rtol=0, atol=1e-6)
        assert (last_logits(model, ids) - library).abs().max() == pytest.approx(0.298, abs=1e-3)
    assert (no_positions - library).abs().max() == pytest.approx(0.285, abs=1e-3)
    assert library.std() == pytest.approx(0.113, abs=1e-3)


def test_is_right_padded():
    """Left padding or a hole in the mask passes for right padding, and its mask is dropped."""
    for mask in ([[1, 1, 1], [1, 0, 0]], [[1, 1, 1]], [[1]], [[0, 0]]):
        assert is_right_padded(torch.tensor(mask)) is True
    for mask in ([[0, 1, 1], [1, 1, 1]], [[1, 0, 1]]):
        assert is_right_padded(torch.tensor(mask)) is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_masks_on_cpu_and_gpu_agree():
    """A mask left on the CPU gives other hidden states than one on the GPU."""
    model = tiny_language_model(seed=5, width=32, layers=2).eval().to("cuda")
    ids = torch.tensor([[END] * 3 + HELLO, [*HELLO, 1, 2, 3]], device="cuda")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    with torch.no_grad():
        assert torch.equal(model.hidden_states(ids, mask), model.hidden_states(ids, mask.to("cuda")))


def test_vocabulary_never_grows():
    """A [PAD] row is added, whose logit of about 0 beats GPT-2's of about -35 (A13); or a pad token is replaced; or
    context and end-of-text are not the model's."""
    network, tokenizer, padded = tiny_gpt2(positions=64), byte_tokenizer(), byte_tokenizer()
    padded.pad_token = "a"
    assert LanguageModel(network, padded).tokenizer.pad_token_id == ord("a")
    model = LanguageModel(network, tokenizer)
    assert model.tokenizer.pad_token_id == END
    assert len(model.tokenizer) == network.get_input_embeddings().weight.shape[0] == 257
    assert (model.context, model.end_ids, model.device.type) == (64, [END], "cpu")
    assert model.prompt_template is None and model.prompt_max_length is None


def test_tokenizer_that_cannot_serve():
    """A tokenizer with more tokens than embedding rows, without end-of-text or without a fast version is accepted."""
    big, endless, slow = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    big.add_tokens(["<one>", "<two>"])
    with pytest.raises(ModelError, match=r"259 tokens .* only 257 rows.*model_arch\.tokenizer"):
        LanguageModel(tiny_gpt2(), big)
    endless.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text"):
        LanguageModel(tiny_gpt2(), endless)
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(ModelError, match="SlowTokenizer has no fast version"):
        LanguageModel(tiny_gpt2(), slow)
