"""Article and highlights -> token ids. The template and the truncation rule live here and only here.

A training row is

    [start] prefix article suffix highlights end

where prefix and suffix are the template's text around `{article}`, and [start] is the begin-of-text token of
tokenizers that add one. Each part is tokenised on its own, in training and in prediction alike, so that the prompt of
a prediction is exactly the beginning of its training row. Where the template ends in white space the highlights follow
directly; otherwise they begin with one space ("TL;DR:" + " The cat"), as GPT-2's words do.

Of an article that is too long the END is cut: never its beginning, the suffix, the highlights or the end-of-text.
"""

import hashlib
from collections.abc import Iterator

from tokenizers import Tokenizer

from data.articles import DataError

DEFAULT_TEMPLATE = "{article}\nTL;DR:"
GROUP = 2_000_000  # characters tokenised at a time: a token in the making takes a hundred bytes


class RowTooLong(Exception):
    """Highlights that leave no room for a single article token; the message says the sizes."""


class PromptFormat:
    """A template, a tokenizer and the most tokens a row may have.

    tokenizer: a fast tokenizer of `transformers`. Text such as "<|endoftext|>" inside an article is encoded as
    ordinary text: it never becomes a special token.

    Raises:
        DataError: a template without exactly one `{article}`, or one that leaves no room for an article.
    """

    def __init__(self, tokenizer, template: str = DEFAULT_TEMPLATE, max_length: int = 1024):
        if template.count("{article}") != 1:
            raise DataError(f"prompt_template is {template!r}: expected the text {{article}} in it exactly once")
        self.template = template
        self.max_length = max_length
        self.tokenizer = tokenizer
        # A copy, because the settings below would change the user's tokenizer.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        # With most tokenizers an article that is longer than this in characters gives `_enough` tokens.
        self._enough = 2 * max_length  # so that no word is cut in its middle where its tokens are used
        self._beginning = self._enough * max(map(len, self._backend.get_vocab()), default=1)
        before, after = template.split("{article}")
        prefix, self.suffix_ids = self.encode([before, after])
        self.prefix_ids = start_ids(self._backend, tokenizer.bos_token_id) + prefix
        self.end_id = tokenizer.eos_token_id
        self.highlight_start = "" if template != template.rstrip() else " "
        fixed = len(self.prefix_ids) + len(self.suffix_ids)
        if fixed + 2 >= max_length:
            raise DataError(
                f"prompt_template takes {fixed} tokens of the {max_length} that a row may have (max_length, or the "
                "model's context): nothing is left for an article; shorten it, or raise max_length"
            )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; an empty text has none."""
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def training_rows(self, articles: list[str], highlights: list[str]) -> list[tuple[list[int], int] | RowTooLong]:
        """(ids, boundary) of each row: ids[:boundary] is the prompt, ids[boundary:] are labels.

        len(ids) <= max_length. In place of a row whose highlights do not fit stands what is wrong with it.
        """
        starts = [self.highlight_start + text.strip() for text in highlights]
        rows, whole = [], iter(articles)
        for beginnings, summaries in groups(self._beginnings(articles), starts):
            rows += map(self._training_row, self._encode_articles(beginnings, whole), self.encode(summaries))
        return rows

    def _training_row(self, article: list[int], summary: list[int]) -> tuple[list[int], int] | RowTooLong:
        room = self.max_length - len(self.prefix_ids) - len(self.suffix_ids) - len(summary) - 1
        if room < 1:
            return RowTooLong(
                f"highlights of {len(summary)} tokens leave no room for the article in {self.max_length} tokens"
            )
        prompt = self.prefix_ids + article[:room] + self.suffix_ids
        return [*prompt, *summary, self.end_id], len(prompt)

    def prediction_prompts(self, articles: list[str], max_new_tokens: int) -> list[list[int]]:
        """Prompt ids of each article, with len(prompt) + max_new_tokens <= max_length.

        Raises:
            DataError: max_new_tokens leaves no room for an article.
        """
        room = self.max_length - len(self.prefix_ids) - len(self.suffix_ids) - max_new_tokens
        if room < 1:
            raise DataError(
                f"max_generation_length is {max_new_tokens}: too big beside the prompt in {self.max_length} tokens; "
                f"expected at most {max_new_tokens + room - 1}"
            )
        prompts, whole = [], iter(articles)
        for (beginnings,) in groups(self._beginnings(articles)):
            prompts += [self.prefix_ids + ids[:room] + self.suffix_ids
                        for ids in self._encode_articles(beginnings, whole)]
        return prompts

    def _beginnings(self, articles: list[str]) -> list[str]:
        return [text[: self._beginning] for text in articles]

    def _encode_articles(self, beginnings: list[str], whole: Iterator[str]) -> list[list[int]]:
        """Token ids of the next articles of `whole`, as many as a row can use. beginnings: of those articles."""
        return [self._lengthened(ids, next(whole)) for ids in self.encode(beginnings)]

    def _lengthened(self, ids: list[int], article: str) -> list[int]:
        """More token ids of an article, where those of its beginning may be too few: a word that the tokenizer does not
        know is one token, and white space may be none, however long they are."""
        length = self._beginning
        while length < len(article) and len(ids) < self._enough:
            length *= 2
            (ids,) = self.encode([article[:length]])
        return ids

    def shorten(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """A training row's prompt, its article's end cut so that len(prompt) + max_new_tokens <= max_length."""
        excess = len(prompt) + max_new_tokens - self.max_length
        if excess <= 0:
            return prompt
        end = len(prompt) - len(self.suffix_ids)
        return prompt[: end - excess] + prompt[end:]

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids: special tokens left out, spaces as generated, outer white space stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids of a row."""
        parts = (self.template, str(self.max_length), str(self.prefix_ids), str(self.end_id), self._backend.to_str())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def start_ids(backend: Tokenizer, start: int | None) -> list[int]:
    """[start], the begin-of-text, for tokenizers that put it before a text of their own accord, else []."""
    return [start] if start is not None and backend.encode("a").ids[:1] == [start] else []


def groups(*columns: list[str]) -> Iterator[list[list[str]]]:
    """The columns in pieces, of the same rows in each, of about GROUP characters together."""
    start = size = 0
    for row, texts in enumerate(zip(*columns, strict=True), 1):
        size += sum(map(len, texts))
        if size >= GROUP or row == len(columns[0]):
            yield [column[start:row] for column in columns]
            start, size = row, 0
