"""The fixture `demo` is the demo folder of the default settings."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from data import demo_news
from data.demo_news import POOLS
from data.prompts import PromptFormat
from tests.conftest import ROOT

TABLES = "teacher_short teacher student_short student_short_noisy student student_noisy validation test".split()
CLEAN = [name for name in TABLES if not name.endswith("_noisy")]
KNOWN = {  # table: the beginning of its SHA-256
    "student": "ec6d2fcc9e9fa959", "student_noisy": "a4ba61f896e758a9", "student_short": "d033365754ce17d0",
    "student_short_noisy": "0185a5e149a2a2c2", "teacher": "c4eb1674370388dc", "teacher_short": "8d0ab1b928c923e1",
    "test": "b52c6ae9c34db8d5", "validation": "b90d47e14d78483f",
}


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


def contents(folder):
    """{path: bytes, or None for a folder} of all that lies below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_same_seed_same_bytes(demo, tmp_path):
    """Fault: other rows or another tokenizer in another process (hash order, threads), or with a locale of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TOKENIZERS_PARALLELISM": "false", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-m", "data.demo_news", "--output_dir", tmp_path / "news"], cwd=ROOT,
                   env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "news") == contents(demo)
    # The rows of the measured figures (benchmarks/RESULTS.md): raise VERSION and measure again if they change.
    assert {name: hashlib.sha256((demo / f"{name}.csv").read_bytes()).hexdigest()[:16] for name in KNOWN} == KNOWN


# -- rows --------------------------------------------------------------------------------------------------------


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


def test_articles_hold_their_facts(tables):
    """Fault: a fact missing from the article or its highlights, or stated in its distractors too."""
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
        longest = sorted(texts, key=len)[-200:]
        assert max(map(len, tokenizer(longest).input_ids)) <= 256
    articles, highlights = ([row[column] for row in tables["test"]] for column in ("article", "highlights"))
    for (ids, boundary), text in zip(
        PromptFormat(tokenizer, max_length=256).training_rows(articles, highlights), highlights, strict=True
    ):
        assert tokenizer.decode(ids[boundary:]) == f" {text}<|endoftext|>"  # whole: nothing was cut
