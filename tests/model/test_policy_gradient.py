"""Policy-gradient distillation against formulas and by enumeration, with whole models: model/policy_gradient.py."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import model.decoding.rollout_buffer
import model.teacher_student
from model.decoding.rollout_buffer import RewardConfig, RolloutBuffer
from model.decoding.rollouts import RolloutConfig
from model.decoding.sampling import SamplingOptions
from model.language_model import LanguageModel
from model.loading import load_language_model
from model.objective import ObjectiveError
from model.policy_gradient import TeacherStudent
from model.teacher import Teacher
from tests.model.test_policy_loss import pair_penalties
from tests.model.test_sampling import word_tokenizer
from tests.model.test_teacher_student import gradients
from tests.small_kd_runs import randomised

SIZE, PADDING, LENGTH = 7, 2, 6  # tokens, rows of the embedding behind them, tokens of a rollout at most
PARTS = {"cross_entropy", "reward", "single_step", "long_term", "importance_weight_mean", "clip_fraction", "entropy",
         "sequence_reverse_kl", "rollout_length"}
# Keys of a config and the fields that they set; all others are those of RolloutBuffer.
ROLLOUT = {"rollout_epochs": "epochs", "max_generation_length": "max_new_tokens"}
REWARDS = {"temperature": "temperature", "importance_weight": "importance_weight", "normalize_rewards": "normalize",
           "whiten": "whiten"}
POLICY = {name: name for name in ("lm_weight", "clip_epsilon")}
ROWS = [([1, 2, 0], [3, 4, 6]), ([5], [2, 2, 1, 0, 6]), ([4, 4, 3, 2, 1], [6]), ([0, 3], [5, 6])]


def network(seed: int, size: int = SIZE, width: int = 8, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A random GPT-2 in float64, sure enough of itself that two of them differ."""
    torch.manual_seed(seed)
    return randomised(GPT2LMHeadModel(GPT2Config(
        vocab_size=size + PADDING, n_positions=32, n_embd=width, n_layer=2, n_head=2, bos_token_id=size - 1,
        eos_token_id=size - 1, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.4,
    )), seed).double()


def objective_of(student, teacher, size: int = SIZE, **options) -> TeacherStudent:
    own, of_teacher = (LanguageModel(network, word_tokenizer(size)) for network in (student, teacher))
    teacher, penalty = Teacher(of_teacher), options.pop("penalty", False)
    source, alpha = options.pop("rollout", "mixed"), options.pop("alpha", 0.2)
    alpha = {"student": 0.0, "teacher": 1.0}.get(source, alpha)
    sampling = SamplingOptions(alpha, options.pop("rollout_temperature", 1.0)) if source != "labels" else None
    rollout, rewards, policy = ({names[key]: options.pop(key) for key in names.keys() & options.keys()}
                                for names in (ROLLOUT, REWARDS, POLICY))
    rollouts = RolloutBuffer(
        own, teacher, RolloutConfig(sampling, **{"max_new_tokens": LENGTH, "batch_size": 3, **rollout}),
        size, RewardConfig(**rewards), log=lambda text: None, **options,
    )
    return TeacherStudent(own, teacher, penalty, rollouts=rollouts, **policy).train()


def collated(rows, first: int = 0, columns: int = 0, pad: int = SIZE - 1) -> dict:
    """A batch of (prompt, highlight), padded on the right; columns: more of the padding."""
    width = max(len(prompt) + len(text) for prompt, text in rows) + columns
    batch = {name: torch.full((len(rows), width), value)
             for name, value in (("input_ids", pad), ("attention_mask", 0), ("labels", -100))}
    for index, (prompt, text) in enumerate(rows):
        end = len(prompt) + len(text)
        batch["input_ids"][index, :end] = torch.tensor([*prompt, *text])
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, len(prompt) : end] = torch.tensor(text)
    return {**batch, "rows": list(range(first, first + len(rows)))}


def in_batches(rows, size: int) -> list[dict]:
    return [collated(rows[start : start + size], start) for start in range(0, len(rows), size)]


def take_step(objective, batches):
    """(means over the step's label tokens as the loop forms them: loss and parts, gradients, sequences drawn)."""
    objective.zero_grad()
    (step,) = (list(each) for each in objective.iter_steps(None, batches, [len(batches)]))
    terms = [objective(*arguments) for arguments in step]
    count = sum(each.token_count for each in terms)
    assert count == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    loss = sum(each.loss_sum for each in terms) / count
    loss.backward()
    means = {"loss": loss.item(),
             **{name: sum(each.parts[name] for each in terms).item() / count for name in terms[0].parts}}
    assert not any(part.requires_grad for each in terms for part in each.parts.values())
    drawn = [part.tolist() for *_, rollout in step if rollout is not None
             for part in rollout.drawn.tokens.split(rollout.drawn.counts)]
    return means, gradients(objective.language_model.model), drawn


def distributions(network, prompt, text, temperature=1.0, size: int = SIZE) -> torch.Tensor:
    """Of each token of `text` after what stands before it, [n, size], from the library's own full logits."""
    logits = network(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1, :size]
    return torch.softmax(logits / temperature, -1)


def label_cross_entropy(network, rows) -> torch.Tensor:
    """Mean over the tokens of the highlights, at temperature 1."""
    chances = [distributions(network, *row)[torch.arange(len(row[1])), row[1]] for row in rows]
    return -torch.cat(chances).log().mean()


def formula(student, teacher, rows, sequences, *, temperature=1.0, rollout_temperature=1.0, rollout="mixed", alpha=0.2,
            importance_weight="token", normalize_rewards=True, whiten=False, lm_weight=0.5, clip_epsilon=0.2,
            penalty=False, drawn_from=None):
    """(loss and parts of a step, gradients of the student): plain formulas, row by row without padding."""
    alpha = {"student": 0.0, "teacher": 1.0}.get(rollout, alpha)
    drawn_from = student if drawn_from is None else drawn_from
    student = copy.deepcopy(student)
    embeddings = torch.nn.functional.normalize(student.transformer.wte.weight.detach()[:SIZE])
    each_row, entropies, weighted, penalties = [], [], 0, torch.zeros(3, dtype=torch.float64)
    for (prompt, _), text in zip(rows, sequences, strict=True):
        chosen = torch.arange(len(text)), torch.tensor(text)
        with torch.no_grad():
            q_then, p = (distributions(each, prompt, text, temperature) for each in (drawn_from, teacher))
            q_hot, p_hot = (distributions(each, prompt, text, rollout_temperature) for each in (drawn_from, teacher))
        ratio = q_then[chosen] / (alpha * p_hot + (1 - alpha) * q_hot)[chosen]
        if rollout == "labels":
            ratio = torch.ones_like(ratio)
        weights, of_states = ratio, torch.ones_like(ratio)
        if importance_weight == "sequence":
            weights = ratio.prod().expand_as(ratio)
            of_states = torch.stack([ratio[:t].prod() for t in range(len(text))])
        rewards = p[chosen].log() - q_then[chosen].log()
        following = [rewards[t + 1 :] for t in range(len(text))]
        advantages = torch.stack([each.sum() / max(len(each), 1) if normalize_rewards else each.sum()
                                  for each in following])
        q = distributions(student, prompt, text, temperature)
        entropies.append(-(q * q.log()).sum(-1).detach())
        single = of_states * (q * (q / p).log()).sum(-1)
        each_row.append((rewards, advantages, weights, single, weights * q[chosen] / q_then[chosen]))
        if penalty:
            of_row = len(text) * torch.stack(pair_penalties(q, embeddings, 0.1 * math.log(SIZE)))
            weighted = weighted + of_row @ of_row.new_tensor([0.1, 0.1, 0.01])
            penalties += of_row.detach()
    rewards, advantages, weights, single, x = (torch.cat(each) for each in zip(*each_row, strict=True))
    if whiten:
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    plain = -x * advantages
    clipped = plain if clip_epsilon is None else -x.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages
    cross_entropy = label_cross_entropy(student, rows)
    surrogate, count = torch.maximum(plain, clipped), len(rewards)
    loss = (1 - lm_weight) * (single.sum() + surrogate.sum() + weighted) / count + lm_weight * cross_entropy
    loss.backward()
    values = {
        "loss": loss, "cross_entropy": cross_entropy, "reward": rewards.mean(), "single_step": single.mean(),
        "long_term": surrogate.mean(), "importance_weight_mean": weights.mean(),
        "clip_fraction": (clipped > plain).double().mean(), "entropy": torch.cat(entropies).mean(),
        "sequence_reverse_kl": -rewards.sum() / len(rows), "rollout_length": torch.tensor(count / len(rows)),
    }
    if penalty:
        values |= zip(["frequency_penalty", "diversity_penalty", "entropy_penalty"], penalties / count, strict=True)
    return {name: each.item() for name, each in values.items()}, gradients(student)


def assert_same(found, right, tolerance: float = 1e-9) -> None:
    """Loss, parts and gradients; a parameter without a gradient counts as one of zeros."""
    slopes = found[1]
    assert found[0] == pytest.approx(right[0], rel=tolerance, abs=tolerance)
    assert (largest := max(each.abs().max() for each in right[1].values())) > 0
    for name in slopes.keys() | right[1].keys():
        difference = slopes.get(name, 0) - right[1].get(name, 0)
        assert difference.abs().max() <= tolerance * largest, name


# -- the loss of a step ------------------------------------------------------------------------------------------

STEPS = {
    "default": {}, "student": {"rollout": "student"}, "teacher": {"rollout": "teacher"},
    "labels": {"rollout": "labels"},
    "sequence": {"alpha": 0.5, "importance_weight": "sequence", "normalize_rewards": False, "clip_epsilon": None},
    "temperatures": {"temperature": 0.7, "rollout_temperature": 1.4, "whiten": True},
    "penalty": {"penalty": True, "lm_weight": 0.2}, "labels with penalty": {"penalty": True, "rollout": "labels"},
    "rewards alone": {"lm_weight": 0.0}, "highlights alone": {"lm_weight": 1.0},
    "labels with rewards alone": {"rollout": "labels", "lm_weight": 0.0},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_step_equals_the_formula(options):
    """Fault: cross-entropy on samples, a mean over the wrong tokens, or an option without effect."""
    student, teacher = network(1), network(2, width=12)
    *found, sequences = take_step(objective_of(student, teacher, chunk_size=4, **options), in_batches(ROWS, 3))
    assert found[0].keys() - {"loss"} == PARTS | ({name for name in found[0] if "penalty" in name})
    if options.get("rollout") == "labels":
        assert sequences == [text for _, text in ROWS]
    else:
        assert len({len(each) for each in sequences}) > 1
    assert all(SIZE - 1 not in each[:-1] and (each[-1] == SIZE - 1 or len(each) == LENGTH) for each in sequences)
    assert_same(found, formula(student, teacher, ROWS, sequences, **options))


@pytest.mark.parametrize("rollout", ["mixed", "labels"])
def test_micro_batches_change_nothing(rollout):
    """Fault: means of micro-batches are averaged, draws depend on the batch, or parts are scaled by its tokens."""
    together, apart = (take_step(objective_of(network(1), network(2), rollout=rollout, penalty=True),
                                 in_batches(ROWS, size)) for size in (4, 1))
    assert together[2] == apart[2]
    assert_same(together, apart, 1e-12)


def test_second_pass_over_the_rollouts_clips_against_the_first():
    """Fault: log q of the rollout is computed again, so that rho stays 1; or the rollouts are drawn again."""
    student, teacher = network(1), network(2)
    objective = objective_of(student, teacher, rollout_epochs=2)
    first = take_step(objective, in_batches(ROWS, 2))
    before = copy.deepcopy(student)
    with torch.no_grad():
        for index, parameter in enumerate(student.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    second = take_step(objective, in_batches(ROWS, 2))
    assert second[2] == first[2]
    right = formula(student, teacher, ROWS, second[2], drawn_from=before)
    assert right[0]["long_term"] != pytest.approx(formula(student, teacher, ROWS, second[2])[0]["long_term"], rel=0.01)
    assert_same(second, right)
    assert take_step(objective, in_batches(ROWS, 2))[2] != first[2]


def test_in_eval_mode_the_highlights_are_read_and_nothing_is_drawn():
    """Fault: validation draws, so that its loss is noise and the numbers of the next rollouts move."""
    student, teacher = network(1), network(2)
    objective = objective_of(student, teacher, lm_weight=0.3).eval()
    means, _, drawn = take_step(objective, in_batches(ROWS, 3))
    q, p = (torch.cat([distributions(each, *row) for row in ROWS]) for each in (student, teacher))
    single = (q * (q / p).log()).sum(-1).mean().item()
    cross_entropy = label_cross_entropy(student, ROWS).item()
    assert drawn == [] and objective.rollouts.sets_drawn == 0
    assert means == pytest.approx({"loss": 0.7 * single + 0.3 * cross_entropy, "cross_entropy": cross_entropy,
                                   "single_step": single, "entropy": -(q * q.log()).sum(-1).mean().item()}, rel=1e-10)


def test_on_policy_divergence_equals_the_formula():
    """Fault: the divergence is taken on the highlights, or cross-entropy on samples, or means are over other tokens."""
    student, teacher = network(1), network(2, width=12)
    rollouts = objective_of(student, teacher, rollout="student", temperature=2.0).rollouts
    objective = model.teacher_student.TeacherStudent(
        rollouts.student, rollouts.teacher, temperature=2.0, kd_weight=0.3, chunk_size=4, on_policy_fraction=1.0,
        rollouts=rollouts,
    ).train()
    means, slopes, drawn = take_step(objective, in_batches(ROWS, 3))
    assert sum(map(len, drawn)) != sum(len(text) for _, text in ROWS)
    reference = copy.deepcopy(student)
    q, p = (torch.cat([distributions(each, prompt, text, 2.0) for (prompt, _), text in zip(ROWS, drawn, strict=True)])
            for each in (reference, teacher))
    divergence, cross_entropy = (p * (p / q).log()).sum(-1).mean(), label_cross_entropy(reference, ROWS)
    loss = 0.7 * cross_entropy + 0.3 * 2.0**2 * divergence
    loss.backward()
    right = {"loss": loss.item(), "cross_entropy": cross_entropy.item(), "divergence": divergence.item()}
    assert_same((means, slopes), (right, gradients(reference)), 1e-10)


def test_a_token_that_the_teacher_excludes_stops_training():
    """Fault: log p = -inf of a drawn token becomes a reward of -1e30 that tears the weights apart."""
    objective = objective_of(network(1), network(2), rollout="student")
    head = objective.teacher.head
    only_the_end = torch.full((SIZE + PADDING,), -math.inf).index_fill(0, torch.tensor([SIZE - 1]), 0)
    objective.teacher.head = head._replace(bias=only_the_end.double())
    with pytest.raises(ObjectiveError, match=r"rows: \d.*raise distillation_kwargs\.temperature"):
        next(objective.iter_steps(SimpleNamespace(names=list), in_batches(ROWS, 2), [2]))
    objective.teacher.head = head
    take_step(objective, in_batches(ROWS, 2))


def test_prompts_are_cut_to_make_room():
    """Fault: a row that fills the context is continued beyond it, or its whole prompt is learnt from."""
    objective = objective_of(network(1), network(2), rollout="student", truncate_prompt=lambda prompt: prompt[-2:])
    ((_, _, _, rollout),) = next(objective.iter_steps(None, [collated(ROWS)], [1]))
    for (prompt, _), ids, labels in zip(ROWS, rollout.input_ids, rollout.labels, strict=True):
        start = int((labels != -100).int().argmax())
        assert ids[:start].tolist() == prompt[-2:]


# -- what must be zero, one, or without effect -------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "equal"), [(0.0, True), (None, False)])
def test_rho_is_one_on_the_first_pass(dropout, equal, tmp_path):
    """Fault: a dropout of the model's config acts in the loss, or while drawing; None shows that it would tell."""
    network(1, dropout=0.3).float().save_pretrained(tmp_path)
    word_tokenizer(SIZE).save_pretrained(tmp_path)
    student = load_language_model(str(tmp_path), dropout=dropout).model.double()
    objective = objective_of(student, network(2))
    ((_, _, _, rollout),) = next(objective.iter_steps(None, [collated(ROWS)], [1]))
    for training in (True, False):
        hidden, tokens = objective.language_model.train(training).label_hidden(*rollout[:3])
        now = torch.log_softmax(objective.language_model.lm_head(hidden)[:, :SIZE], -1)
        rho = (now[torch.arange(len(tokens)), tokens] - rollout.drawn.log_q).exp()
        assert bool((rho - 1).abs().max() <= 1e-12) == (equal or not training)


# -- by enumeration ----------------------------------------------------------------------------------------------

WORDS, TOY_PROMPT = 3, [0, 1]  # sequences of up to 3 tokens, the last word of which ends them
TOY_SEQUENCES = [(2,), (0, 2), (1, 2), *((*start, last) for start in itertools.product([0, 1], repeat=2)
                                         for last in range(WORDS))]


@pytest.mark.parametrize(("rollout", "alpha", "kind"), [("mixed", 0.0, "token"), ("mixed", 0.4, "sequence"),
                                                        ("teacher", 0.2, "sequence")])
def test_expected_gradient_of_whole_models_is_exact(rollout, alpha, kind, monkeypatch):
    """Fault: r_t counted twice, states or tokens off by one, or the wrong distribution noted while drawing."""
    student, teacher = network(3, WORDS), network(4, WORDS)
    share = 1.0 if rollout == "teacher" else alpha
    exact, uniforms, chances = 0, torch.full((len(TOY_SEQUENCES), 3), 0.5, dtype=torch.float64), []
    for row, text in enumerate(TOY_SEQUENCES):
        q, p = (distributions(each, TOY_PROMPT, text, size=WORDS) for each in (student, teacher))
        chosen = torch.arange(len(text)), torch.tensor(text)
        exact = exact + q[chosen].prod() * (q[chosen].log().sum() - p[chosen].log().sum().detach())
        mixture = (share * p + (1 - share) * q).detach()
        uniforms[row, : len(text)] = mixture.cumsum(-1)[chosen] - mixture[chosen] / 2  # half-way: draws the token
        chances.append(mixture[chosen].prod())
    exact.backward()
    right = gradients(student)
    assert sum(chances).item() == pytest.approx(1, abs=1e-12)
    monkeypatch.setattr(model.decoding.rollout_buffer, "row_uniforms", lambda *arguments: uniforms)
    objective = objective_of(student, teacher, WORDS, rollout=rollout, alpha=alpha, importance_weight=kind, lm_weight=0,
                             normalize_rewards=False, clip_epsilon=None, max_generation_length=3)
    batches = in_batches([(TOY_PROMPT, [WORDS - 1])] * len(TOY_SEQUENCES), 1)
    step = list(next(objective.iter_steps(None, batches, [len(batches)])))
    objective.zero_grad()
    assert [tuple(rollout.drawn.tokens.tolist()) for *_, rollout in step] == TOY_SEQUENCES
    losses = [objective(*arguments).loss_sum / arguments[-1].token_scale for arguments in step]
    sum(chance * loss for chance, loss in zip(chances, losses, strict=True)).backward()
    assert_same(({}, gradients(student)), ({}, right), 1e-11)


def test_two_models_are_enough():
    """Fault: from Python, TeacherStudent needs parts that only a config builds."""
    teacher = Teacher(LanguageModel(network(2), word_tokenizer(SIZE)))
    objective = TeacherStudent(LanguageModel(network(1), word_tokenizer(SIZE)), teacher, penalty=True).train()
    objective.rollouts.config = replace(objective.rollouts.config, max_new_tokens=LENGTH)
    means, gradients, sequences = take_step(objective, in_batches(ROWS, 2))
    assert PARTS | {"frequency_penalty", "diversity_penalty", "entropy_penalty"} < means.keys()
    assert len(sequences) == len(ROWS) and any(gradient.any() for gradient in gradients.values())
