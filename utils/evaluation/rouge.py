"""ROUGE F-measures of each row.

For English they are those of Google's `rouge-score` (`use_stemmer=True`), after Lin (2004), "ROUGE: A Package for
Automatic Evaluation of Summaries". `rouge-score` drops every letter outside a-z, so texts in other scripts are
tokenized by Unicode categories instead.
"""

import functools
import os
import re
import signal
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROWS_IN_ONE_PROCESS = 2000  # a worker takes as long to start as it takes to score about 1,000 rows
MAX_PROCESSES = 8

# Thai, Lao, Myanmar, Khmer, Hiragana, Katakana and Han: scripts written without spaces between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# Joiners and the soft hyphen shape a word without ending it (Nepali and Persian spelling need them).
_JOINERS = dict.fromkeys(map(ord, "\u00ad\u200c\u200d"))


def score_rows(predictions: list[str], references: list[str]) -> list[dict[str, float]]:
    """F-measures of each prediction against its reference, fractions of 1, with the keys of `METRICS`.

    rougeLsum splits both texts at newlines, one sentence per line. A text without words scores 0.0. A pair whose
    reference consists mostly of non-ASCII letters goes through `unicode_tokens`, every other pair is English. Many
    rows are scored by several processes; the result is the same.
    """
    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    if len(predictions) <= ROWS_IN_ONE_PROCESS or processes == 1:
        return list(map(score_row, predictions, references))
    # spawn, not fork: the parent may hold a GPU and threads. Ctrl-C is for the parent to handle.
    with ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(pool.map(score_row, predictions, references, chunksize=100))


def score_row(prediction: str, reference: str) -> dict[str, float]:
    scores = scorer(mostly_non_ascii(reference)).score(reference, prediction)
    return {metric: scores[metric].fmeasure for metric in METRICS}


@functools.cache
def scorer(other_script: bool):
    """The package's scorer with a tokenizer of ours."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    tokenize = unicode_tokens if other_script else english_tokens()
    return RougeScorer(METRICS, tokenizer=SimpleNamespace(tokenize=tokenize))


def english_tokens() -> Callable[[str], list[str]]:
    """The package's own tokenizer with a cache of stems: lower-cased, Porter-stemmed runs of a-z and 0-9."""
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    stemmer = SimpleNamespace(stem=functools.lru_cache(1 << 16)(PorterStemmer().stem))
    return lambda text: tokenize(text, stemmer)


def unicode_tokens(text: str) -> list[str]:
    """Case-folded, NFC-normalised runs of letters, marks and digits (Unicode categories L, M, N), unstemmed.

    In scripts without spaces each letter is a token, together with the marks that follow it.
    """
    tokens, word = [], ""
    for character in unicodedata.normalize("NFC", text.translate(_JOINERS)).casefold():
        category = unicodedata.category(character)[0]
        if category == "M":
            word += character
            continue
        if word and (category not in "LN" or _SPACELESS.match(character) or _SPACELESS.match(word)):
            tokens.append(word)
            word = ""
        if category in "LN":
            word += character
    return [*tokens, word] if word else tokens


def mostly_non_ascii(text: str) -> bool:
    """True if more than half of the text's letters (Unicode category L) are outside ASCII."""
    letters = [] if text.isascii() else [character for character in text if character.isalpha()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)
