"""Families of decoder-only models: exactly the library's tokens, or refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from model.decoding.loop import greedy_decode
from model.errors import ModelError
from model.language_model import LanguageModel
from model.verify import verify_model
from tests.conftest import END, byte_tokenizer, tiny_gpt2, tiny_language_model
from tests.model.test_decoding import generated, random_prompts

COMMON = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 128, "eos_token_id": END, "bos_token_id": END, "pad_token_id": END,
    "initializer_range": 0.3,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
FAMILIES = {
    "GPT2": {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": END,
             "eos_token_id": END, "initializer_range": 0.3},
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "GPTNeoX": COMMON,
    "Gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 0.7},
    "Cohere": {**GROUPED, "logit_scale": 0.25},
    "Granite": {**GROUPED, "logits_scaling": 4.0},
    "Mistral": {**GROUPED, "sliding_window": 8},
    "Bloom": {"vocab_size": 257, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": END,
              "bos_token_id": END, "initializer_range": 0.3},
}


def tiny_family(name: str, **changes) -> LanguageModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**FAMILIES.get(name, COMMON), **changes})
    return LanguageModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32), byte_tokenizer())


def refusal(model: LanguageModel) -> str:
    with pytest.raises(ModelError) as caught:
        verify_model(model)
    assert "\n" not in str(caught.value) and "not supported" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_and_logits_are_the_library_s(name):
    """Positions, mask, cache, or the cap (Gemma 2) or scale (Cohere, Granite) of logits are handled as GPT-2's."""
    model = tiny_family(name)
    verify_model(model)
    prompts = random_prompts([3, 40, 17, 1, 25])
    expected = [generated(model, prompt, 8) for prompt in prompts]
    assert greedy_decode(model, prompts, 8, batch_size=4) == expected
    ids = torch.tensor(random_prompts([20]))
    with torch.no_grad():
        ours, own = model.eval().lm_head(model.hidden_states(ids)), model.model(ids).logits
    assert torch.equal(ours, own)
    if name in ("Gemma2", "Cohere", "Granite"):
        assert (own - model.model.get_output_embeddings()(model.hidden_states(ids))).abs().max() > 0.1


def test_context_without_positions():
    """A model without a table of positions has no context, or the tokenizer's 10^30."""
    model = tiny_family("Bloom")
    assert model.context == 1024
    model.tokenizer.model_max_length = 512
    assert model.context == 512


def test_scale_that_is_no_power_of_two():
    """A scale of logits that rounds is off by more than the rounding."""
    for model in (tiny_family("Granite", logits_scaling=3.0), tiny_family("Cohere", logit_scale=0.3)):
        verify_model(model)
        ids = torch.tensor(random_prompts([20]))
        with torch.no_grad():
            own = model.model(ids).logits
            torch.testing.assert_close(model.lm_head(model.hidden_states(ids)), own, rtol=1e-6, atol=0)


@pytest.mark.parametrize("change", [lambda z: z * 1.01, lambda z: z + torch.arange(257) * 1e-2, lambda z: z[..., :-1]])
def test_other_logits_are_refused(monkeypatch, change):
    """A family whose logits are more than head(hidden states) trains on a wrong loss without a word."""
    model = tiny_language_model(std=0.4)
    verify_model(model)
    original = model.model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(model.model, "forward", forward)
    assert refusal(model).startswith("GPT2LMHeadModel: its logits are not head(hidden states)")


def test_families_that_are_refused():
    """BERT's head has layers of its own before the embedding; a family numbers columns itself, so that left padding
    changes its predictions; GPT (2018) has no key/value cache: decoding would crash at the first validation."""
    assert "BertLMHeadModel: its logits are not head(hidden states)" in refusal(tiny_family("Bert", is_decoder=True))
    assert "its logits change with padding on the left" in refusal(model_that_numbers_columns(std=0.4))
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    config = transformers.OpenAIGPTConfig(vocab_size=257, **sizes)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), byte_tokenizer())
    assert "its logits change with a key/value cache" in refusal(model)


def model_that_numbers_columns(**shape) -> LanguageModel:
    """A GPT-2 whose forward pass does not take position ids."""
    network = tiny_gpt2(**shape)
    forward = network.base_model.forward
    network.base_model.forward = lambda input_ids=None, **others: forward(input_ids=input_ids, **others)
    return LanguageModel(network, byte_tokenizer())


def test_the_check_leaves_the_modes():
    """The check sets parts to train that were in eval, or leaves all in eval where it refuses (A19)."""
    shape = {"layers": 2, "dropout": 0.1, "std": 0.4}
    for check, model in ((verify_model, tiny_language_model(**shape)), (refusal, model_that_numbers_columns(**shape))):
        model.train().model.transformer.h[1].eval()
        before = [part.training for part in model.modules()]
        check(model)
        assert [part.training for part in model.modules()] == before
