"""Whether two tokenizers are one vocabulary: model/vocabulary.py."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from model.language_model import ModelError
from model.vocabulary import shared_vocabulary
from tests.conftest import byte_tokenizer

END = "<|endoftext|>"


def tokenizer_of(*words: str, **special) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the places of the words; end-of-text is the last."""
    vocabulary = {word: index for index, word in enumerate((*words, END))}
    model = models.WordLevel(vocabulary, unk_token=END)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=END, unk_token=END, **special)


def with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a pad token added behind all others."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def test_equal_vocabularies():
    """Fault: Two copies of one tokenizer are refused, or the number of tokens is not theirs."""
    assert shared_vocabulary(byte_tokenizer(), byte_tokenizer()) == 257
    assert shared_vocabulary(tokenizer_of("a", "b"), tokenizer_of("a", "b")) == 3


def test_end_of_text_that_also_pads_is_a_real_token():
    """Fault: End-of-text is left out where it is the last id and pads, as in GPT-2: it is never distilled."""
    teacher, student = byte_tokenizer(), byte_tokenizer()
    student.pad_token = student.eos_token
    assert student.pad_token_id == student.eos_token_id == 256
    assert shared_vocabulary(teacher, student) == shared_vocabulary(student, teacher) == 257


def test_added_pad_token_is_left_out():
    """Fault: A [PAD] that one side or both have added counts as a token of the vocabulary (A7, A13)."""
    plain, padded = byte_tokenizer(), with_pad(byte_tokenizer())
    assert padded.pad_token_id == 257
    assert shared_vocabulary(plain, padded) == shared_vocabulary(padded, plain) == 257
    assert shared_vocabulary(padded, with_pad(byte_tokenizer())) == 257


def test_pad_token_of_another_name():
    """Fault: Two sides that have each added a pad token of their own are refused."""
    other = byte_tokenizer()
    other.add_special_tokens({"pad_token": "<pad>"})
    assert shared_vocabulary(with_pad(byte_tokenizer()), other) == 257


def refusal(teacher, student) -> str:
    with pytest.raises(ModelError) as error:
        shared_vocabulary(teacher, student)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_other_string_at_one_id():
    """Fault: Vocabularies of one size are taken for the same, or the message does not say where they differ (A7)."""
    message = refusal(tokenizer_of("a", "b", "c"), tokenizer_of("a", "B", "c"))
    assert "(4 and 4 tokens; the first that differs has id 1: 'b' and 'B')" in message
    assert "(4 and 4 tokens; the first that differs has id 0: 'a' and 'b')" in refusal(  # the same strings, exchanged
        tokenizer_of("a", "b", "c"), tokenizer_of("b", "a", "c"))


def test_one_side_is_longer_by_a_real_token():
    """Fault: Tokens that only one model knows are cut off as if they were padding (A7)."""
    plain, longer = byte_tokenizer(), byte_tokenizer()
    longer.add_tokens(["news"])
    assert "(257 and 258 tokens; the first that differs has id 257: none and 'news')" in refusal(plain, longer)
    assert "(258 and 257 tokens; the first that differs has id 257: 'news' and none)" in refusal(longer, plain)


def test_pad_token_before_a_real_token():
    """Fault: A pad token in the middle is left out, so that the ids behind it are no longer the same rows."""
    plain, longer = byte_tokenizer(), with_pad(byte_tokenizer())
    longer.add_tokens(["news"])
    assert "(257 and 259 tokens; the first that differs has id 257: none and '[PAD]')" in refusal(plain, longer)


def test_longer_by_a_real_token_and_a_pad_token():
    """Fault: A pad token behind a real one that only one side has hides that one."""
    longer = byte_tokenizer()
    longer.add_tokens(["news"])
    assert "257: none and 'news'" in refusal(byte_tokenizer(), with_pad(longer))
