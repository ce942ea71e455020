"""Batched greedy decoding and beam search against single-prompt `generate`: model/decoding/loop.py."""

import random

import pytest
import torch

from model.decoding.loop import batches_by_length, beam_search, greedy_decode
from model.errors import ModelError
from model.language_model import LanguageModel
from tests.conftest import END, byte_tokenizer, tiny_gpt2, tiny_language_model
from tests.model.test_fine_tuning import gpt2_with_constant_logits


def generated(model: LanguageModel, prompt: list[int], max_new_tokens: int, **settings) -> list[int]:
    """New ids of the library's `generate` for one prompt, without end-of-text."""
    ids = torch.tensor([prompt], device=model.device)
    network = model.model.eval()
    output = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=END,
        pad_token_id=END, **settings,
    )[0, len(prompt) :].tolist()
    return output[: output.index(END)] if END in output else output


def ending_model(seed: int = 1) -> LanguageModel:
    """A random GPT-2 that emits end-of-text now and then: its logit varies more than the others'."""
    network = tiny_gpt2(seed=seed, width=32, layers=2, std=0.4)
    with torch.no_grad():
        network.transformer.wte.weight[END] *= 1.5
    return LanguageModel(network, byte_tokenizer())


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize(("make", "prompts", "new"), [
    (ending_model, random_prompts([3, 80, 1, 41, 80, 7, 25, 2]), 20),
    (lambda: tiny_language_model(positions=32, width=32, std=0.4), random_prompts([22, 3]), 10),
    (lambda: ending_model(2), [[97, END, 98], [END], [END, END, 99, 100, 101]], 12),
], ids=["very different lengths", "a prompt that fills the context", "an end in the prompt"])
def test_batch_equals_generate(make, prompts, new):
    """A left-padded batch decodes other tokens than each prompt alone (A14); prompt + new tokens = context is refused
    or reads a position past the last; an end-of-text inside a prompt is taken for padding or a row's end (A12)."""
    model = make()
    expected = [generated(model, prompt, new) for prompt in prompts]
    assert len(prompts) < 5 or len({len(ids) for ids in expected}) > 3, "the rows should end at different times"
    for batch_size in (1, 3, 10):
        assert greedy_decode(model, prompts, new, batch_size) == expected





def test_end_at_once_and_no_end_in_the_output():
    """The end-of-text is in the output, or a row that ends at its first token is not empty (A24)."""
    model = LanguageModel(gpt2_with_constant_logits({END: 1, 5: 0}), byte_tokenizer())
    for decode in (greedy_decode, lambda *arguments: beam_search(*arguments, num_beams=2, early_stopping=True)):
        assert [END not in ids for ids in decode(model, [[1, 2], [3]], 6)] == [True, True]
    assert greedy_decode(model, [[1, 2], [3]], 6) == [[], []]
    model = ending_model()
    assert not any(END in ids for ids in greedy_decode(model, random_prompts([4] * 12), 30))


@pytest.mark.parametrize("decode", [greedy_decode, lambda *args, **kw: beam_search(*args, num_beams=2, **kw)])
def test_train_mode_comes_back(decode):
    """Decoding leaves the student in eval mode, also where it fails, or lets dropout change the text (A19)."""
    model = tiny_language_model(dropout=0.5, std=0.4).train()
    model.model.transformer.h[0].mlp.eval()
    before = {name: part.training for name, part in model.named_modules()}
    prompts = random_prompts([5, 9])
    assert decode(model, prompts, 8) == decode(model, prompts, 8)
    assert {name: part.training for name, part in model.named_modules()} == before

    def interrupt(rows, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(model, prompts, 8, progress=interrupt)
    assert {name: part.training for name, part in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_equals_generate(early_stopping):
    """Batched beam search differs from the library's for one prompt, mixes up the rows or their progress."""
    model, reports = ending_model(4), []
    prompts = random_prompts([3, 40, 1, 17, 9])
    options = {"num_beams": 3, "early_stopping": early_stopping}
    expected = [generated(model, prompt, 12, **options) for prompt in prompts]
    assert beam_search(model, prompts, 12, batch_size=2, progress=lambda *report: reports.append(report),
                       **options) == expected
    assert [sum(counts) for counts in zip(*reports, strict=True)] == [len(prompts), sum(map(len, expected))]


def test_longest_prompts_come_first():
    """Memory runs out late, in the last batch; or a row is lost or doubled by the order."""
    prompts = random_prompts([3, 9, 1, 9, 5])
    assert list(batches_by_length(prompts, 2)) == [[1, 3], [4, 0], [2]]
    assert greedy_decode(tiny_language_model(), [], 5) == []


@pytest.mark.parametrize("decode", [greedy_decode, lambda *args: beam_search(*args, num_beams=2)])
def test_prompts_that_cannot_be_decoded(decode):
    """An empty or too long prompt raises IndexError deep in the library (A15)."""
    model = tiny_language_model(positions=32)
    for prompts, new, message in (
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1], [2] * 29], 4, "prompt 1 has 29 tokens: with 4 new ones it exceeds the model's 32"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            decode(model, prompts, new)
        assert "\n" not in str(caught.value)
