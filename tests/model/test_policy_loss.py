"""The policy-gradient loss against plain float64 formulas: model/losses/policy_loss.py. By enumeration:
test_policy_gradient.py."""

import pytest
import torch

from model.losses.output_head import OutputHead
from model.losses.penalties import unit_embeddings
from model.losses.policy_loss import Penalties, PolicyTokens, policy_loss, whole_sequences
from model.losses.vocabulary_loss import TeacherHidden

COUNTS = [4, 1, 7, 2]
POSITIONS, WIDTH, TEACHER_WIDTH, VOCABULARY, PADDING = sum(COUNTS), 6, 4, 11, 3
EPSILON, FLOOR = 0.2, 1.9  # nats, among the entropies of the case, so that some lie above and some below


class Case:
    """Random states, heads and what was drawn, in `dtype`."""

    def __init__(self, dtype=torch.float64, bias: bool = True, scale: float = 1.0, cap: float | None = None):
        generator = torch.Generator().manual_seed(7)

        def random(*shape, std=1.0):
            return (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

        rows = VOCABULARY + PADDING
        self.hidden, self.weight = random(POSITIONS, WIDTH), random(rows, WIDTH, std=0.7)
        self.bias = random(rows) if bias else None
        self.scale, self.cap = scale, cap
        self.of_teacher = TeacherHidden(random(POSITIONS, TEACHER_WIDTH),
                                        OutputHead(random(rows, TEACHER_WIDTH), random(rows)))
        tokens = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
        positive = [random(POSITIONS, std=0.5).exp() for _ in range(2)]
        self.drawn = PolicyTokens(tokens, COUNTS, random(POSITIONS, std=0.5) - 2.5, random(POSITIONS), *positive,
                                  random(POSITIONS))
        self.embeddings = unit_embeddings(random(VOCABULARY, 5))

    def leaves(self, dtype=None) -> list:
        return [None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()
                for tensor in (self.hidden, self.weight, self.bias)]

    def ours(self, **options):
        """(PolicyLoss, gradients of hidden, weight, bias)."""
        hidden, weight, bias = leaves = self.leaves()
        loss = policy_loss(hidden, OutputHead(weight, bias, self.scale, self.cap), self.drawn, self.of_teacher,
                           vocabulary=VOCABULARY, **options)
        loss.loss_sum.backward()
        return loss, [tensor.grad for tensor in leaves if tensor is not None]


def pair_penalties(q: torch.Tensor, embeddings: torch.Tensor, floor: float = FLOOR) -> list[torch.Tensor]:
    """Frequency, diversity and entropy of one sequence, pair by pair."""
    pairs = [(left, right) for left in range(len(q)) for right in range(len(q)) if left != right]
    entropy = sum(torch.relu(1 + (tensor * tensor.log()).sum() / floor) for tensor in q) / len(q)
    if not pairs:
        return [q.new_zeros(()), q.new_zeros(()), entropy]
    points = q @ embeddings
    same = sum((q[left] * q[right]).sum() for left, right in pairs) / len(pairs)
    distance = sum((points[left] - points[right]).square().sum() for left, right in pairs) / len(pairs)
    return [same, torch.exp(-distance), entropy]


def formula(case: Case, temperature=1.0, factor=1.0, clip=EPSILON, weights=None) -> tuple[dict, list]:
    """(loss and sums, gradients of hidden, weight, bias): full logits, autograd through all of it, float64."""
    hidden, weight, bias = leaves = case.leaves(torch.float64)
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * case.scale
    logits = logits if case.cap is None else case.cap * torch.tanh(logits / case.cap)
    states, head = case.of_teacher
    of_teacher = states.double() @ head.weight.double().T + head.bias.double()
    q, p = (torch.softmax(tensor[:, :VOCABULARY] / temperature, -1) for tensor in (logits, of_teacher))
    tokens, _, log_drawn, advantages, of_tokens, of_states, _ = (
        tensor.double() if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor for tensor in case.drawn)
    x = of_tokens * q[torch.arange(POSITIONS), tokens] / log_drawn.exp()
    plain = -x * advantages
    clipped = plain if clip is None else -x.clamp(1 - clip, 1 + clip) * advantages
    sums = {
        "single_step": sum(of_states[t] * (q[t] * (q[t] / p[t]).log()).sum() for t in range(POSITIONS)),
        "long_term": torch.maximum(plain, clipped).sum(), "entropy": -(q * q.log()).sum(),
        "clipped": (clipped > plain).double().sum(),
        **dict.fromkeys(["frequency_penalty", "diversity_penalty", "entropy_penalty"], q.new_zeros(())),
    }
    if weights is not None:
        for tensor in q.split(COUNTS):
            for name, value in zip(list(sums)[-3:], pair_penalties(tensor, case.embeddings.double()), strict=True):
                sums[name] = sums[name] + len(tensor) * value
    weighted = sum(by * sums[name] for by, name in zip(weights or (0, 0, 0), list(sums)[-3:], strict=True))
    sums["loss_sum"] = factor * (sums["single_step"] + sums["long_term"] + weighted)
    sums["loss_sum"].backward()
    gradients = [tensor.grad for tensor in leaves if tensor is not None]
    return {name: tensor.detach() for name, tensor in sums.items()}, gradients


def assert_as_formula(ours, theirs, tolerance: float) -> None:
    (loss, gradients), (sums, right) = ours, theirs
    assert set(sums) == set(loss._fields)
    for name, value in sums.items():
        assert getattr(loss, name).item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance), name
    for found, expected in zip(gradients, right, strict=True):
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


WEIGHTS = (0.6, 0.8, 0.5)
HEADS = {"plain": {}, "no bias": {"bias": False}, "scaled and capped": {"scale": 0.6, "cap": 2.0}}


@pytest.mark.parametrize("chunk_size", [1, 7, POSITIONS, POSITIONS + 6])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "penalties"])
def test_loss_sums_and_gradients_equal_the_formula(weights, temperature, chunk_size):
    """Fault: a chunk that is lost, cuts a sequence, or a gradient without a weight, the factor or 1 / temperature."""
    case = Case()
    penalties = None if weights is None else Penalties(*weights, FLOOR, case.embeddings)
    ours = case.ours(temperature=temperature, scale=0.37, chunk_size=chunk_size, penalties=penalties)
    theirs = formula(case, temperature, 0.37, weights=weights)
    assert 2 <= theirs[0]["clipped"] <= POSITIONS - 2
    assert_as_formula(ours, theirs, 1e-10)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads_in_float32(options):
    """Fault: a head's scale, cap or bias is left out of the gradient, or single precision loses digits."""
    case = Case(torch.float32, **options)
    ours = case.ours(penalties=Penalties(*WEIGHTS, FLOOR, case.embeddings), chunk_size=5)
    assert_as_formula(ours, formula(case, weights=WEIGHTS), 1e-5)


def test_no_sequence_at_all_gives_a_zero_with_a_graph():
    """Fault: NaN, or a constant without a graph, where a process has no rollouts."""
    case = Case()
    none = PolicyTokens(case.drawn.tokens[:0], [], *(tensor[:0] for tensor in case.drawn[2:]))
    hidden, weight, bias = leaves = [case.hidden[:0].requires_grad_(), *case.leaves()[1:]]
    for penalties in (None, Penalties(*WEIGHTS, FLOOR, case.embeddings)):
        loss = policy_loss(hidden, OutputHead(weight, bias), none, case.of_teacher._replace(hidden=torch.zeros(
            0, TEACHER_WIDTH, dtype=torch.float64)), vocabulary=VOCABULARY, penalties=penalties)
        assert all(tensor == 0 for tensor in loss)
        assert all((tensor == 0).all() for tensor in torch.autograd.grad(loss.loss_sum, leaves))


def test_constants_have_no_gradient_and_sums_no_graph():
    """Fault: the advantage, the weight or the teacher is differentiated, or the log keeps the graph alive."""
    case = Case()
    case.drawn = PolicyTokens(*(part.requires_grad_() if torch.is_tensor(part) and part.is_floating_point() else part
                                for part in case.drawn))
    loss, _ = case.ours(penalties=Penalties(*WEIGHTS, FLOOR, case.embeddings))
    assert all(tensor.grad is None for tensor in case.drawn if torch.is_tensor(tensor))
    assert not any(tensor.requires_grad for tensor in loss[1:])


def test_chunks_hold_whole_sequences():
    """Fault: a chunk cuts a sequence, loses one, or holds more positions than asked."""
    assert whole_sequences([4, 1, 7, 2], 5) == [slice(0, 5), slice(5, 12), slice(12, 14)]
    assert whole_sequences([4, 1, 7, 2], 1) == [slice(0, 4), slice(4, 5), slice(5, 12), slice(12, 14)]
    assert whole_sequences([4, 1, 7, 2], 99) == [slice(0, 14)]
    assert whole_sequences([], 4) == []
