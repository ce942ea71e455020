"""Whether two tokenizers are one vocabulary: model/vocabulary.py."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from model.errors import ModelError
from model.vocabulary import shared_vocabulary
from tests.conftest import byte_tokenizer

END = "<|endoftext|>"


def tokenizer_of(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the positions of the words; end-of-text is the last."""
    model = models.WordLevel({word: index for index, word in enumerate((*words, END))}, unk_token=END)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=END, unk_token=END)


def with_added(*tokens: str, pad: str | None = None) -> PreTrainedTokenizerFast:
    """The byte tokenizer with tokens, then a pad token, added behind its own 257."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*tokens])
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


@pytest.mark.parametrize(("one", "other", "size"), [
    (byte_tokenizer(), byte_tokenizer(), 257),
    (tokenizer_of("a", "b"), tokenizer_of("a", "b"), 3),
    (byte_tokenizer(), with_added(pad=END), 257),  # end-of-text, the last id, also pads, as in GPT-2
    (byte_tokenizer(), with_added(pad="[PAD]"), 257),
    (with_added(pad="[PAD]"), with_added(pad="[PAD]"), 257),
    (with_added(pad="[PAD]"), with_added(pad="<pad>"), 257),
])
def test_the_same_vocabulary(one, other, size):
    """Fault: copies of one tokenizer, or an added pad token, are refused; or the pad token counts (A7, A13)."""
    assert shared_vocabulary(one, other) == shared_vocabulary(other, one) == size


PAD_INSIDE = with_added(pad="[PAD]")
PAD_INSIDE.add_tokens(["news"])


@pytest.mark.parametrize(("teacher", "student", "message"), [
    (tokenizer_of("a", "b", "c"), tokenizer_of("a", "B", "c"), "(4 and 4 tokens; * has id 1: 'b' and 'B')"),
    (tokenizer_of("a", "b", "c"), tokenizer_of("b", "a", "c"), "(4 and 4 tokens; * has id 0: 'a' and 'b')"),
    (byte_tokenizer(), with_added("news"), "(257 and 258 tokens; * has id 257: none and 'news')"),
    (with_added("news"), byte_tokenizer(), "(258 and 257 tokens; * has id 257: 'news' and none)"),
    (byte_tokenizer(), PAD_INSIDE, "(257 and 259 tokens; * has id 257: none and '[PAD]')"),
    (byte_tokenizer(), with_added("news", pad="[PAD]"), "(257 and 258 tokens; * has id 257: none and 'news')"),
])
def test_other_vocabularies_are_refused(teacher, student, message):
    """Fault: tokens that only one model has are cut off as if they were padding, or ids mean other strings (A7)."""
    with pytest.raises(ModelError) as error:
        shared_vocabulary(teacher, student)
    assert message.replace("*", "the first that differs") in str(error.value) and "\n" not in str(error.value)
