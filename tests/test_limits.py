"""Limits of what is read: files, rows, cells and columns, and the text of which tokens are used."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prompts
from data.prompts import PromptFormat
from tests.conftest import byte_tokenizer
from untrusted.files import check_json_size, load_json, open_regular, read_limited
from utils.evaluation import holds_words

# -- files -----------------------------------------------------------------------------------------------------


def test_limits_are_exact(tmp_path):
    """Fault: a file of the largest size is refused, or a larger one is read."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 0 MB"):
        read_limited(path, 4)
    check_json_size(b"[1,2]", 2)
    with pytest.raises(ValueError, match="more than 1 values"):
        check_json_size(b"[1,2]", 1)
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert load_json(path) == {"a": [1, "é"]}


def test_only_files_are_opened(tmp_path):
    """Fault: a folder, or a link to a device, is opened as a file; a link to a file is not."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "device").symlink_to("/dev/zero")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"
    for name, error in (("device", OSError), ("", IsADirectoryError), ("none", FileNotFoundError)):
        with pytest.raises(error):
            open_regular(tmp_path / name)


# -- tokens ----------------------------------------------------------------------------------------------------


def test_what_no_row_can_hold_is_not_tokenised(monkeypatch):
    """Fault: the tokens of a long article are not those of all of its text; or all of it is tokenised."""
    format_ = PromptFormat(byte_tokenizer(), max_length=40)
    text = "".join(f"word{number} " for number in range(1000))
    seen = []
    encode = format_.encode_articles
    monkeypatch.setattr(format_, "encode_articles", lambda texts: seen.extend(texts) or encode(texts))
    (ids, boundary), = format_.training_rows([text], ["the end"])
    whole = list(text.encode())
    assert ids[:20] == whole[:20] and len(ids) == 40
    assert format_.prediction_prompts([text], 8) == [whole[: 40 - 8 - len(format_.suffix_ids)] + format_.suffix_ids]
    assert boundary == 40 - len(" the end") - 1
    assert max(map(len, seen)) < len(text)


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
