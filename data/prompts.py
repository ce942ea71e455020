"""Article and highlights -> token ids. The template and the truncation rule live here and only here.

A training row is

    [start] prefix article suffix highlights end

where prefix and suffix are the template's text around `{article}`, and [start] is what the tokenizer puts before a
text by itself, such as a begin-of-text. In the template special tokens are tokens; in articles and highlights their
text is ordinary text. The prompt is what the tokenizer makes of the whole text. Highlights are tokenised separately,
so that the prompt of a prediction is exactly the beginning of its training row; a tokenizer that begins every text with
a space ("▁The") does not do so within a row.
If the template ends in white space or in a special token, the highlights follow directly; otherwise they begin with one
space ("TL;DR:" + " The cat"), as GPT-2's words do.

An article that is too long is truncated at its END: never its beginning, the suffix, the highlights or the end-of-text.
The suffix is then tokenised separately.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain

from tokenizers import Tokenizer

from data.articles import DataError

DEFAULT_TEMPLATE = "{article}\nTL;DR:"
# Beginnings and ends of articles, with which the text around them may form tokens.
ENDS = ("a", "The", "9", ".", '."', "?", "”", ")", " b ", "c\n", "\n\nd", "\n \ne")
GROUP = 2_000_000  # characters tokenised at a time: the tokenizer takes a hundred bytes for each token


class RowTooLong(Exception):
    """The highlights leave no room for a single article token; the message has the sizes."""


class PromptFormat:
    """A template, a tokenizer and the maximum length of a row in tokens.

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
        special = set(tokenizer.all_special_ids)  # some files do not flag their end-of-text as special
        values["added_tokens"] = [{**token, "special": token["special"] or token["id"] in special}
                                  for token in values["added_tokens"]]
        # For a text at the row's beginning, one behind a special token, and one that follows another text.
        first, behind_token, within = backends_of([
            values, without_space_before(values, behind_token=True), without_space_before(values)])
        # With most tokenizers an article that is longer than this in characters gives `_enough` tokens.
        self._enough = 2 * max_length  # so that no word is cut in its middle where its tokens are used
        self._beginning = self._enough * max(map(len, first.get_vocab()), default=1)
        before, after = template.split("{article}")
        first.encode_special_tokens = False
        prefix, suffix = first.encode_batch([before, after], add_special_tokens=False)
        first.encode_special_tokens = True
        starts, ends = token_places(prefix, before, first), token_places(suffix, after, first)

        # The article is read together with the template's text around it, as far as the next special tokens.
        self._text_before = before[prefix.offsets[starts[-1]][1] :] if starts else before
        self._text_behind = after[: suffix.offsets[ends[0]][0]] if ends else after
        self._articles, start = behind_token if starts else first, start_ids(first)
        self.prefix_ids = prefix.ids[: starts[-1] + 1] if starts else []
        if self.prefix_ids[: len(start)] != start:  # unless the template begins with it
            self.prefix_ids = start + self.prefix_ids
        self._rest_ids = suffix.ids[ends[0] :] if ends else []
        self.suffix_ids = ids_of([self._text_behind], within)[0] + self._rest_ids  # of an article that is cut

        ends_in_token = bool(ends) and ends[-1] == len(suffix.ids) - 1
        self._highlights = behind_token if ends_in_token else within
        self.highlight_start = "" if ends_in_token or template != template.rstrip() else " "
        self.end_id = tokenizer.eos_token_id
        self._before_length = len(ids_of([self._text_before], self._articles)[0])
        self._fixed = len(self.prefix_ids) + self._before_length + len(self.suffix_ids)
        if self._fixed + 2 >= max_length:
            raise DataError(
                f"prompt_template takes {self._fixed} tokens of the {max_length} that a row may have (max_length, or "
                "the model's context): nothing is left for an article; shorten it, or raise max_length"
            )
        # What decides the ids of a row. Earlier versions read all parts apart: where that is the same, so is this.
        apart = [list(chain(*ids_of([before, end, after], first))) for end in ENDS]
        joined = [self._prompt(ids, self._enough)[len(start) :] for ids in self._encode(list(ENDS))]
        new = [] if apart == joined and first is within else [first.to_str(), str(self.suffix_ids)]
        self._decisive = (template, str(max_length), str(start + prefix.ids), str(self.end_id), within.to_str(), *new)

    def _encode(self, articles: list[str]) -> list[list[int]]:
        """Token ids of each article with the template's text around it."""
        return ids_of([self._text_before + article + self._text_behind for article in articles], self._articles)

    def encode_highlights(self, highlights: list[str]) -> list[list[int]]:
        """Token ids of each text as a continuation of the prompt, without the end-of-text."""
        return ids_of([self.highlight_start + text.strip() for text in highlights], self._highlights)

    def training_rows(self, articles: list[str], highlights: list[str]) -> list[tuple[list[int], int] | RowTooLong]:
        """(ids, prompt length) of each row: the prompt's ids, then the labels.

        len(ids) <= max_length. A row whose highlights do not fit is replaced by the error.
        """
        summaries = self.encode_highlights(highlights)
        return list(map(self._training_row, self._encode_articles(articles), summaries))

    def _training_row(self, article: list[int], summary: list[int]) -> tuple[list[int], int] | RowTooLong:
        room = self.max_length - self._fixed - len(summary) - 1
        if room < 1:
            return RowTooLong(
                f"highlights of {len(summary)} tokens leave no room for the article in {self.max_length} tokens"
            )
        prompt = self._prompt(article, room)
        return [*prompt, *summary, self.end_id], len(prompt)

    def _prompt(self, article: list[int], room: int) -> list[int]:
        """article: from `_encode`. room: maximum tokens of the article alone."""
        kept = self._before_length + room
        if len(article) <= kept + len(self.suffix_ids) - len(self._rest_ids):
            return self.prefix_ids + article + self._rest_ids
        return self.prefix_ids + article[:kept] + self.suffix_ids

    def has_room(self, max_new_tokens: int) -> bool:
        """Whether a prompt and `max_new_tokens` leave room for an article."""
        return self._fixed + max_new_tokens < self.max_length

    def prediction_prompts(self, articles: list[str], max_new_tokens: int) -> list[list[int]]:
        """Prompt ids of each article, with len(prompt) + max_new_tokens <= max_length.

        Raises:
            DataError: max_new_tokens leaves no room for an article.
        """
        room = self.max_length - self._fixed - max_new_tokens
        if not self.has_room(max_new_tokens):
            raise DataError(
                f"max_generation_length is {max_new_tokens}: too big beside the prompt in {self.max_length} tokens; "
                f"expected at most {max_new_tokens + room - 1}"
            )
        return [self._prompt(ids, room) for ids in self._encode_articles(articles)]

    def _encode_articles(self, articles: list[str]) -> Iterator[list[int]]:
        """Token ids of each article, as `_encode` gives them, as many as a row can use."""
        whole = iter(articles)
        for beginnings in groups([text[: self._beginning] for text in articles]):
            for ids, article in zip(self._encode(beginnings), whole, strict=False):
                # A word that the tokenizer does not know is one token, and white space may be none, however long.
                length = self._beginning
                while length < len(article) and len(ids) < self._enough:
                    length *= 2
                    (ids,) = self._encode([article[:length]])
                yield ids

    def shorten(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        """A training row's prompt, its article truncated so that len(prompt) + max_new_tokens <= max_length."""
        excess = len(prompt) + max_new_tokens - self.max_length
        if excess <= 0:
            return prompt
        return prompt[: len(prompt) - len(self.suffix_ids) - excess] + self.suffix_ids

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids: without special tokens, spaces as generated, outer white space stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def fingerprint(self) -> str:
        """A hash of everything that decides the ids of a row."""
        return hashlib.sha256("\0".join(self._decisive).encode()).hexdigest()


def ids_of(texts: list[str], backend: Tokenizer) -> list[list[int]]:
    """Token ids of each text alone; an empty text has none."""
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def token_places(encoding, text: str, backend: Tokenizer) -> list[int]:
    """Indices of special tokens that a text spells out; an unknown character may have the id of one without that."""
    special = {token: added.content for token, added in backend.get_added_tokens_decoder().items() if added.special}
    return [index for index, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True))
            if token in special and special[token] in text[start:end]]


def start_ids(backend: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text by itself, such as a begin-of-text."""
    known = next((text for text in ENDS if backend.encode(text, add_special_tokens=False).ids), "")
    alone, framed = (backend.encode(known, add_special_tokens=frame).ids for frame in (False, True))
    starts = [start for start in range(len(framed)) if framed[start : start + len(alone)] == alone]
    return framed[: starts[0]] if starts else []


def backends_of(variants: list[dict]) -> list[Tokenizer]:
    """Tokenizers of their own, which read the text of special tokens as ordinary text; one for equal values."""
    texts = list(map(json.dumps, variants))
    made = {text: Tokenizer.from_str(text) for text in dict.fromkeys(texts)}
    for backend in made.values():
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
    return [made[text] for text in texts]


def without_space_before(values: dict, behind_token: bool = False) -> dict:
    """A tokenizer's values without the space that it puts before each text: for a text that follows another one, or
    (behind_token) a special token, where most tokenizers put it too."""

    def changed(part: dict | None) -> dict | None:
        if part is None:
            return None
        if part["type"] == "Sequence" and "pretokenizers" in part:
            # Behind another one, which splits text into words, the space is put before each word.
            return {**part, "pretokenizers": [*map(changed, part["pretokenizers"][:1]), *part["pretokenizers"][1:]]}
        if part["type"] == "Sequence":
            return {**part, "normalizers": list(filter(None, map(changed, part["normalizers"])))}
        if part["type"] == "Metaspace" and (not behind_token or part["prepend_scheme"] == "first"):
            return {**part, "prepend_scheme": "never"}
        if part["type"] == "ByteLevel" and not behind_token:
            return {**part, "add_prefix_space": False}
        return None if part["type"] == "Prepend" and not behind_token else part

    return {**values, **{name: changed(values[name]) for name in ("normalizer", "pre_tokenizer")}}


def groups(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of about GROUP characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group
