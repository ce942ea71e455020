"""The fixture `demo` is the demo folder of the default settings."""

import csv
import json
import re
import string
from collections import Counter
from itertools import product

import pytest
from transformers import AutoTokenizer

from data import demo_news
from data.demo_news import EVENTS, GENERIC, POOLS
from data.prompts import PromptFormat

TABLES = "teacher_short teacher student_short student_short_noisy student student_noisy validation test".split()
CLEAN = [name for name in TABLES if not name.endswith("_noisy")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "news"
    assert demo_news.main(["--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tables(demo):
    return {name: read_table(demo / f"{name}.csv") for name in TABLES}


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "tokenizer")


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words(text):
    return set(re.findall(r"\w+", text))


def slots_of(template):
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


# -- templates ---------------------------------------------------------------------------------------------------


def all_templates():
    for event in EVENTS.values():
        for wordings in (*event["facts"], *event["highlights"], event["distractors"]):
            yield from wordings
    yield from GENERIC


def test_no_template_starts_with_a_slot():
    """Fault: a value at the start of a line has no space before it: another token, which a small model cannot copy."""
    for template in all_templates():
        before, *_ = template.split("{")
        assert before and template[0].isupper() and template.endswith("."), template
        assert all(template[match.start() - 1] == " " for match in re.finditer("{", template)), template


def test_events_have_their_shape():
    """Fault: a highlight states a value that its key fact does not hold: nobody could learn to write it."""
    assert len(EVENTS) == 8
    for event in EVENTS.values():
        assert [len(wordings) for wordings in event["facts"]] == [3, 3, 3]
        assert [len(wordings) for wordings in event["highlights"]] == [2, 2, 2]
        assert len(event["distractors"]) == 5
        stated = []
        for fact, highlight in zip(event["facts"], event["highlights"], strict=True):
            (slots,) = {tuple(sorted(slots_of(template))) for template in (*fact, *highlight)}
            assert 1 <= len(slots) <= 2 and not set(fact) & set(highlight)
            stated += slots
        assert sorted(stated) == sorted(event["slots"])
        for template in (*event["distractors"], *GENERIC):
            assert set(slots_of(template)) <= set(demo_news.DISTRACTOR_SLOTS), template


def test_pools_do_not_overlap():
    """Fault: a word of two pools, or twice in one: a competing name may then equal a fact by chance."""
    counts = Counter(word for pool in POOLS.values() for word in pool)
    assert [word for word, count in counts.items() if count > 1] == []
    assert POOLS["number"] == [str(number) for number in range(12, 60)]
    # "a {building}" and "{product} made by" need the same article and number for all values.
    assert all(word[0] not in "aeiou" for word in POOLS["building"])
    assert all(word[-1] == "s" for word in POOLS["product"])


# -- rows --------------------------------------------------------------------------------------------------------


def test_tables_have_their_sizes(tables):
    """Fault: rows or columns missing, ids twice, or kinds of news in unequal numbers."""
    sizes = {**demo_news.SIZES, "student_short_noisy": 1000, "student_noisy": 1000}
    assert {name: len(rows) for name, rows in tables.items()} == sizes
    for name, rows in tables.items():
        columns = ["id", "article", "highlights", "category", "facts", *(["noisy"] if name.endswith("_noisy") else [])]
        assert list(rows[0]) == columns and len({row["id"] for row in rows}) == len(rows)
        counts = Counter(row["category"] for row in rows)
        assert set(counts) == set(EVENTS) and max(counts.values()) - min(counts.values()) <= 1


def test_splits_are_disjoint(tables):
    """Fault: a test row whose facts or sentences stand in a training table: its score says nothing."""
    for key in (("article",), ("highlights",), ("category", "facts")):
        holders = {}
        for name in CLEAN:
            for row in tables[name]:
                holders.setdefault(tuple(row[column] for column in key), []).append(row["id"])
        assert [ids for ids in holders.values() if len(ids) > 1] == []
    clean = {(row["category"], row["facts"]) for name in CLEAN for row in tables[name]}
    noise = [(row["category"], row["facts"]) for name in TABLES for row in tables[name] if row.get("noisy") == "1"]
    assert len(noise) == len(set(noise)) and not clean & set(noise)


def test_repeated_content_is_drawn_again(monkeypatch):
    """Fault: with few values two splits, or the noise, hold the same facts: chance alone kept them apart."""
    slots = {**dict.fromkeys(EVENTS["building"]["slots"], "day"), "building": "building"}
    monkeypatch.setattr(demo_news, "EVENTS", {"building": {**EVENTS["building"], "slots": slots}})
    # 360 of the 7 * 6 * 5 * 4 * 11 = 9,240 contents: without care some 7 would come twice.
    tables = demo_news.generate(dict.fromkeys(demo_news.SIZES, 60), noisy_share=0)
    facts = [row["facts"] for name in CLEAN for row in tables[name]]
    assert len(facts) == len(set(facts)) == 360
    left = ["Friday", "bridge", "Monday", "Sunday", "Tuesday"]
    seen = {("building", *content) for content in product(*(POOLS[pool] for pool in slots.values()))}
    seen.remove(("building", *left))
    row = {"article": "", "category": "building", "facts": "", "highlights": ""}
    (noisy,) = demo_news.add_noise([row], 1, "seed", seen)
    assert json.loads(noisy["facts"]) == left


def test_articles_hold_their_facts(tables):
    """Fault: a fact missing from the article or its highlights, or told in its distractors too."""
    for name in CLEAN:
        for row in tables[name]:
            facts = json.loads(row["facts"])
            assert len(facts) == len(set(facts)) == 5
            lines = row["highlights"].split("\n")
            assert len(lines) == 3 and "{" not in row["article"] + row["highlights"]
            for fact in facts:
                assert len(re.findall(rf"\b{fact}\b", row["article"])) == 1, row["id"]
                assert len(re.findall(rf"\b{fact}\b", row["highlights"])) == 1, row["id"]


@pytest.mark.parametrize("name", ["student_noisy", "student_short_noisy"])
def test_noisy_tables(tables, name):
    """Fault: another share of wrong highlights than asked for, right ones among them, or a changed article."""
    noisy = tables[name]
    assert sum(row["noisy"] == "1" for row in noisy) == 0.25 * len(noisy)
    for before, after in zip(tables[name.removesuffix("_noisy")], noisy, strict=True):
        if after["noisy"] == "0":
            assert after == {**before, "noisy": "0"}
            continue
        assert {**after, "highlights": "", "facts": ""} == {**before, "noisy": "1", "highlights": "", "facts": ""}
        facts = json.loads(after["facts"])
        assert all(re.search(rf"\b{fact}\b", after["highlights"]) for fact in facts)
        assert not words(" ".join(facts)) & words(before["article"])


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.29, 29), (1, 100)])
def test_noisy_share_is_exact(share, rows):
    """Fault: a share met on average only, or cut down by rounding (0.29 * 100 is 28.999...)."""
    table = demo_news.generate(dict.fromkeys(demo_news.SIZES, 100), noisy_share=share)["student_noisy"]
    assert sum(row["noisy"] for row in table) == rows


# -- tokenizer ---------------------------------------------------------------------------------------------------


def test_vocabulary(tokenizer):
    """Fault: another size than asked for, GPT-2's end id (outside so small a vocabulary), or ids with a hole."""
    assert len(tokenizer) == 1536 and sorted(tokenizer.get_vocab().values()) == list(range(1536))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end == tokenizer.bos_token_id == tokenizer.eos_token_id < 1536
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    for text in ("The café\nin Zürich — 😀 .", " y is ?", "a  b"):  # no byte unknown, no space cleaned away
        assert tokenizer.decode(tokenizer(text).input_ids) == text and end not in tokenizer(text).input_ids


def test_values_are_one_token(tokenizer):
    """Fault: names or numbers of several tokens: copying fails. Only 13 common words are too rare to be whole."""
    pieces = {pool: [word for word in values if len(tokenizer(f" {word}").input_ids) > 1]
              for pool, values in POOLS.items()}
    assert {pool: len(split) for pool, split in pieces.items() if split} == {"product": 7, "building": 6}


def test_rows_fit_the_context(tables, tokenizer):
    """Fault: rows longer than the demo models' 256 positions are cut, and the figures are those of another task."""
    for name in TABLES:
        texts = [f"{row['article']}\nTL;DR: {row['highlights']}<|endoftext|>" for row in tables[name]]
        assert max(map(len, tokenizer(texts).input_ids)) <= 256
    articles, highlights = ([row[column] for row in tables["test"]] for column in ("article", "highlights"))
    for (ids, boundary), text in zip(
        PromptFormat(tokenizer, max_length=256).training_rows(articles, highlights), highlights, strict=True
    ):
        assert tokenizer.decode(ids[boundary:]) == f" {text}<|endoftext|>"  # whole: nothing was cut


def test_smallest_vocabulary():
    """Fault: a size that cannot hold all bytes gives a tokenizer with unknown characters, without complaint."""
    assert len(demo_news.train_tokenizer(["some text"], 257)) == 257
    with pytest.raises(ValueError, match="vocab_size must be 257 or more, not 256"):
        demo_news.train_tokenizer(["some text"], 256)
