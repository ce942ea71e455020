"""Article and highlights -> token ids. The template and the truncation rule live here and only here.

A training row is

    [start] prefix article suffix highlights end

where prefix and suffix are the template's text around `{article}`, and [start] is what the tokenizer puts before a
text of its own accord, such as a begin-of-text. In the template special tokens are tokens; in articles and highlights
their text is ordinary text. Article, suffix and highlights are tokenised apart, in training and in prediction alike, so
that the prompt of a prediction is exactly the beginning of its training row, and the same as the tokenizer's own
reading of the whole prompt: a tokenizer that begins every text with a space ("▁The") does not do so within a row.
If the template ends in white space or in a special token, the highlights follow directly; otherwise they begin with one
space ("TL;DR:" + " The cat"), as GPT-2's words do.

Of an article that is too long the END is cut: never its beginning, the suffix, the highlights or the end-of-text.
"""

import hashlib
import json
from collections.abc import Iterator

from tokenizers import Tokenizer

from data.articles import DataError

DEFAULT_TEMPLATE = "{article}\nTL;DR:"
GROUP = 2_000_000  # characters tokenised at a time: a token in the making takes a hundred bytes


class RowTooLong(Exception):
    """Highlights that leave no room for a single article token; the message says the sizes."""


class PromptFormat:
    """A template, a tokenizer and the most tokens a row may have.

    tokenizer: a fast tokenizer of `transformers`. Text such as "<|endoftext|>" inside an article or highlights is
    encoded as ordinary text: it never becomes a special token.

    Raises:
        DataError: a template without exactly one `{article}`, or one that leaves no room for an article.
    """

    def __init__(self, tokenizer, template: str = DEFAULT_TEMPLATE, max_length: int = 1024):
        if template.count("{article}") != 1:
            raise DataError(f"prompt_template is {template!r}: expected the text {{article}} in it exactly once")
        self.template = template
        self.max_length = max_length
        self.tokenizer = tokenizer
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        # For a text at the row's beginning, one behind a special token, and one that follows another text.
        first, behind_token, within = backends_of([
            values, without_space_before(values, behind_token=True), without_space_before(values)])
        added = first.get_added_tokens_decoder()
        # With most tokenizers an article that is longer than this in characters gives `_enough` tokens.
        self._enough = 2 * max_length  # so that no word is cut in its middle where its tokens are used
        self._beginning = self._enough * max(map(len, first.get_vocab()), default=1)
        before, after = template.split("{article}")
        first.encode_special_tokens = False
        prefix, suffix = first.encode_batch([before, after], add_special_tokens=False)
        first.encode_special_tokens = True

        # The text before the article, from the last special token on, is read together with it.
        special = [place for place, token in enumerate(prefix.ids) if token in added]
        self._lead = before[prefix.offsets[special[-1]][1] :] if special else before
        self.prefix_ids = prefix.ids[: special[-1] + 1] if special else []
        start = start_ids(first)
        if self.prefix_ids[: len(start)] != start:  # unless the template begins with it
            self.prefix_ids = start + self.prefix_ids
        self._article_backend = behind_token if special else first

        # The text behind the article, up to the first special token, continues it.
        special = [place for place, token in enumerate(suffix.ids) if token in added]
        continued = after[: suffix.offsets[special[0]][0]] if special else after
        self.suffix_ids = ids_of([continued], within)[0] + (suffix.ids[special[0] :] if special else [])
        ends_in_token = bool(special) and special[-1] == len(suffix.ids) - 1
        self._highlights_backend = behind_token if ends_in_token else within
        self.highlight_start = "" if ends_in_token or template != template.rstrip() else " "

        self.end_id = tokenizer.eos_token_id
        self._lead_length = len(self.encode_articles([""])[0])
        self._fixed = len(self.prefix_ids) + self._lead_length + len(self.suffix_ids)
        if self._fixed + 2 >= max_length:
            raise DataError(
                f"prompt_template takes {self._fixed} tokens of the {max_length} that a row may have (max_length, or "
                "the model's context): nothing is left for an article; shorten it, or raise max_length"
            )
        # The suffix only if its text does not say already what its ids are: earlier versions read the rest as now.
        self._decisive = (template, str(max_length), str(self.prefix_ids), str(self.end_id), within.to_str(),
                          *([str(self.suffix_ids)] if special else []))

    def encode_articles(self, articles: list[str]) -> list[list[int]]:
        """Token ids of each article with the template's text before it."""
        return ids_of([self._lead + article for article in articles], self._article_backend)

    def encode_highlights(self, highlights: list[str]) -> list[list[int]]:
        """Token ids of each text as a continuation of the prompt, without the end-of-text."""
        return ids_of([self.highlight_start + text.strip() for text in highlights], self._highlights_backend)

    def training_rows(self, articles: list[str], highlights: list[str]) -> list[tuple[list[int], int] | RowTooLong]:
        """(ids, boundary) of each row: ids[:boundary] is the prompt, ids[boundary:] are labels.

        len(ids) <= max_length. In place of a row whose highlights do not fit stands what is wrong with it.
        """
        rows, whole = [], iter(articles)
        for beginnings, summaries in groups(self._beginnings(articles), highlights):
            rows += map(self._training_row, self._encode_all(beginnings, whole), self.encode_highlights(summaries))
        return rows

    def _training_row(self, article: list[int], summary: list[int]) -> tuple[list[int], int] | RowTooLong:
        room = self.max_length - self._fixed - len(summary) - 1
        if room < 1:
            return RowTooLong(
                f"highlights of {len(summary)} tokens leave no room for the article in {self.max_length} tokens"
            )
        prompt = self._prompt(article, room)
        return [*prompt, *summary, self.end_id], len(prompt)

    def _prompt(self, article: list[int], room: int) -> list[int]:
        """article: of `encode_articles`. room: tokens that it may have."""
        return self.prefix_ids + article[: self._lead_length + room] + self.suffix_ids

    def prediction_prompts(self, articles: list[str], max_new_tokens: int) -> list[list[int]]:
        """Prompt ids of each article, with len(prompt) + max_new_tokens <= max_length.

        Raises:
            DataError: max_new_tokens leaves no room for an article.
        """
        room = self.max_length - self._fixed - max_new_tokens
        if room < 1:
            raise DataError(
                f"max_generation_length is {max_new_tokens}: too big beside the prompt in {self.max_length} tokens; "
                f"expected at most {max_new_tokens + room - 1}"
            )
        prompts, whole = [], iter(articles)
        for (beginnings,) in groups(self._beginnings(articles)):
            prompts += [self._prompt(ids, room) for ids in self._encode_all(beginnings, whole)]
        return prompts

    def _beginnings(self, articles: list[str]) -> list[str]:
        return [text[: self._beginning] for text in articles]

    def _encode_all(self, beginnings: list[str], whole: Iterator[str]) -> list[list[int]]:
        """Token ids of the next articles of `whole`, as many as a row can use. beginnings: of those articles."""
        return [self._lengthened(ids, next(whole)) for ids in self.encode_articles(beginnings)]

    def _lengthened(self, ids: list[int], article: str) -> list[int]:
        """More token ids of an article, where those of its beginning may be too few: a word that the tokenizer does not
        know is one token, and white space may be none, however long they are."""
        length = self._beginning
        while length < len(article) and len(ids) < self._enough:
            length *= 2
            (ids,) = self.encode_articles([article[:length]])
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
        return hashlib.sha256("\0".join(self._decisive).encode()).hexdigest()


def ids_of(texts: list[str], backend: Tokenizer) -> list[list[int]]:
    """Token ids of each text alone; an empty text has none."""
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def start_ids(backend: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text of its own accord, such as a begin-of-text."""
    alone, framed = (backend.encode("a", add_special_tokens=frame).ids for frame in (False, True))
    starts = [start for start in range(len(framed)) if framed[start : start + len(alone)] == alone]
    return framed[: starts[0]] if starts else []


def backends_of(variants: list[dict]) -> list[Tokenizer]:
    """Tokenizers of their own, which read the text of special tokens as ordinary text; one for equal values."""
    made: list[Tokenizer] = []
    for index, values in enumerate(variants):
        if (equal := variants.index(values)) < index:
            made.append(made[equal])
            continue
        made.append(Tokenizer.from_str(json.dumps(values)))
        made[-1].no_truncation()
        made[-1].no_padding()
        made[-1].encode_special_tokens = True
    return made


def without_space_before(values: dict, behind_token: bool = False) -> dict:
    """A tokenizer's values without the space that it puts before each text: for a text that follows another one, or
    (behind_token) a special token, where most tokenizers put it too."""

    def changed(part: dict | None) -> dict | None:
        if part is None:
            return None
        if part["type"] == "Sequence":
            name = "normalizers" if "normalizers" in part else "pretokenizers"
            return {**part, name: [each for each in map(changed, part[name]) if each is not None]}
        if part["type"] == "Metaspace" and (not behind_token or part["prepend_scheme"] == "first"):
            return {**part, "prepend_scheme": "never"}
        if part["type"] == "ByteLevel" and not behind_token:
            return {**part, "add_prefix_space": False}
        return None if part["type"] == "Prepend" and not behind_token else part

    return {**values, **{name: changed(values[name]) for name in ("normalizer", "pre_tokenizer")}}


def groups(*columns: list[str]) -> Iterator[list[list[str]]]:
    """The columns in pieces, of the same rows in each, of about GROUP characters together."""
    start = size = 0
    for row, texts in enumerate(zip(*columns, strict=True), 1):
        size += sum(map(len, texts))
        if size >= GROUP or row == len(columns[0]):
            yield [column[start:row] for column in columns]
            start, size = row, 0
