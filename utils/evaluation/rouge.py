"""ROUGE scores by row, their means and bootstrap intervals, and the lead-3 baseline.

For English the four F-measures equal Google's `rouge-score` (`use_stemmer=True`) to the last bit:
https://github.com/google-research/google-research/tree/master/rouge, after Lin (2004), "ROUGE: A Package for
Automatic Evaluation of Summaries". They come faster because each text is tokenised once for all four scores,
each word is stemmed once, and the longest common subsequence (LCS) is computed on the bits of one integer.
"""

import functools
import itertools
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterator

import numpy as np
from rouge_score.scoring import fmeasure

LONGEST_LEAD = 100_000
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_ENGLISH_WORD = re.compile("[a-z0-9]+")
# Thai, Lao, Myanmar, Khmer, Hiragana, Katakana and Han: scripts written without spaces between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# Joiners and the soft hyphen shape a word without ending it (Nepali and Persian spelling need them).
_JOINERS = dict.fromkeys(map(ord, "\u00ad\u200c\u200d"))

# -- tokens ----------------------------------------------------------------------------------------------------


class EnglishTokenizer:
    """`rouge-score`'s own tokenizer with a memory of the words it has met.

    May also be handed to `rouge_score.rouge_scorer.RougeScorer(tokenizer=...)`.
    """

    def __init__(self, cached_words: int = 1 << 16):
        """`cached_words`: how many distinct words are remembered (least recently used go first)."""
        from rouge_score import tokenizers  # brings nltk, which takes seconds

        package = tokenizers.DefaultTokenizer(use_stemmer=True)
        self._stem = functools.lru_cache(cached_words)(lambda word: "".join(package.tokenize(word)))

    def tokenize(self, text: str) -> list[str]:
        """Lower-cased, Porter-stemmed runs of a-z and 0-9; every other character separates."""
        return [stem for word in _ENGLISH_WORD.findall(text.lower()) if (stem := self._stem(word))]


def unicode_tokens(text: str) -> list[str]:
    """Case-folded, NFC-normalised runs of letters, marks and digits (Unicode categories L, M, N), unstemmed.

    A letter of a script without spaces is a token of its own, together with the marks that follow it.
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
    """True where more than half of the text's letters (Unicode category L) lie outside ASCII."""
    if text.isascii():
        return False
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)


# -- scores ----------------------------------------------------------------------------------------------------


def score_rows(predictions: list[str], references: list[str]) -> list[dict[str, float]]:
    """F-measures of each prediction against its reference, as fractions of 1, with the keys of `METRICS`.

    rougeLsum splits both texts at newlines, one sentence a line: a prediction without a newline counts as one
    sentence, however many full stops it holds. A text without words (empty, only punctuation) scores 0.0
    everywhere and its row stays. A pair whose reference is mostly non-ASCII letters goes through
    `unicode_tokens`, since `rouge-score` drops every such letter and would give 0.0; all others are English.

    Raises:
        ValueError: the lists differ in length, or an entry is not a string (pandas reads an empty cell as NaN).
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: expected one each")
    for name, texts in (("predictions", predictions), ("references", references)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{index}] is {text!r}: expected a string")
    english = EnglishTokenizer().tokenize
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        tokenize = unicode_tokens if mostly_non_ascii(reference) else english
        rows.append(_score([tokenize(line) for line in prediction.split("\n")],
                           [tokenize(line) for line in reference.split("\n")]))
    return rows


def _score(prediction: list[list[str]], reference: list[list[str]]) -> dict[str, float]:
    """The four F-measures of two texts given as sentences of tokens."""
    predicted, expected = (list(itertools.chain.from_iterable(text)) for text in (prediction, reference))
    predicted_counts, expected_counts = Counter(predicted), Counter(expected)
    predicted_pairs, expected_pairs = (Counter(itertools.pairwise(tokens)) for tokens in (predicted, expected))
    lcs_length = len(expected) - _lcs_rows(expected, predicted)[-1].bit_count()
    # A token counts at most as often as the prediction holds it, as in ROUGE 1.5.5.
    union = Counter(token for sentence in reference for token in _union_lcs(sentence, prediction))
    sizes = len(predicted), len(expected)
    return {
        "rouge1": _f_measure(_overlap(predicted_counts, expected_counts), *sizes),
        "rouge2": _f_measure(_overlap(predicted_pairs, expected_pairs), sizes[0] - 1, sizes[1] - 1),
        "rougeL": _f_measure(lcs_length, *sizes),
        "rougeLsum": _f_measure(_overlap(union, predicted_counts), *sizes),
    }


def _f_measure(hits: int, predicted: int, expected: int) -> float:
    return fmeasure(hits / max(predicted, 1), hits / max(expected, 1))


def _overlap(left: Counter, right: Counter) -> int:
    """Size of the intersection of two multisets."""
    return sum(min(count, right[item]) for item, count in left.items() if item in right)


def _lcs_rows(reference: list[str], candidate: list[str]) -> list[int]:
    """The LCS table in bits: `len(candidate) + 1` integers of `len(reference)` bits.

    Bit i of row j is 0 where the LCS of reference[: i + 1] and candidate[:j] is one longer than that of
    reference[:i], so the zeros below bit i count the LCS. Hyyrö (2004), "Bit-parallel LCS-length computation
    revisited".
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(reference):
        positions[token] = positions.get(token, 0) | 1 << index
    full = (1 << len(reference)) - 1
    rows = [full]
    for token in candidate:
        row = rows[-1]
        matches = row & positions.get(token, 0)
        rows.append((row + matches | row - matches) & full)
    return rows


def _union_lcs(reference: list[str], candidates: list[list[str]]) -> list[str]:
    """Tokens of a reference sentence that lie in its LCS with at least one candidate sentence."""
    found = set()
    for candidate in candidates:
        rows = _lcs_rows(reference, candidate)
        i, j = len(reference), len(candidate)
        # Of several LCS of one length, this walk takes the one that rouge-score takes.
        while i and j:
            if reference[i - 1] == candidate[j - 1]:
                i, j = i - 1, j - 1
                found.add(i)
            elif rows[j] >> (i - 1) & 1:
                i -= 1
            else:
                j -= 1
    return [reference[index] for index in found]


# -- means and intervals ---------------------------------------------------------------------------------------


def mean_scores(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over all rows (never over batches). ValueError where there is no row."""
    _check_rows(rows)
    return {metric: statistics.fmean(row[metric] for row in rows) for metric in rows[0]}


def confidence_intervals(
    rows: list[dict[str, float]], resamples: int = 1000, seed: int = 1234, level: float = 0.95
) -> dict[str, list[float]]:
    """`{metric: [low, high]}` of each mean: percentile bootstrap over rows (Efron & Tibshirani, 1993, ch. 13).

    With one row both ends equal its value: a single row says nothing about spread.

    Raises:
        ValueError: no row, fewer than one resample, or a level outside (0, 1).
    """
    _check_rows(rows)
    values = np.array([[row[metric] for metric in rows[0]] for row in rows], dtype=np.float64)
    ends = _percentiles(_resampled_means(values, resamples, seed), level)
    return {metric: ends[:, index].tolist() for index, metric in enumerate(rows[0])}


def paired_bootstrap(
    rows_a: list[dict[str, float]],
    rows_b: list[dict[str, float]],
    metric: str,
    resamples: int = 10_000,
    seed: int = 1234,
    level: float = 0.95,
) -> dict[str, float | list[float]]:
    """Whether a's mean differs from b's on the same rows in the same order: paired bootstrap (Koehn, 2004).

    Returns `difference` (mean of a minus mean of b), its `interval` [low, high] and the two-sided `p_value`:
    twice the share of resamples whose difference lies on the far side of 0, at least 2 / (resamples + 1).
    With fewer than about twenty rows the interval is too narrow; with one row `p_value` is 1.0.

    Raises:
        ValueError: no row, lists of different length, an unknown metric, or as in `confidence_intervals`.
    """
    if len(rows_a) != len(rows_b):
        raise ValueError(f"rows_a has {len(rows_a)} rows and rows_b {len(rows_b)}: expected the same rows")
    _check_rows(rows_a)
    if metric not in rows_a[0] or metric not in rows_b[0]:
        raise ValueError(f"metric is {metric!r}: expected one of {sorted(rows_a[0].keys() & rows_b[0].keys())}")
    differences = np.array([[a[metric] - b[metric]] for a, b in zip(rows_a, rows_b, strict=True)])
    means = _resampled_means(differences, resamples, seed)
    far_side = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return {
        "difference": statistics.fmean(differences[:, 0]),
        "interval": _percentiles(means, level)[:, 0].tolist(),
        "p_value": min(1.0, 2 * (far_side + 1) / (resamples + 1)) if len(rows_a) > 1 else 1.0,
    }


def _check_rows(rows: list[dict[str, float]]) -> None:
    if not rows:
        raise ValueError("there are no rows to average: expected at least one scored row")


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples, metrics] of rows drawn with replacement from values [rows, metrics]."""
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: expected at least 1")
    rng = np.random.default_rng(seed)
    count = len(values)
    chunk = max(1, (1 << 20) // count)  # about a million drawn rows at a time: some 40 MB for four metrics
    means = []
    for start in range(0, resamples, chunk):
        drawn = rng.integers(count, size=(min(chunk, resamples - start), count))
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


def _percentiles(means: np.ndarray, level: float) -> np.ndarray:
    """Low and high ends [2, metrics] of the central `level` of the columns of means [resamples, metrics]."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: expected a fraction between 0 and 1, such as 0.95")
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


# -- the lead baseline -----------------------------------------------------------------------------------------

# A run of stops with the quotes and brackets that close behind it (also tokenised '' ), then a space or the end.
_STOP = re.compile("(?<![.!?…])[.!?…]++(?: '')?[\"'”’»)\\]]*+(?= |$)|[।॥。！？]++[」』”’]*+")
_OPENING = "\"'“‘«([`"
# Tokenised text has spaces around quotes; no longer word opens a sentence.
_NEXT_WORD = re.compile(f"[ {re.escape(_OPENING)}]*([^ ]{{0,40}})")
# A full stop after these never ends a sentence ...
_TITLES = frozenset(
    "Mr Mrs Ms Messrs Dr Prof Gov Sen Rep Reps Sens Gen Lt Col Sgt Capt Cpl Maj Adm Cmdr Rev Hon Pres Supt Det "
    "St Mt Ft No Nos vs v".split()
)
# ... and after these, or an initial, or dotted letters ("U.S.", "p.m."), only before a word that opens sentences.
_ABBREVIATIONS = frozenset(
    "Jr Sr Inc Co Corp Ltd Bros Ave Blvd Rd Jan Feb Mar Apr Aug Sept Sep Oct Nov Dec etc Calif Fla Mass".split()
)
_DOTTED = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]|Ph\.D")
_OPENERS = frozenset(
    "A After All Although An And As At Before But By During For From He Her His However I If In It Its Last Many "
    "Meanwhile More Most No On One Police She Since So Some That The Their There These They This Those Two We "
    "What When While Who With You".split()
)


def lead_sentences(article: str, n: int = 3) -> str:
    """The first `n` sentences of an article joined with newlines, the customary baseline of news summarisation.

    A sentence ends at `.`, `!`, `?` or `…` (closing quotes and brackets included) before a space and a word
    that does not start in lower case, or at a blank line, or at a Devanagari or CJK full stop. So "3.5" and
    '"Why?" he said' hold no end, nor do titles ("Mr. Smith"); initials ("George W. Bush"), dotted letters
    ("the U.S. Army") and abbreviations ("Jr.") end a sentence only before a word that often opens one ("in the
    U.S. The"). Tokenised text ("resigned . Voters") is split the same way. White space is collapsed, and the
    bylines of Daily Mail articles ("By . Daily Mail Reporter .") count as sentences. Of a text without any sentence's
    end no more than LONGEST_LEAD characters are taken.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: expected at least 1 sentence")
    return "\n".join(itertools.islice(_sentences(article), n))[:LONGEST_LEAD]


def _sentences(article: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", article):
        text = " ".join(paragraph.split())
        start = 0
        for stop in _STOP.finditer(text):
            if _ends_sentence(text, stop):
                yield text[start : stop.end()].strip()
                start = stop.end()
        if rest := text[start:].strip():
            yield rest


def _ends_sentence(text: str, stop: re.Match) -> bool:
    following = _NEXT_WORD.match(text, stop.end())[1]
    if following[:1].islower():
        return False
    if stop.group() != ".":
        return True
    word = text[text.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    if word in _TITLES:
        return False
    if word in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return not following or following.rstrip(",'’") in _OPENERS
    return True
