"""Long articles: how much of their text is tokenised; and words found in texts."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from data import prompts
from data.prompts import PromptFormat
from tests.conftest import byte_tokenizer
from utils.evaluation.evaluate import holds_words

# -- tokens ----------------------------------------------------------------------------------------------------


def test_an_article_longer_than_a_row():
    """Fault: the tokens of a long article are not those of its beginning."""
    format_ = PromptFormat(byte_tokenizer(), max_length=40)
    text = "".join(f"word{number} " for number in range(1000))
    (ids, boundary), = format_.training_rows([text], ["the end"])
    whole = list(text.encode())
    assert ids[:20] == whole[:20] and len(ids) == 40
    assert format_.prediction_prompts([text], 8) == [whole[: 40 - 8 - len(format_.suffix_ids)] + format_.suffix_ids]
    assert boundary == 40 - len(" the end") - 1


def test_groups_of_rows_change_nothing(monkeypatch):
    """Fault: rows are lost, repeated or mixed up where tokenising goes on to the next group."""
    format_ = PromptFormat(byte_tokenizer(), max_length=40)
    texts = ["a" * number for number in range(1, 30)]
    highlights = [str(number) for number in range(29)]
    expected = format_.training_rows(texts, highlights), format_.prediction_prompts(texts, 8)
    for size in (1, 7, 50, 100_000):
        monkeypatch.setattr(prompts, "GROUP", size)
        assert (format_.training_rows(texts, highlights), format_.prediction_prompts(texts, 8)) == expected
    assert format_.training_rows([], []) == [] and format_.prediction_prompts([], 8) == []


# -- facts -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text("ab .é", max_size=12), st.text("ab .é", max_size=4))
def test_facts_as_whole_words(text, words):
    """Fault: the quick look changes which facts a text holds."""
    assert holds_words(text, words) == bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))
