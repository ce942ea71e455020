"""Which rows make which step, their order, resuming, and collation (A12, A17, A20)."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.articles import read_articles
from data.batches import collate, evaluation_batches, load_batches, plan_epoch
from data.prompts import PromptFormat
from data.tokenized import open_token_table
from tests.conftest import END, byte_tokenizer, write_rows

SHAPES = [(1, 8), (2, 4), (4, 2), (8, 1)]  # batch size, accumulation


def lengths_of(count, seed=0, longest=1000):
    return np.random.default_rng(seed).integers(3, longest + 1, count)


def as_lists(plan):
    return [[batch.tolist() for batch in step] for step in plan]


def rows_of_steps(plan):
    return [sorted(row for batch in step for row in batch.tolist()) for step in plan]


def padding_share(batches, lengths):
    """Padding tokens over all tokens of the batches."""
    size = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - sum(int(lengths[rows].sum()) for rows in batches) / size


# -- the plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_batch", [None, 700])
@pytest.mark.parametrize("count", [5, 8, 300, 1003])
def test_steps_hold_the_same_rows_however_they_are_cut(count, tokens_per_batch):
    """Another step, and other weights, for 1 x 8 than for 8 x 1 (A17)."""
    lengths = lengths_of(count)
    expected = rows_of_steps(plan_epoch(lengths, 8, 1, seed=3, epoch=2))
    for batch_size, accumulation in SHAPES:
        plan = plan_epoch(lengths, batch_size, accumulation, 3, 2, tokens_per_batch)
        assert rows_of_steps(plan) == expected
        if tokens_per_batch is None:
            assert all(len(batch) <= batch_size for step in plan for batch in step)
            assert all(len(step) <= accumulation for step in plan)


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(0, 700),
    batch_size=st.integers(1, 40),
    accumulation=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 50),
    tokens_per_batch=st.none() | st.integers(1, 5000),
)
def test_every_row_comes_exactly_once(count, batch_size, accumulation, seed, epoch, tokens_per_batch):
    """Rows lost at the end of a window or of the epoch, or taken twice; steps of the wrong size (A17)."""
    lengths = lengths_of(count, seed)
    plan = plan_epoch(lengths, batch_size, accumulation, seed, epoch, tokens_per_batch)
    per_step = batch_size * accumulation
    sizes = [len(rows) for rows in rows_of_steps(plan)]
    assert sorted(row for rows in rows_of_steps(plan) for row in rows) == list(range(count))
    assert sizes == [per_step] * (count // per_step) + [count % per_step] * (count % per_step > 0)
    for rows in (batch for step in plan for batch in step):
        assert len(rows) > 0
        if tokens_per_batch is not None and len(rows) > 1:
            assert len(rows) * lengths[rows].max() <= tokens_per_batch


@pytest.mark.parametrize("count", [40, 200, 2000])
def test_each_epoch_has_an_order_of_its_own(count):
    """The order of epoch 0 in every epoch (A20); rows that meet the same others each time, their lengths deciding."""
    lengths = lengths_of(count)
    plans = [plan_epoch(lengths, 4, 2, seed=7, epoch=epoch) for epoch in range(4)]
    assert len({str(as_lists(plan)) for plan in plans}) == 4
    companions = [{tuple(rows) for rows in rows_of_steps(plan)} for plan in plans]
    assert not companions[0] & companions[1]


@pytest.mark.parametrize("tokens_per_batch", [None, 900])
def test_a_fresh_plan_continues_where_the_first_one_stopped(tokens_per_batch):
    """Other rows after a resume: an order that hangs on random numbers drawn meanwhile (A20)."""
    lengths = lengths_of(67)
    for epoch in range(3):
        whole = as_lists(plan_epoch(lengths, 2, 4, 1234, epoch, tokens_per_batch))
        for done in range(len(whole) + 1):
            random.seed(done)
            np.random.seed(done)
            torch.manual_seed(done)
            assert as_lists(plan_epoch(lengths.copy(), 2, 4, 1234, epoch, tokens_per_batch)[done:]) == whole[done:]


def test_the_budget_holds_but_for_single_rows():
    """A batch over the token budget; a row over it that is dropped or never ends the loop."""
    lengths = np.array([10, 20, 30, 100, 40, 5, 7, 250])
    plan = plan_epoch(lengths, 8, 1, seed=0, epoch=0, tokens_per_batch=100)
    cut = [sorted(lengths[rows].tolist()) for rows in plan[0]]
    assert cut == [[250], [100], [30, 40], [5, 7, 10, 20]]


@pytest.mark.parametrize(("limit", "sizes"), [
    (1, [1]), (4, [4]), (6, [4, 2]), (8, [4, 4]), (9, [4, 4, 1]), (1000, [4, 4, 1]), (None, [4, 4, 1])])
def test_a_bound_on_micro_batches(limit, sizes):
    """`ckpt_training_batch` off by one, or a step that it cuts left out."""
    lengths = lengths_of(18)  # 2 x 4: steps of 8, 8 and 2 rows
    plan = plan_epoch(lengths, 2, 4, 1, 0, max_micro_batches=limit)
    assert [len(step) for step in plan] == sizes
    whole = [batch for step in as_lists(plan_epoch(lengths, 2, 4, 1, 0)) for batch in step]
    assert [batch for step in as_lists(plan) for batch in step] == whole[:limit]


def test_evaluation_takes_every_row_the_longest_first():
    """Rows left out of a validation loss."""
    lengths = lengths_of(21)
    batches = evaluation_batches(lengths, 8)
    assert [len(rows) for rows in batches] == [8, 8, 5]
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(21))
    assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)


def test_little_padding_on_real_lengths(shared):
    """Buckets that save nothing: random batches of CNN/DailyMail are a fifth padding and more."""
    articles, _ = read_articles(shared / "data" / "cnn_dm_train.csv")
    words = np.array([row.article.count(" ") + row.highlights.count(" ") for row in articles])
    lengths = np.minimum(1024, words * 5 // 4)  # about as many as GPT-2's tokens
    order = np.random.default_rng(0).permutation(len(lengths))
    assert padding_share([order[start : start + 8] for start in range(0, len(order), 8)], lengths) > 0.15
    for epoch in range(3):
        batches = [rows for step in plan_epoch(lengths, 8, 1, 1, epoch) for rows in step]
        assert padding_share(batches, lengths) < 0.05


# -- collation --------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """What collation asks of a token table, in memory."""

    rows: list  # of (ids, prompt length)

    @property
    def lengths(self):
        return np.array([len(ids) for ids, _ in self.rows])

    @property
    def prompt_lengths(self):
        return np.array([length for _, length in self.rows])

    def ids(self, row):
        return np.array(self.rows[row][0], dtype=np.uint16)


@pytest.mark.parametrize(("rows", "input_ids", "mask", "labels"), [
    ([([81, 58, 111, 107, END], 2), ([81, 58, 110, 111, 33, END], 2)],
     [[81, 58, 111, 107, 256, 256], [81, 58, 110, 111, 33, 256]], [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
     [[-100, -100, 111, 107, 256, -100], [-100, -100, 110, 111, 33, 256]]),
    ([([END, 81, 111, END], 2), ([END, 81, 82, 111, END], 3)],  # an end-of-text in the prompt
     [[256, 81, 111, 256, 256], [256, 81, 82, 111, 256]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
     [[-100, -100, 111, 256, -100], [-100, -100, -100, 111, 256]]),
])
def test_the_case_where_padding_is_the_end(rows, input_ids, mask, labels):
    """The end of the summary, or a begin-of-text, masked because its id is that of the padding; padding learnt or
    attended to (A12)."""
    batch = collate(Rows(rows), np.array([0, 1]), END)
    assert [batch[key].tolist() for key in ("input_ids", "attention_mask", "labels")] == [input_ids, mask, labels]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


some_rows = st.lists(
    st.lists(st.integers(0, END), min_size=2, max_size=12).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids) - 1))
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=80)
@given(rows=some_rows, pad_id=st.integers(0, END), data=st.data())
def test_collation_is_that_of_the_plain_way(rows, pad_id, data):
    """Any row shifted, cut or masked wrongly: against torch's own padding of lists."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    batch = collate(Rows(rows), np.array(chosen), pad_id)
    ids = [torch.tensor(rows[row][0]) for row in chosen]
    labels = [torch.tensor([-100] * rows[row][1] + rows[row][0][rows[row][1] :]) for row in chosen]

    def pad(tensors, value):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    assert torch.equal(batch["input_ids"], pad(ids, pad_id))
    assert torch.equal(batch["labels"], pad(labels, -100))
    assert torch.equal(batch["attention_mask"], pad([torch.ones_like(row) for row in ids], 0))


# -- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A real table of 40 rows."""
    rows = [{"id": str(n), "article": "x" * (1 + n * 7 % 50), "highlights": "y" * (1 + n % 9)} for n in range(40)]
    return open_token_table(
        write_rows(tmp_path / "news.csv", rows), PromptFormat(byte_tokenizer(), max_length=128), tmp_path / "cache"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaded_batches_are_the_collated_ones_in_order(table, num_workers):
    """Worker processes that change the order or content of the batches; dropout that differs after a resume, or with
    validation, because a loader drew its seed from the global generators (A20)."""
    batches = [rows for step in plan_epoch(table.lengths, 4, 2, 1, 0) for rows in step]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loaded = list(load_batches(table, batches, END, num_workers))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for batch, rows in zip(loaded, batches, strict=True):
        assert np.array_equal(batch.pop("rows"), rows)
        expected = collate(table, rows, END)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
