"""Rollouts against a sampler written out over whole forward passes: model/decoding/rollouts.py."""

import itertools

import numpy as np
import pytest
import torch

from model.decoding.loop import make_decoder
from model.decoding.rollouts import as_batch, draw_rollouts, split_rows, token_log_probs
from model.decoding.sampling import SamplingOptions, row_uniforms
from model.errors import ModelError
from model.language_model import LanguageModel
from model.losses.output_head import OutputHead
from tests.conftest import END
from tests.model.test_families import tiny_family
from tests.model.test_sampling import exact_mixture, word_model

SIZE, MOST = 10, 8
PROMPTS = [[3, 1, 4, 1, 5], [2], [7, 7, 8, 0, 1, 2, 3, 4, 5, 6, 1], [0, 9, 2], [5, 5], [1, 2, 3, 4, 5, 6, 7], [8]]
UNIFORMS = row_uniforms(1, 0, list(range(len(PROMPTS))), MOST)


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return word_model(8, SIZE)


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return word_model(18, SIZE, width=16, layers=3)


def forward(model: LanguageModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(hidden states [T, D], logits [T, V]) of one row, float64: one forward pass of the library, without cache."""
    with torch.no_grad():
        output = model.model(torch.tensor([ids], device=model.device), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0].double().cpu().numpy(), output.logits[0].double().cpu().numpy()


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def sampled(student, teacher, prompt, uniforms, options: SamplingOptions, end: int = SIZE - 1, size: int = SIZE):
    """(tokens, log of the probability that each was drawn with), token by token, each from a whole forward pass."""
    tokens, logs = [], []
    for number in uniforms.tolist():
        both = [np.exp(log_softmax(forward(model, prompt + tokens)[1][-1, :size], options.temperature))
                for model in (student, teacher)]
        exact = exact_mixture(*both, options.alpha, options.top_k, options.top_p)
        mass, token = 0.0, -1
        while mass <= number:
            token += 1
            mass += exact[token]
        tokens.append(token)
        logs.append(np.log(exact[token]))
        if token == end:
            break
    return tokens, logs


def rolled(student, teacher, options, slots=3, prompts=PROMPTS, uniforms=UNIFORMS, **others):
    decoders = [None if model is None else make_decoder(model, vocabulary=SIZE) for model in (student, teacher)]
    return draw_rollouts(*decoders, prompts, uniforms.shape[1], slots, options, uniforms, **others)


OPTIONS = [
    SamplingOptions(0.0), SamplingOptions(1.0), SamplingOptions(0.3, 0.7), SamplingOptions(0.0, 1.3),
    SamplingOptions(0.2, 1.0, 3), SamplingOptions(0.5, 0.8, None, 0.7), SamplingOptions(1.0, 0.7, 5, 0.8),
]


@pytest.mark.parametrize(("options", "temperature"), zip(OPTIONS, [1.0, 0.6] * 3 + [1.0], strict=True), ids=str)
def test_rollouts_equal_a_plain_sampler(student, teacher, options, temperature):
    """Fault: another mixture, temperature or truncation than asked; or what is noted belongs to another place."""
    rollouts = rolled(student, teacher, options, temperature=temperature)
    for row, (prompt, uniforms) in enumerate(zip(PROMPTS, UNIFORMS, strict=True)):
        tokens, logs = sampled(student, teacher, prompt, uniforms, options)
        assert rollouts.tokens[row] == tokens
        count, start = len(tokens), len(prompt) - 1
        states, of_teacher = forward(teacher, prompt + tokens)
        of_student = forward(student, prompt + tokens)[1]
        drawing = log_softmax(of_student[start:-1], options.temperature)
        picked = np.arange(count), np.array(tokens)
        for name, ours, right in (
            ("behavior_log_probs", rollouts.behavior_log_probs, logs),
            ("log_q", rollouts.log_q, log_softmax(of_student[start:-1], temperature)[picked]),
            ("log_p", rollouts.log_p, log_softmax(of_teacher[start:-1], temperature)[picked]),
            ("entropy", rollouts.entropy, -(np.exp(drawing) * drawing).sum(-1)),
            ("hidden", rollouts.hidden, states[start:-1]),
        ):
            right = torch.tensor(np.array(right))
            torch.testing.assert_close(ours[row, :count], right, rtol=0, atol=1e-10, msg=lambda text, n=name: n + text)
    assert not any(values.requires_grad for values in rollouts[1:])


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[6]], ids=str)
def test_a_row_depends_on_no_other(student, teacher, options):
    """Fault: slots, neighbours or their order change what a row draws."""
    right = rolled(student, teacher, options, slots=1).tokens
    for slots in (3, 5, 50):
        assert rolled(student, teacher, options, slots).tokens == right
    for row in (0, 4):
        one = rolled(student, teacher, options, 1, [PROMPTS[row]], UNIFORMS[row : row + 1])
        assert one.tokens == [right[row]]


def test_what_was_asked_for_later_changes_nothing_before(student, teacher):
    """Fault: more new tokens change the first ones; or the number of the set does not change them."""
    options = SamplingOptions(0.3, 0.7)
    right = rolled(student, teacher, options).tokens
    longer = rolled(student, teacher, options, uniforms=row_uniforms(1, 0, list(range(7)), MOST + 6)).tokens
    assert [tokens[:MOST] for tokens in longer] == right and longer != right
    assert rolled(student, teacher, options, uniforms=row_uniforms(1, 0, list(range(7)), 1)).tokens == [
        tokens[:1] for tokens in right
    ]
    sets = [rolled(student, teacher, options, uniforms=row_uniforms(*numbers, list(range(7)), MOST)).tokens
            for numbers in ((1, 0), (1, 1), (2, 0))]
    assert all(one != other for one, other in itertools.combinations(sets, 2))
    assert len({tuple(tokens[:3]) for tokens in rolled(student, teacher, options, 3, [[1, 2]] * 7).tokens}) > 1


def test_padding_rows_of_a_head_are_never_drawn():
    """Fault: rows of the head behind the vocabulary, here the likeliest by far, take part in the softmax."""
    models = [word_model(seed, SIZE, padding=3) for seed in (1, 2)]
    decoders = []
    for model in models:
        bias = torch.zeros(SIZE + 3, dtype=torch.float64)
        bias[SIZE:] = 1000.0
        decoders.append(make_decoder(model, OutputHead(model.output_head().weight, bias), SIZE))
    options = SamplingOptions(0.5)
    rollouts = draw_rollouts(*decoders, PROMPTS, MOST, 3, options, UNIFORMS)
    for row, prompt in enumerate(PROMPTS):
        tokens, logs = sampled(*models, prompt, UNIFORMS[row], options)
        assert rollouts.tokens[row] == tokens
        assert rollouts.behavior_log_probs[row, : len(tokens)].tolist() == pytest.approx(logs, abs=1e-10)


@pytest.mark.parametrize(("first", "second"), [("GPT2", "Bloom"), ("Gemma2", "Mistral")])
def test_models_of_two_families(first, second):
    """Fault: two kinds of slots in one loop, or a head's cap, give other rollouts than the models alone."""
    models = [tiny_family(name).eval().double() for name in (first, second)]
    prompts, options = [[72, 101, 108, 108, 111, 44, 32, 119, 111, 114], [9], [72, 105, 33]], SamplingOptions(0.4)
    uniforms = row_uniforms(3, 0, [0, 1, 2], 5)
    rollouts = draw_rollouts(*map(make_decoder, models), prompts, 5, 2, options, uniforms)
    for row, prompt in enumerate(prompts):
        tokens, logs = sampled(*models, prompt, uniforms[row], options, END, 257)
        assert rollouts.tokens[row] == tokens
        assert rollouts.behavior_log_probs[row, : len(tokens)].tolist() == pytest.approx(logs, abs=1e-5)
        places = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        right = torch.tensor(forward(models[1], prompt + tokens)[0][places])
        torch.testing.assert_close(rollouts.hidden[row, : len(tokens)], right, rtol=0, atol=1e-5)


def test_bfloat16_autocast():
    """Fault: under autocast the softmax is taken in bfloat16, or what is noted is far from float32's."""
    models = [word_model(1, SIZE, width=16), word_model(2, SIZE, width=32)]
    for model in models:
        model.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert make_decoder(models[0]).head.weight.dtype == torch.bfloat16  # cast once, not at each token
        rollouts = rolled(*models, SamplingOptions(0.3, 0.7))
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, rollouts.tokens, strict=True)):
        for model, ours in zip(models, (rollouts.log_q, rollouts.log_p), strict=True):
            right = log_softmax(forward(model, prompt + tokens)[1][len(prompt) - 1 : -1], 1.0)
            assert ours.dtype == torch.float32
            np.testing.assert_allclose(
                ours[row, : len(tokens)].numpy(), right[np.arange(len(tokens)), tokens], rtol=0.03, atol=0.08
            )
        drawing = log_softmax(forward(models[0], prompt + tokens)[1][len(prompt) - 1 : -1], 0.7)
        entropy = -(np.exp(drawing) * drawing).sum(-1)
        np.testing.assert_allclose(rollouts.entropy[row, : len(tokens)].numpy(), entropy, rtol=0, atol=0.08)
    assert all(noted.isfinite().all() for noted in rollouts[1:])


def test_nothing_and_too_much(student):
    """Fault: no prompts break the loop, or a prompt that is too long for the teacher alone fails deep in it."""
    none = torch.zeros(0, 4, dtype=torch.float64)
    nothing = rolled(student, student, SamplingOptions(0.3), prompts=[], uniforms=none)
    assert nothing.tokens == [] and nothing.log_q.shape == (0, 4)
    short = word_model(2, SIZE, positions=16)
    with pytest.raises(ModelError, match="prompt 2 has 11 tokens: with 8 new ones it exceeds the model's 16"):
        rolled(student, short, SamplingOptions(0.3))
    rolled(student, None, SamplingOptions(0.0))
    with pytest.raises(ModelError, match="prompt 1 is empty"):
        rolled(student, None, SamplingOptions(0.0), prompts=[[1], []], uniforms=UNIFORMS[:2])


# Prompt "Q:" and highlights "ok" and "no!" by bytes, padded with the end-of-text (A12).
IDS = [[81, 58, 111, 107, 256, 256], [81, 58, 110, 111, 33, 256]]
ATTENDED = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
LABELS = [[-100, -100, 111, 107, 256, -100], [-100, -100, 110, 111, 33, 256]]


def test_as_batch_and_back():
    """Fault: an end-of-text that was drawn is taken for padding, or padding for a label, as pad = end (A12)."""
    ours = as_batch([[81, 58], [81, 58]], [[111, 107, 256], [110, 111, 33, 256]], END)
    assert [tensor.tolist() for tensor in ours] == [IDS, ATTENDED, LABELS]
    assert all(tensor.dtype == torch.int64 for tensor in ours)
    ids, attended, labels = as_batch([[256, 1, 2], [3]], [[256], [256, 4, 256, 5, 6]], END)  # ends in prompt and middle
    assert ids.tolist() == [[256, 1, 2, 256, 256, 256], [3, 256, 4, 256, 5, 6]]
    assert attended.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert labels.tolist() == [[-100, -100, -100, 256, -100, -100], [-100, 256, 4, 256, 5, 6]]
    prompts, tokens = [[256, 1, 2], [3], [4, 256]], [[256], [256, 4, 256, 5, 6], [7, 8]]
    parts = dict(zip(("input_ids", "attention_mask", "labels"), as_batch(prompts, tokens, END), strict=True))
    assert split_rows(parts) == (prompts, tokens)


@pytest.mark.parametrize("chunk_size", [1, 3, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_log_probs(chunk_size, dtype, tolerance, temperature):
    """Fault: chunks are lost or shifted; padding rows, bias, scale, cap or temperature are left out."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, dtype=dtype), torch.randn(13, 6, dtype=dtype)
    bias = torch.randn(13, dtype=dtype)
    bias[SIZE:] = 100.0  # padding
    tokens = torch.randint(SIZE, (11,))
    plain = hidden.double().numpy() @ weight.double().numpy()[:SIZE].T
    biased = plain + bias.double().numpy()[:SIZE]
    for head, logits in ((OutputHead(weight), plain), (OutputHead(weight, bias), biased),
                         (OutputHead(weight, bias, 0.25, 0.7), 0.7 * np.tanh(0.25 * biased / 0.7))):
        ours = token_log_probs(hidden, head, tokens, SIZE, temperature, chunk_size)
        assert ours.dtype == dtype
        right = log_softmax(logits, temperature)[np.arange(11), tokens.numpy()]
        np.testing.assert_allclose(ours.numpy(), right, rtol=0, atol=tolerance)
    assert token_log_probs(hidden[:0], OutputHead(weight), tokens[:0], SIZE, temperature, chunk_size).shape == (0,)
