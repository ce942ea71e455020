"""KV caches and the decoding loop against plain forward passes: model/decoding/, model/gpt2/kv_cache.py."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import model.gpt2.cuda_graph
import model.gpt2.kv_cache
from model.decoding.kv_cache import BatchKVCache, PerRowKVCaches, make_kv_cache
from model.decoding.loop import decode, make_decoder
from model.gpt2.cuda_graph import StepGraphs, round_up
from model.gpt2.kv_cache import GPT2KVCache
from model.language_model import LanguageModel
from tests.conftest import END, byte_tokenizer
from tests.model.test_decoding import random_prompts
from tests.model.test_families import tiny_family

WINDOW = 5  # tokens; shorter than the rows of these tests
GEMMA2 = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = [
    ("GPT2", GPT2KVCache, {}),
    ("Llama", BatchKVCache, {}),
    ("GPTNeoX", BatchKVCache, {}),
    ("Mistral", BatchKVCache, {"sliding_window": WINDOW}),
    ("Gemma2", BatchKVCache, GEMMA2),
    ("Bloom", PerRowKVCaches, {}),
]


def alone(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Hidden states [T, D] of one row: one forward pass, without cache, padding or neighbours."""
    return model.model.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]


def gpt2(seed: int = 0, **changes) -> LanguageModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 257, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
    config = GPT2Config(**{**sizes, "bos_token_id": END, "eos_token_id": END, **changes})
    return LanguageModel(GPT2LMHeadModel(config), byte_tokenizer()).eval()


class Rows:
    """Rows in slots as the loop uses them, with the ids of each, to be compared with the rows alone."""

    def __init__(self, model: LanguageModel, kind, count: int, room: int, seed: int = 0):
        self.model, self.slots, self.count, self.room = model, kind(model, count, room), count, room
        self.random, self.live, self.compared = random.Random(seed), [], 0

    def compare(self, hidden: torch.Tensor, rows: list[list[int]], tolerance: float) -> None:
        assert len(hidden) == len(rows)
        for state, row in zip(hidden, rows, strict=True):
            torch.testing.assert_close(state, alone(self.model, row)[-1], rtol=0, atol=tolerance)
            self.compared += 1

    def prefill(self, lengths: list[int], tolerance: float) -> None:
        new = [[self.random.randrange(257) for _ in range(length)] for length in lengths]
        self.live += [list(row) for row in new]
        self.compare(self.slots.prefill(new), new, tolerance)

    def step(self, tolerance: float) -> None:
        tokens = [self.random.randrange(257) for _ in self.live]
        for row, token in zip(self.live, tokens, strict=True):
            row.append(token)
        self.compare(self.slots.step(torch.tensor(tokens)), self.live, tolerance)

    def end(self, slot: int) -> None:
        last = len(self.live) - 1
        if slot != last:
            self.slots.move(last, slot)
        self.slots.drop()
        self.live[slot] = self.live[last]
        self.live.pop()


def long_run(model: LanguageModel, kind, tolerance: float, seed: int = 0) -> None:
    """Rows come, continue and leave by chance; each hidden state is compared with the row alone."""
    rows = Rows(model, kind, 4, 24, seed)
    rows.prefill([20, 3, 1, 11], tolerance)
    for _ in range(8):
        for _ in range(rows.random.randint(1, 4)):
            for slot in reversed(range(len(rows.live))):
                if len(rows.live[slot]) == rows.room or rows.random.random() < 0.15:
                    rows.end(slot)
            if rows.live:
                rows.step(tolerance)
        free = rows.count - len(rows.live)
        if free:
            rows.prefill([rows.random.choice([1, 2, 7, 19]) for _ in range(rows.random.randint(1, free))], tolerance)
    assert rows.compared > 50


@pytest.mark.parametrize(("name", "kind", "changes"), KINDS)
@torch.no_grad()
def test_rows_in_slots_equal_rows_alone(name, kind, changes):
    """Fault: wrong positions or masks, a window in the wrong place, or a row that moved or came later sees another."""
    model = tiny_family(name, **changes).eval().double()
    assert type(make_kv_cache(model, 2, 16)) is kind
    long_run(model, kind, 1e-6 if name in ("Bloom", "Gemma2") else 1e-10)  # these two take the softmax in float32


@pytest.mark.parametrize("changes", [
    {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"activation_function": "relu"},
    {"n_inner": 24}, {"layer_norm_epsilon": 0.1}, {"n_layer": 1},
], ids=str)
@torch.no_grad()
def test_variants_of_gpt2(changes):
    """Fault: a step is computed with plain GPT-2's scale of attention, activation, width or norm."""
    language_model = gpt2(**changes).double()
    rows = Rows(language_model, GPT2KVCache, 3, 16)
    rows.prefill([9, 2], 1e-10)
    rows.step(1e-10)
    rows.prefill([4], 1e-10)
    for _ in range(3):
        rows.step(1e-10)


class Recomputed(StepGraphs):
    """On a CPU: a replay computes again, into the same place."""

    def capture(self, step, keys: int):
        hidden = step(self.tokens, keys).clone()
        return SimpleNamespace(replay=lambda: hidden.copy_(step(self.tokens, keys))), hidden


def replayed(model: LanguageModel, count: int, room: int) -> GPT2KVCache:
    slots = GPT2KVCache(model, count, round_up(room))
    slots.max_length, slots.graphs = room, Recomputed(count, model.device)
    return slots


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_replayed_steps_equal_rows_alone(seed, monkeypatch):
    """Fault: a recorded step sees the tokens, lengths or keys of when it was recorded, or of a free slot."""
    monkeypatch.setattr(model.gpt2.cuda_graph, "KEYS", 8)
    language_model = gpt2(seed).double()
    long_run(language_model, replayed, 1e-10, seed)
    slots = replayed(language_model, 2, 8)
    slots.prefill([[1, 2, 3], [4, 5, 6, 7]])
    first = slots.step(torch.tensor([8, 9]))
    kept = first.clone()
    slots.step(torch.tensor([10, 11]))
    assert torch.equal(first, kept)  # a replay must not change what was handed out


@torch.no_grad()
def test_kinds_that_would_be_wrong_are_not_chosen():
    """Fault: GPT-2 with attention in another order, or an eager Llama, which adds its mask, runs in wrong slots."""
    eager = tiny_family("Llama")
    eager.model.set_attn_implementation("eager")
    for language_model in (gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True), eager.eval()):
        kind = type(make_kv_cache(language_model, 2, 16))
        assert kind is not GPT2KVCache
        long_run(language_model, kind, 1e-4)
    assert kind is BatchKVCache  # an eager model need not decode row by row


@pytest.fixture
def memory_of_nan():
    """Memory that nobody has written is NaN, as it may be."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "kind", "changes"), KINDS[:5])
@torch.no_grad()
def test_room_that_is_not_written(name, kind, changes, memory_of_nan):
    """Fault: a short row beside a long one multiplies unwritten memory by 0, and NaN comes out."""
    rows = Rows(tiny_family(name, **changes).eval(), kind, 3, 24)
    rows.prefill([1, 19], 1e-5)
    rows.step(1e-5)
    rows.prefill([2], 1e-5)
    rows.step(1e-5)


@torch.no_grad()
def test_more_prompts_than_are_read_together(monkeypatch):
    """Fault: groups of prompts lose or change rows, or write over the slots of the group before."""
    monkeypatch.setattr(model.gpt2.kv_cache, "PREFILL_TOKENS", 10)
    rows = Rows(gpt2(), GPT2KVCache, 12, 20)
    for lengths in ([4, 6, 1, 15, 10, 3], [3, 3, 3, 9]):
        rows.prefill(lengths, 1e-5)
        rows.step(1e-5)


@pytest.mark.parametrize(("name", "kind", "changes"), KINDS)
@torch.no_grad()
def test_bfloat16_autocast(name, kind, changes):
    """Fault: types of cache, mask and weights that do not fit under autocast, or results far from float32's."""
    model = tiny_family(name, **changes, initializer_range=0.1).eval()
    prompts, tokens = random_prompts([9, 3]), torch.tensor([4, 5])
    with torch.autocast("cpu", torch.bfloat16):
        slots = make_kv_cache(model, 3, 16)
        assert type(slots) is kind
        hidden = [slots.prefill(prompts), slots.step(tokens), slots.prefill([[7, 8]]), slots.step(torch.arange(3))]
    first, second = prompts
    rows = [prompts, [[*first, 4], [*second, 5]], [[7, 8]], [[*first, 4, 0], [*second, 5, 1], [7, 8, 2]]]
    for states, expected in zip(hidden, rows, strict=True):
        exact = torch.stack([alone(model, row)[-1] for row in expected])
        assert states.isfinite().all()
        assert (states.float() - exact).abs().max() < 0.06 * exact.abs().max()


# Prompt lengths and the continuation's length with its end-of-text (None: none within MOST tokens).
MOST = 6
PLAN = [(3, 1), (14, None), (1, 4), (7, 1), (7, 1), (2, None), (11, 6), (5, 2), (9, 5), (4, 1)]


@pytest.mark.parametrize(("slots", "check_every"), [(1, 3), (3, None), (3, 1), (40, 3)])
@torch.no_grad()
def test_the_loop_shows_each_row_its_own_states(slots, check_every):
    """Fault: rows, places, tokens and hidden states of the slots do not belong together once rows have left."""
    prompts = random_prompts([length for length, _ in PLAN])
    chosen, right = random_prompts([MOST] * len(PLAN), seed=1), []
    for row, (_, end) in enumerate(PLAN):
        if end is not None:
            chosen[row][end - 1] = END
        right.append(chosen[row][:end])
    models = [gpt2(1), gpt2(2, n_embd=16, n_layer=1)]  # of different widths and depths, reading the same tokens
    seen, reports = set(), []

    def next_token(rows, positions, hidden):
        for index, (row, place) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            assert 0 <= place < MOST
            if place < len(right[row]):
                assert (row, place) not in seen
                seen.add((row, place))
                for model, states in zip(models, hidden, strict=True):
                    expected = alone(model, prompts[row] + chosen[row][:place])[-1]
                    torch.testing.assert_close(states[index], expected, rtol=0, atol=1e-5)
        return torch.tensor(chosen)[rows, positions]

    decoders = [make_decoder(model) for model in models]
    made = decode(decoders, prompts, MOST, slots, [END], next_token, lambda *report: reports.append(report),
                  check_every)
    assert made == right
    assert seen == {(row, place) for row, tokens in enumerate(right) for place in range(len(tokens))}
    assert sum(rows for rows, _ in reports) == len(prompts)
    assert sum(tokens for _, tokens in reports) == sum(map(len, right))


@torch.no_grad()
def test_little_to_do():
    """Fault: no prompt, no token or a single one is decoded wrongly."""
    def next_token(rows, positions, hidden):
        return rows + 10

    decoders = [make_decoder(gpt2())]
    assert decode(decoders, [], 5, 3, [END], next_token) == []
    assert decode(decoders, [[1], [2, 3]], 0, 3, [END], next_token) == [[], []]
    assert decode(decoders, [[1], [2, 3, 4], [5, 6]], 1, 2, [END], next_token) == [[10], [11], [12]]
