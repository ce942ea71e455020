"""The share of a table's facts that the generated texts hold."""

import json

import pytest

from data.articles import Article
from utils.evaluation.evaluate import scored_predictions


def facts_of(*rows: tuple[str, str]) -> float | None:
    """`facts` of scores.json; rows: (text, the cell `facts`)."""
    articles = [Article(number, number, str(number), "a", "b", {"facts": cell}) for number, (_, cell) in
                enumerate(rows, 1)]
    return scored_predictions(articles, [text for text, _ in rows])[1].get("facts")


def test_whole_words_count():
    """Fault: "12" is found in "120", or the share is a mean over rows instead of facts."""
    assert facts_of(("120 people in Ashford, it said", json.dumps(["12", "Ashford", "120 people"])),
                    ("none", json.dumps(["Monday"]))) == 2 / 4


@pytest.mark.parametrize("cell", ["", "{}", '{"a": "b"}', '"abc"', "[1, 2]", "[[]]", "not JSON", "3", "[]", "[" * 9999])
def test_something_else_is_no_score(cell):
    """Fault: a column that happens to be named facts is scored by its letters or keys."""
    assert facts_of(("abc 12", cell)) is None
