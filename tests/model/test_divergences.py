"""Divergences between teacher and student against their formulas in float64: model/losses/divergences.py."""

import math

import pytest
import torch

from model.losses.divergences import FLOOR, choose_divergence
from model.losses.registry import DIVERGENCES

INF = math.inf
NUMBERS = {"generalized_js": {"beta": 0.3}, "skew_forward": {"lambda_": 0.1}, "skew_reverse": {"lambda_": 0.1},
           "symmetric": {"mu": 0.3}}
NAMES = [*DIVERGENCES]
BOUNDS = {"JS": math.log(2), "generalized_js": -0.3 * math.log(0.3) - 0.7 * math.log(0.7),
          "skew_forward": -math.log(0.1), "skew_reverse": -math.log(0.1), "total_variation": 1}


# The formulas, from probabilities: no code of the project.
def kl(p, q):
    """sum_v p log(p / q), where 0 log 0 = 0."""
    some = p > 0
    return torch.where(some, p * torch.log(torch.where(some, p, 1) / torch.where(some, q, 1)), 0).sum(-1)


def forward_share(p, q):
    """w of "adaptive", [N], a constant: the head is filled token by token until it has one half of p."""
    shares = []
    for of_teacher, of_student in zip(p.tolist(), q.tolist(), strict=True):
        gaps, mass, in_head = [abs(a - b) for a, b in zip(of_teacher, of_student, strict=True)], 0.0, 0.0
        for token in sorted(range(len(of_teacher)), key=lambda token: -of_teacher[token]):
            if mass >= 0.5:
                break
            mass, in_head = mass + of_teacher[token], in_head + gaps[token]
        shares.append(in_head / sum(gaps))
    return p.new_tensor(shares)


def mixed_js(p, q, beta):
    return beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)


FORMULAS = {
    "forward": kl,
    "reverse": lambda p, q: kl(q, p),
    "JS": lambda p, q: mixed_js(p, q, 0.5),
    "generalized_js": lambda p, q: mixed_js(p, q, 0.3),
    "skew_forward": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "symmetric": lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p),
    "adaptive": lambda p, q, w=None: torch.lerp(kl(q, p), kl(p, q), forward_share(p, q) if w is None else w),
}


def from_formula(name, teacher, student, temperature=1.0, **fixed):
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))
    return FORMULAS[name](p, q, **fixed)


def with_gradient(name, teacher, student, temperature=1.0, **parameters):
    """(values [N], gradient [N, V] of their sum by the student's logits), computed as the losses do."""
    divergence = choose_divergence(name, **(parameters or NUMBERS.get(name, {})))
    log_p, log_q = (torch.log_softmax(logits / temperature, -1).clamp(min=FLOOR) for logits in (teacher, student))
    values, gradient = divergence(log_p, log_q, log_q.exp())
    return values, gradient / temperature


def logits_of(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def random_logits(positions, vocabulary, seed=0, scale=2.0, dtype=torch.float64):
    shape, generator = (2, positions, vocabulary), torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=dtype)


A1 = [[math.log(share) for share in row] for row in ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6))]


@pytest.mark.parametrize(("vocabulary", "temperature", "dtype", "tolerance"), [
    *[(vocabulary, temperature, torch.float64, 1e-11)
      for vocabulary, temperature in ((2, 1.0), (11, 0.5), (11, 1.0), (11, 2.7), (50257, 1.0))],
    (2, 1.0, torch.float32, 3e-6), (50257, 1.0, torch.float32, 3e-6),
])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_formula(name, vocabulary, temperature, dtype, tolerance):
    """Fault: another divergence, direction, weight or temperature than the name says, in value or gradient; or one that
    is divided by positions or tokens (A9); accuracy is lost with the size of the vocabulary."""
    teacher, student = random_logits(3, vocabulary, seed=7, dtype=dtype)
    reference = student.double().clone().requires_grad_()
    expected = from_formula(name, teacher, reference, temperature)
    expected.sum().backward()
    values, gradient = with_gradient(name, teacher, student, temperature)
    assert values.dtype == gradient.dtype == dtype
    torch.testing.assert_close(values.double(), expected.detach(), rtol=tolerance, atol=tolerance / 10)
    assert (gradient.double() - reference.grad).abs().max() <= tolerance * reference.grad.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("name", "teacher", "student", "temperature", "value", "gradient"), [
    ("forward", *A1, 1, 1.101868136, (-0.6, 0.1, 0.5)),  # the values alone are close
    ("reverse", *A1, 1, 1.002104199, (-0.29480143, -0.17899173, 0.47379316)),
    ("JS", *A1, 1, 0.230645488, (-0.08128796, -0.00857151, 0.08985947)),
    ("JS", (0, 20), (20, 0), 1, 0.693147137, None),  # KL from the mixture, the arguments reversed (A2): 9.3
    ("forward", (6, 0, 0), (0, 6, 0), 1, 5.955602561, None),  # softmax twice (A3): 1.51
    ("forward", (6, 0, 0), (1, 0, 0), 1, 0.521834214, None),  # logits normalised first (A3): 1.7e-10
    ("forward", (6, 0, 0), (6, 0, 0), 1, 0, (0, 0, 0)),  # entropy left out (A4), or softmax twice: 0.52
    ("forward", (0, -INF, 0), (0, 0, 0), 1, 0.405465108, None),  # NaN (A5)
    ("reverse", (0, 10), (10, 0), 0.05, 200, (0, 0)),  # gradient is NaN once a probability underflows (A6)
    ("reverse", (9.5, 0), (10, 0), 0.05, 0, (0, 0)),
    ("JS", (0, 10), (10, 0), 0.05, 0.693147181, (0, 0)),
    ("forward", (2, 0), (0, 2), 1, 1.523188312, (-0.761594156, 0.761594156)),
    ("forward", (2, 0), (0, 2), 2, 0.462117157, (-0.924234315 / 4, 0.924234315 / 4)),  # one side, or T^2 in it (A10)
    ("forward", (2, 0), (0, 2), 4, 0.122459331, (-0.979674650 / 16, 0.979674650 / 16)),
])
def test_hand_worked_values(name, teacher, student, temperature, value, gradient, dtype, tolerance):
    """Fault: Directions exchanged (A1), softmax twice, arguments reversed, entropy left out, NaN, T on one side."""
    pair = (logits_of(logits, dtype=dtype) for logits in (teacher, student))
    values, of_student = with_gradient(name, *pair, temperature)
    assert values.item() == pytest.approx(value, rel=tolerance, abs=tolerance)
    if gradient is not None:
        assert of_student[0].tolist() == pytest.approx(gradient, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_equality(name):
    """Fault: A divergence, or its gradient, that is not 0 where student = teacher."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        logits = random_logits(5, 300, seed=2, dtype=dtype)[0]
        values, gradient = with_gradient(name, logits, logits)
        assert values.abs().max() <= (0 if name == "JS" else tolerance) and gradient.abs().max() <= tolerance


@pytest.mark.parametrize(("mu", "same", "teacher", "student"), [
    (1.0, "forward", [0, -INF, 0], [0, 0, 0]), (0.0, "reverse", [0, 0, 0], [0, -INF, 0]),
])
def test_ends_of_symmetric(mu, same, teacher, student):
    """Fault: mu weights reverse KL; or a KL of weight 0 that would be infinite makes the other one NaN."""
    for pair in (random_logits(4, 9, seed=3), (logits_of(teacher), logits_of(student))):
        ours, expected = with_gradient("symmetric", *pair, mu=mu), with_gradient(same, *pair)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
    assert ours[0].item() == pytest.approx(math.log(1.5), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, dtype):
    """Fault: NaN or infinity at logits of +-10^4, as where the mixture is formed in probability space."""
    teacher, student = logits_of([1e4, -1e4], dtype=dtype), logits_of([-1e4, 1e4], dtype=dtype)
    values, gradient = with_gradient(name, teacher, student)
    assert values.item() == pytest.approx(BOUNDS.get(name, 2e4), rel=1e-6)  # the bounds are reached where p q = 0
    # d forward / d logits = q - p = (-1, 1); the others are flat there. "adaptive" has w = 1/2.
    slope = {"forward": 1, "symmetric": 0.3, "adaptive": 0.5}.get(name, 0)
    assert gradient[0].tolist() == pytest.approx((-slope, slope), abs=1e-6)
    wide = random_logits(4, 50, scale=1e4, dtype=dtype)
    for teacher, student in (wide, wide.flip(0), (wide[0], wide[0])):
        assert all(result.isfinite().all() for result in with_gradient(name, teacher, student, temperature=0.5))


@pytest.mark.parametrize("name", NAMES)
def test_token_excluded_by_both(name):
    """Fault: 0 * -inf: NaN in value or gradient, where the token should be as if it did not exist (A5)."""
    values, gradient = with_gradient(name, logits_of([0, -INF, 0]), logits_of([1, -INF, 0]))
    expected, without = with_gradient(name, logits_of([0, 0]), logits_of([1, 0]))
    numbers = {"forward": 0.120114507, "reverse": 0.110944072, "JS": 0.028535256}
    assert values.item() == pytest.approx(numbers.get(name, expected.item()), abs=1e-9) and gradient[0, 1] == 0
    torch.testing.assert_close(gradient[:, [0, 2]], without, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "teacher", "student"), [
    *[(name, [0, -INF, 0], [0, 0, 0]) for name in ("forward", *BOUNDS)],
    *[(name, [0, 1, 0], [0, -INF, 1]) for name in ("reverse", *BOUNDS)],
])
def test_token_excluded_by_one_side(name, teacher, student):
    """Fault: A finite divergence is refused, NaN or clipped; an excluded token of the student gets a gradient (A5)."""
    teacher, student = logits_of(teacher), logits_of(student)
    values, gradient = with_gradient(name, teacher, student)
    assert values.item() == pytest.approx(from_formula(name, teacher, student).item(), abs=1e-12)
    assert gradient.isfinite().all() and (gradient[0, 1] == 0 if student[0, 1] == -INF else gradient[0, 1] > 0)


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_visible(name):
    """Fault: A NaN logit becomes 0, or reaches other positions (A5)."""
    for faulty in (0, 1):
        pair = random_logits(3, 5, seed=8)
        pair[faulty, 1, 2] = math.nan
        assert with_gradient(name, *pair)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("name", "parameters", "message"), [
    ("KL", {}, "kl_div is 'KL': expected one of forward, reverse, "),
    ("forward", {"beta": 0.5}, "beta is no parameter of kl_div 'forward': expected none"),
    ("generalized_js", {"beta": 1}, "beta is 1: expected a number between 0 and 1"),
    ("symmetric", {"mu": -0.1}, "mu is -0.1: expected a number from 0 to 1"),
])
def test_wrong_choices_are_named(name, parameters, message):
    """Fault: a typing error, or a number out of range, trains with something else or gives NaN."""
    with pytest.raises(ValueError, match=message):
        choose_divergence(name, **parameters)
