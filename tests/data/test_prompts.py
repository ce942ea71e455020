"""Article and highlights -> token ids: truncation, the seam, special tokens, decoding (A12, A15, A16, A24)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.articles import DataError
from data.prompts import PromptFormat, RowTooLong
from tests.conftest import END, SHARED, byte_tokenizer

CASE_TEMPLATE = "{article} TL;DR: "
SEPARATOR = list(b" TL;DR: ")
TEMPLATES = [CASE_TEMPLATE, "{article} TL;DR:", "{article}", "Sum up.\n{article}\n\nSummary:\n"]
BYTES = byte_tokenizer()
some_texts = st.text(max_size=80)


def formats_of(tokenizer) -> dict[str, PromptFormat]:
    return {template: PromptFormat(tokenizer, template, 64) for template in TEMPLATES}


@pytest.fixture(scope="module")
def gpt2() -> dict[str, PromptFormat]:
    """Formats of GPT-2's own vocabulary."""
    folder = SHARED / "data" / "gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip("GPT-2's vocabulary is not here (folder shared/data beside the project)")
    return formats_of(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module", params=["bytes", "gpt2"])
def formats(request) -> dict[str, PromptFormat]:
    return formats_of(BYTES) if request.param == "bytes" else request.getfixturevalue("gpt2")


def case_format(max_length=128, tokenizer=BYTES) -> PromptFormat:
    return PromptFormat(tokenizer, CASE_TEMPLATE, max_length)


def training_row(prompt_format, article, highlights):
    (row,) = prompt_format.training_rows([article], [highlights])
    return row


def refusal(function) -> str:
    """The one-line message of the DataError that a call raises."""
    with pytest.raises(DataError) as caught:
        function()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def tokenizer_that_begins_texts() -> PreTrainedTokenizerFast:
    """A byte tokenizer that puts its begin-of-text before every text, as Llama's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    assert tokenizer("a").input_ids == [END, 97]
    return tokenizer


# -- A15: articles longer than the window ------------------------------------------------------------------------


@pytest.mark.parametrize(("article", "length", "kept"), [
    ("C" * 108, 127, 108), ("C" * 109, 128, 109), ("C" * 110, 128, 109), ("start" + "C" * 500, 128, 109),
], ids=["127", "128", "129", "long"])
def test_rows_about_as_long_as_the_window(article, length, kept):
    """Right truncation that removes the summary, a row longer than the context, or off by one at the edge (A15)."""
    ids, boundary = training_row(case_format(), article, "0123456789")
    assert ids == [*article[:kept].encode(), *SEPARATOR, *b"0123456789", END]
    assert (len(ids), boundary) == (length, kept + 8)


def test_prompts_about_as_long_as_the_window():
    """Off by one at the edge of a prompt that shares the window with new tokens; a separator cut with the article; a
    negative slice that hands the model a prompt and an answer that do not fit (A15)."""
    for characters in (99, 100, 101, 500):
        (prompt,) = case_format().prediction_prompts(["C" * characters], 20)
        assert prompt == list(b"C" * min(characters, 100)) + SEPARATOR
    assert case_format().prediction_prompts(["C" * 500], 119) == [[ord("C"), *SEPARATOR]]
    for max_new_tokens in (120, 128, 500):  # at most 128 - 8 of the separator - 1 of the article
        message = refusal(lambda count=max_new_tokens: case_format().prediction_prompts(["C" * 500], count))
        assert f"max_generation_length is {max_new_tokens}" in message and "at most 119" in message


def words_and_no_more() -> PreTrainedTokenizerFast:
    """One token a word, whatever its length; none for white space."""
    words = Tokenizer(models.WordLevel({"<|e|>": 0, "a": 1, "b": 2, "TL": 3}, unk_token="<|e|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|e|>")


@pytest.mark.parametrize("article", [
    "wordlongerthanany " * 40, "a" + " " * 1000 + "b " * 40, "a " * 19 + " " * 150 + "x" * 5000 + " b", "b" * 9000,
], ids=["long words", "white space", "at the edge", "one word"])
def test_tokens_of_many_characters(article):
    """An article is cut by its characters before it has filled the row, or in a word whose token is used."""
    prompt_format = PromptFormat(words_and_no_more(), "{article} TL", 20)
    ids = prompt_format.tokenizer(article).input_ids
    first, second = prompt_format.prediction_prompts(["a b", article], 5)
    assert (first, second) == ([1, 2, 3], [*ids[:14], 3])
    assert training_row(prompt_format, article, "a") == ([*ids[:17], 3, 1, 0], len(ids[:17]) + 1)


def test_the_longest_highlights_that_fit():
    """Off by one if highlights leave room for exactly one article token (1 + 8 + 118 + 1 = 128); a negative slice, or
    highlights cut without a word (A15)."""
    for characters in (117, 118):
        ids, boundary = training_row(case_format(), "xyz", "s" * characters)
        assert len(ids) - boundary == characters + 1 and ids[0] == ord("x")
    for characters in (119, 500):
        row = training_row(case_format(), "xyz", "s" * characters)
        assert isinstance(row, RowTooLong) and len(str(row).splitlines()) == 1
        assert f"highlights of {characters} tokens" in str(row) and "128 tokens" in str(row)


# -- A16: the seam between prompt and summary ------------------------------------------------------------------


def test_token_ids_of_gpt2(gpt2):
    """A boundary that loses the first summary token, or tokens at the seam that prediction never sees; "He is a fire" +
    "fighter" joined into one word in training alone; signs of other families taken for special tokens of GPT-2 (A16);
    a start token that the model never saw: GPT-2 has one but does not add it."""
    row = training_row(gpt2["{article} TL;DR:"], "Article text.", "The cat sat.")
    assert row == ([14906, 2420, 13, 24811, 26, 7707, 25, 383, 3797, 3332, 13, 50256], 7)
    row = training_row(gpt2[CASE_TEMPLATE], "Article text.", "The cat sat.")
    assert row == ([14906, 2420, 13, 24811, 26, 7707, 25, 220, 464, 3797, 3332, 13, 50256], 8)
    tokenizer = gpt2["{article}"].tokenizer
    prompt_format = PromptFormat(tokenizer, "{article}fighter\n")
    (prompt,) = prompt_format.prediction_prompts(["He is a fire"], 10)
    ids, boundary = training_row(prompt_format, "He is a fire", "x")
    assert 43105 in prompt and prompt == ids[:boundary] == tokenizer("He is a firefighter\n").input_ids
    end, start, plain = gpt2["{article}"].prediction_prompts(["</s>", "<|startoftext|>", "He"], 8)
    assert (end, len(start), plain) == ([3556, 82, 29], 7, [1544])
    assert tokenizer.bos_token_id == 50256


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_prompt_is_the_beginning_of_its_training_row(formats, data):
    """Prediction that begins otherwise than training did, for any text (A16), also with GPT-2's merges, which join
    letters across a seam that is not kept; text that does not come back (A24)."""
    prompt_format = formats[data.draw(st.sampled_from(TEMPLATES))]
    article, highlights = data.draw(some_texts), data.draw(some_texts)
    row = training_row(prompt_format, article, highlights)
    if isinstance(row, RowTooLong):
        return
    ids, boundary = row
    labels = ids[boundary:]
    assert len(ids) <= prompt_format.max_length
    assert labels[-1] == prompt_format.end_id
    assert prompt_format.decode(labels) == highlights.strip()
    # As many new tokens as there are labels: the same room, so the same cut.
    assert prompt_format.prediction_prompts([article], len(labels)) == [ids[:boundary]]


# -- A12: special tokens ----------------------------------------------------------------------------------------


def test_end_of_text_inside_a_text_is_plain_text(formats):
    """An article that ends its own row with the characters of a special token (A12)."""
    tokenizer = formats[CASE_TEMPLATE].tokenizer
    ids, boundary = training_row(formats[CASE_TEMPLATE], "a<|endoftext|>b", "<|endoftext|>")
    assert [index for index, token in enumerate(ids) if token == tokenizer.eos_token_id] == [len(ids) - 1]
    assert tokenizer.decode(ids[:boundary]) == "a<|endoftext|>b TL;DR: "
    assert tokenizer.decode(ids[boundary:-1]) == "<|endoftext|>"


def test_begin_of_text_of_tokenizers_that_add_one():
    """A start token missing, doubled, put before every part, or not counted in the window."""
    prompt_format = case_format(tokenizer=tokenizer_that_begins_texts())
    ids, boundary = training_row(prompt_format, "C" * 500, "0123456789")
    assert ids == [END, *b"C" * 108, *SEPARATOR, *b"0123456789", END]
    assert boundary == 117
    assert prompt_format.prediction_prompts(["C" * 500], 11) == [ids[:boundary]]


@pytest.mark.parametrize("make", [byte_tokenizer, tokenizer_that_begins_texts])
def test_the_users_tokenizer_stays_as_it_is(make):
    """Truncation, padding or the reading of special tokens switched off in the tokenizer that the caller keeps."""
    tokenizer = make()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5)
    backend.enable_padding(length=9, pad_id=END, pad_token="<|endoftext|>")
    before = backend.to_str()
    prompt_format = case_format(tokenizer=tokenizer)
    ids, boundary = training_row(prompt_format, "a long article", "a long summary")
    assert ids[boundary:] == [*b"a long summary", END]  # neither cut to 5 nor padded to 9
    prompt_format.decode(ids)
    prompt_format.fingerprint()
    assert backend.to_str() == before
    assert backend.encode_special_tokens is False
    assert backend.encode("<|endoftext|>", add_special_tokens=False).ids[0] == END


# -- templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["", "TL;DR:", "{article}{article}", "{articles}\nTL;DR:", "{ article }"])
def test_a_template_holds_the_article_exactly_once(template):
    """A misspelt place for the article, so that every row is trained on the template alone."""
    message = refusal(lambda: PromptFormat(BYTES, template))
    assert message.startswith(f"prompt_template is {template!r}: expected") and "{article}" in message


def test_other_braces_in_a_template_are_text():
    """A template with JSON in it that str.format would refuse."""
    (prompt,) = PromptFormat(BYTES, '{"text": "{article}"}', 128).prediction_prompts(["x {y}"], 5)
    assert bytes(prompt) == b'{"text": "x {y}"}'


def test_a_template_that_fills_the_window_is_refused():
    """Rows without a place for article, highlights and end: 8 tokens of template need a window of 11."""
    for length in (8, 10):
        message = refusal(lambda length=length: case_format(length))
        assert f"prompt_template takes 8 tokens of the {length} that" in message
    assert training_row(case_format(11), "xyz", "s") == ([ord("x"), *SEPARATOR, ord("s"), END], 9)


@pytest.mark.parametrize(("template", "start"), [
    ("{article}\nTL;DR:", b" The"), ("{article}\nTL;DR: ", b"The"), ("{article}\n", b"The"), ("{article}", b" The")])
def test_highlights_begin_with_one_space_or_none(template, start):
    """Two spaces or none between the cue and the summary: outer white space of the highlights does not count."""
    for highlights in ("The cat", "  The cat \n"):
        ids, boundary = training_row(PromptFormat(BYTES, template), "x", highlights)
        assert bytes(ids[boundary:-1]) == start + b" cat"


# -- A24: decoding ----------------------------------------------------------------------------------------------


def test_decoded_text_of_gpt2(gpt2):
    """Spaces "cleaned up", signs of several tokens torn, a leading space or a special token left in the text (A24)."""
    for ids, text in (([88, 318, 5633], "y is ?"), ([47249, 222], "😀"), ([383, 3797, 3332, 13], "The cat sat."),
                      ([383, 3797, 3332, 50256], "The cat sat"), ([], "")):
        assert gpt2["{article}"].decode(ids) == text


ANY_SCRIPT = ["café à Zürich", "Премьер ушёл", "首相辞任", "👩\u200d👩\u200d👧 😀", "a\nb", "e\u0301 \u00e9", "it 's ."]


@pytest.mark.parametrize("text", ANY_SCRIPT)
def test_any_script_comes_back_as_it_was(formats, text):
    """Text changed on its way through ids: accents, scripts, joined emoji, line ends, detokenised spaces (A24)."""
    prompt_format = formats["{article} TL;DR:"]
    ids, boundary = training_row(prompt_format, text, text)
    assert prompt_format.decode(ids[boundary:]) == text


# -- the name of a format ---------------------------------------------------------------------------------------


def test_fingerprints_tell_formats_apart():
    """A cache of another template, row length or tokenizer taken for this one's."""
    other = byte_tokenizer()
    other.add_tokens(["news"])
    formats = [
        case_format(),
        case_format(127),
        PromptFormat(BYTES, "{article}  TL;DR:", 128),
        PromptFormat(other, CASE_TEMPLATE, 128),
        PromptFormat(tokenizer_that_begins_texts(), CASE_TEMPLATE, 128),
    ]
    assert len({prompt_format.fingerprint() for prompt_format in formats}) == len(formats)
    assert case_format().fingerprint() == case_format(tokenizer=byte_tokenizer()).fingerprint()
