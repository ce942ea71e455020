"""Drawing from the mixture of student and teacher against the exact distribution: model/decoding/sampling.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model.decoding.sampling import SamplingOptions, row_uniforms, sample, truncate
from model.language_model import LanguageModel

LAST_UNIFORM = 1 - 2.0**-53
TRUNCATIONS = [(None, None), (4, None), (None, 0.7), (6, 0.8), (1, None), (None, 1.0), (99, None)]


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words 0 ... size - 1, the last of which is the end of a text."""
    words = Tokenizer(models.WordLevel({str(index): index for index in range(size)}, unk_token=str(size - 1)))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(size - 1))


def word_model(seed: int, size: int = 10, width: int = 8, layers: int = 2, padding: int = 0,
               positions: int = 32) -> LanguageModel:
    """A random GPT-2 in float64, in eval mode, over the words of `word_tokenizer`, and padding rows."""
    torch.manual_seed(seed)
    network = GPT2LMHeadModel(GPT2Config(
        vocab_size=size + padding, n_positions=positions, n_embd=width, n_layer=layers, n_head=2,
        bos_token_id=size - 1, eos_token_id=size - 1, initializer_range=0.5,
    ))
    return LanguageModel(network.double(), word_tokenizer(size)).eval()


def softmax(logits, temperature: float) -> np.ndarray:
    """In float64, by its formula."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


def exact_mixture(student, teacher, alpha: float, top_k: int | None = None, top_p: float | None = None) -> np.ndarray:
    """The distribution of one draw, worked out token by token; student and teacher are probabilities [V]."""
    mixed = np.array([alpha * p + (1 - alpha) * q for q, p in zip(student, teacher, strict=True)])
    order = sorted(range(len(mixed)), key=lambda token: -mixed[token])[:top_k]
    whole, kept, mass = sum(mixed[token] for token in order), [], 0.0
    for token in order:
        if top_p is None or mass < top_p * whole:
            kept.append(token)
            mass += mixed[token]
    result = np.zeros_like(mixed)
    result[kept] = mixed[kept] / mass
    return result


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """(statistic, its value that right draws exceed once in a thousand); rare cells count as one."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = expected < 10
    cells = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    freedom = len(cells) - 1
    spread = 2 / (9 * max(freedom, 1))  # Wilson and Hilferty: the cube root is nearly normal
    critical = freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3
    return sum((count - share) ** 2 / share for count, share in cells), critical


def last_probabilities(model: LanguageModel, ids: list[int], temperature: float) -> np.ndarray:
    """Distribution of the next token, by the library's own forward pass."""
    with torch.no_grad():
        return softmax(model.model(torch.tensor([ids])).logits[0, -1].numpy(), temperature)


@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_frequencies_of_single_draws(top_k, top_p):
    """Fault: draws that do not follow the mixture, its temperature or its truncation."""
    dtype = torch.float64 if top_k is None else torch.float32
    count, options = 100_000, SamplingOptions(0.3, 0.7, top_k, top_p)
    student, teacher = (last_probabilities(word_model(seed), [3, 1, 4], 0.7) for seed in (1, 2))
    exact = exact_mixture(student, teacher, 0.3, top_k, top_p)
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    logs = (torch.tensor(share).log().to(dtype).expand(count, -1) for share in (student, teacher))
    tokens, found = sample(*logs, options, uniforms)
    counts = np.bincount(tokens.numpy(), minlength=10)
    statistic, critical = chi_square(counts, exact)
    assert statistic <= critical
    assert found.dtype == dtype
    expected = torch.tensor(np.log(exact[tokens.numpy()]))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    for wrong in (exact_mixture(student, teacher, 0.2), exact_mixture(student ** 0.7, teacher ** 0.7, 0.3)):
        if top_k is None and top_p is None:  # so many draws tell such faults
            statistic, critical = chi_square(counts, wrong / wrong.sum())
            assert statistic > critical


def test_inversion_by_hand():
    """Fault: a token's interval is open or closed at the wrong end, or uniforms are taken for other rows."""
    log_probs = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log()
    cases = {0.0: 0, 0.25: 0, 0.5 - 2**-53: 0, 0.5: 2, 0.75 - 2**-53: 2, 0.75: 3, LAST_UNIFORM: 3}
    uniforms = torch.tensor(list(cases), dtype=torch.float64)
    tokens, found = sample(log_probs.expand(len(cases), -1), None, SamplingOptions(0.0), uniforms)
    assert tokens.tolist() == list(cases.values())
    assert found.exp().tolist() == pytest.approx([0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25], abs=1e-15)
    # 0.25 (0, 1, 0, 0) + 0.75 (0.5, 0, 0.25, 0.25) = (0.375, 0.25, 0.1875, 0.1875)
    teacher = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64).log()
    uniforms = torch.tensor([0.4], dtype=torch.float64)
    tokens, found = sample(log_probs[None], teacher[None], SamplingOptions(0.25), uniforms)
    assert tokens.tolist() == [1] and found.exp().item() == pytest.approx(0.25, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.6), (7, 0.9)])
def test_a_token_without_probability_is_never_drawn(top_k, top_p, dtype):
    """Fault: numbers at either end, or on a border, give a token of probability 0 or one behind the last."""
    generator = torch.Generator().manual_seed(3)
    for holes in ([0, 1], [8, 9], [0, 4, 5, 9], list(range(9)), list(range(1, 10)), []):
        log_probs = torch.randn(10, generator=generator, dtype=torch.float64).mul(2)
        log_probs[holes] = -torch.inf
        log_probs = log_probs.log_softmax(-1).to(dtype)
        kept = truncate(log_probs.double().exp()[None], top_k, top_p)[0]
        borders = (kept.cumsum(0) / kept.sum()).clamp(max=LAST_UNIFORM)
        uniforms = torch.cat([borders, borders.nextafter(torch.zeros(())), torch.tensor([0, 5e-324, LAST_UNIFORM]),
                              borders.nextafter(torch.ones(())).clamp(max=LAST_UNIFORM)]).clamp(0, LAST_UNIFORM)
        uniforms[uniforms.argmax()] = LAST_UNIFORM
        options = SamplingOptions(0.0, 1.0, top_k, top_p)
        tokens, found = sample(log_probs.expand(len(uniforms), -1), None, options, uniforms)
        assert (kept[tokens] > 0).all()
        assert found.isfinite().all()
        exact = (kept / kept.sum()).log()[tokens]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_probabilities_that_are_hardly_there():
    """Fault: a sum that is not 1 sends the last number behind all tokens, or to one whose probability is 0."""
    size = 50_257
    log_probs = torch.full((2, size), -math.log(size))  # float32: the sum is not 1
    log_probs[1, 1:] = -800.0  # e^-800 is 0 in float64
    log_probs[1, 0] = 0.0
    for number, expected in ((0.0, [0, 0]), (LAST_UNIFORM, [size - 1, 0]), (1.0, [size - 1, 0])):
        tokens, found = sample(log_probs, None, SamplingOptions(0.0), torch.full((2,), number, dtype=torch.float64))
        assert tokens.tolist() == expected
        assert found.tolist() == pytest.approx([-math.log(size), 0.0], abs=1e-6)


def test_top_k_keeps_exactly_k():
    """Fault: tokens as likely as the k-th are all kept, or none of them."""
    ties = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.1], [0.4, 0.2, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    for k in range(1, 9):
        kept = truncate(ties, k, None)
        assert (kept > 0).sum(-1).tolist() == [min(k, 6)] * 2
        best = ties.sort(-1, descending=True).values[:, :k]
        torch.testing.assert_close(kept.sort(-1, descending=True).values[:, :k], best, rtol=0, atol=0)
        assert torch.equal(kept[kept > 0], ties[kept > 0])
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, found = sample(ties[:1].log().expand(500, -1), None, SamplingOptions(0.0, 1.0, 2, None), uniforms)
    assert len(set(tokens.tolist())) == 2
    assert found.exp().tolist() == pytest.approx([0.5] * 500)


def test_top_p_keeps_the_fewest():
    """Fault: one token too many or too few: the one that reaches the mass belongs in, the next does not."""
    for probabilities, counts in (
        ([0.1, 0.6, 0.3], {0.59: 1, 0.6: 1, 0.61: 2, 0.95: 3}), ([0.5, 0.25, 0.25], {0.5: 1, 0.75: 2, 0.76: 3}),
        ([0.25, 0.25, 0.25, 0.25], {0.5: 2, 1e-9: 1}), ([0.0, 1.0, 0.0], {0.999: 1}), ([0.4, 0.3, 0.3], {0.4: 1}),
        ([0.3, 0.65, 0.05], {0.65: 1}), ([0.3, 0.4, 0.15, 0.15], {0.4: 1}),
    ):
        given = torch.tensor([probabilities], dtype=torch.float64)
        for top_p, count in counts.items():
            kept = truncate(given, None, top_p)
            assert sorted(kept[kept > 0].tolist()) == sorted(probabilities)[-count:], (probabilities, top_p)
            assert (truncate(given / 2, None, top_p) > 0).sum().item() == count  # a share of the mass there is


def test_truncation_equals_the_loop():
    """Fault: top_p is not of what top_k left, or rows of a batch are truncated alike."""
    rows = torch.distributions.Dirichlet(torch.full((12,), 0.4, dtype=torch.float64))
    torch.manual_seed(0)
    probabilities = rows.sample((40,))
    for top_k, top_p in itertools.product((None, 1, 3, 12, 40), (None, 0.1, 0.5, 0.9, 1.0)):
        ours = truncate(probabilities, top_k, top_p)
        ours = ours / ours.sum(-1, keepdim=True)
        exact = [exact_mixture(row, row, 0.0, top_k, top_p) for row in probabilities.numpy()]
        torch.testing.assert_close(ours, torch.tensor(np.stack(exact)), rtol=0, atol=1e-14)


def test_numbers_of_a_row():
    """Fault: a row's numbers depend on other rows, their order or the length, or do not on row, set or seed."""
    together = row_uniforms(5, 2, [7, 0, 3], 40)
    assert together.dtype == torch.float64 and together.shape == (3, 40)
    assert ((together >= 0) & (together < 1)).all()
    for place, row in enumerate((7, 0, 3)):
        assert torch.equal(row_uniforms(5, 2, [row], 40)[0], together[place])
        assert torch.equal(row_uniforms(5, 2, [row], 9)[0], together[place, :9])
    seen = {tuple(row_uniforms(seed, number, [row], 3)[0].tolist())
            for seed, number, row in itertools.product(range(4), range(4), range(4))}
    assert len(seen) == 64
