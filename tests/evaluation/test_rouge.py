import csv
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from utils.evaluation import rouge
from utils.evaluation.lead import lead_sentences
from utils.evaluation.rouge import METRICS, score_rows
from utils.evaluation.statistics import confidence_intervals, holm, mean_scores, paired_bootstrap

PACKAGE = RougeScorer(list(METRICS), use_stemmer=True)
ZERO = dict.fromkeys(METRICS, 0.0)
ONE = dict.fromkeys(METRICS, 1.0)
# Few distinct words, in several inflections, so that pairs share words, word pairs and stems.
WORDS = st.sampled_from(
    "the The cat cats running runs ran national nation rational relational ties dying a as s 3.5 1,000 U.S. don't "
    "x-ray skies news e-mail _ -- . generously".split()
)
NEWS_TEXTS = st.lists(st.lists(WORDS, max_size=8).map(" ".join), max_size=5).map("\n".join)
ASCII_TEXTS = st.text(st.characters(max_codepoint=127), max_size=60)
LATIN_TEXTS = st.text(st.sampled_from("abcdeABC éüÉßſİK’\n"), max_size=40)


def package_scores(prediction, reference):
    return {metric: score.fmeasure for metric, score in PACKAGE.score(reference, prediction).items()}


def real_pairs(shared, count: int) -> tuple[list[str], list[str]]:
    """(lead-3, highlights) of real articles."""
    with (shared / "data" / "cnn_dm_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    return [lead_sentences(row["article"]) for row in rows], [row["highlights"] for row in rows]


# -- equality with rouge-score -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.one_of(NEWS_TEXTS, ASCII_TEXTS), st.one_of(NEWS_TEXTS, ASCII_TEXTS))
def test_equals_the_package_on_ascii(prediction, reference):
    """Fault: a score differs from rouge-score's in its last bit."""
    assert score_rows([prediction], [reference]) == [package_scores(prediction, reference)]


@settings(max_examples=100, deadline=None)
@given(LATIN_TEXTS, LATIN_TEXTS)
def test_latin_text_stays_english(prediction, reference):
    """Fault: a few accents send an English row through the Unicode tokenizer."""
    letters = [character for character in reference if character.isalpha()]
    if 2 * sum(letter.isascii() for letter in letters) >= len(letters):
        assert score_rows([prediction], [reference]) == [package_scores(prediction, reference)]


def test_equals_the_package_on_real_rows(shared):
    """Fault: real articles (quotes, dashes, accents, numbers) score otherwise than with rouge-score."""
    predictions, references = real_pairs(shared, 60)
    rows = score_rows(predictions, references)
    assert rows == list(map(package_scores, predictions, references))
    assert 0.3 < mean_scores(rows[:12])["rouge1"] < 0.38  # benchmarks.md: 0.340


def test_processes_change_nothing():
    """Fault: several processes return rows in another order, or scores of another tokenizer."""
    predictions = ["the cats ran home", "首相辞职了", "the cat", "it rained\nthen it snowed"]
    references = ["a cat ran", "首相辞职", "", "then it snows\nit rains"]
    times = 1 + rouge.ROWS_IN_ONE_PROCESS // len(predictions)
    expected = score_rows(predictions, references)
    assert score_rows(predictions * times, references * times) == expected * times


# -- the cases of A24 --------------------------------------------------------------------------------------------


def test_rouge_lsum_needs_newlines():
    """Fault: newlines are lost, so exchanged sentences cost rougeLsum half its value (A24)."""
    reference = "the minister resigned on monday\nvoters will choose a successor in june"
    prediction = "voters will choose a successor in june\nthe minister resigned on monday"
    (lines,) = score_rows([prediction], [reference])
    assert {name: round(value, 6) for name, value in lines.items()} == {
        "rouge1": 1.0, "rouge2": 0.909091, "rougeL": 0.583333, "rougeLsum": 1.0,
    }
    (one_line,) = score_rows([prediction.replace("\n", " ")], [reference.replace("\n", " ")])
    assert round(one_line["rougeLsum"], 6) == 0.583333


@pytest.mark.parametrize("empty", ["", ".", "\n\n", "—"])
def test_empty_texts_count_as_zero(empty):
    """Fault: an empty prediction raises, or its row leaves the mean (A24)."""
    rows = score_rows([empty, "the cat", "the cat"], ["the cat", empty, "the cat"])
    assert rows == [ZERO, ZERO, ONE]
    assert mean_scores(rows)["rouge1"] == pytest.approx(1 / 3)
    assert score_rows([empty], [empty]) == [ZERO]


def test_other_scripts_are_scored():
    """Fault: identical Russian text scores 0.0, as with the default tokenizer (A24)."""
    text = "Премьер ушёл в отставку"
    assert package_scores(text, text) == ZERO
    assert score_rows([text, "Премьер уше\u0308л в отставку"], [text, text]) == [ONE, ONE]
    (half,) = score_rows(["премьер ушел в отпуск"], [text])  # two of four words: case does not count, ё does
    assert half["rouge1"] == 0.5 and half["rouge2"] == 0.0


def test_english_with_accents_is_unchanged():
    """Fault: the Unicode tokenizer changes English figures, which then compare with nobody's (A24)."""
    (row,) = score_rows(["the café in Zürich"], ["the cafe in Zurich"])
    assert round(row["rouge1"], 6) == 0.444444
    assert row == package_scores("the café in Zürich", "the cafe in Zurich")
    assert score_rows(["the cafe in Zurich"], ["the café in Zürich"]) == [row]


def test_scripts_without_spaces():
    """Fault: a Chinese sentence becomes one long word, so that anything but equality scores 0."""
    assert rouge.unicode_tokens("首相辞职。GDP 3%") == [*"首相辞职", "gdp", "3"]
    (row,) = score_rows(["首相辞职了"], ["首相辞职"])
    assert row["rouge1"] == pytest.approx(2 * 4 / 9)  # 4 hits, precision 4/5, recall 4/4
    assert rouge.unicode_tokens("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs stay in their word
    assert rouge.unicode_tokens("می‌خواهم") == ["میخواهم"]  # a joiner ends no word


def test_mean_is_over_rows():
    """Fault: row scores 1,1,1,1,0 in batches of 4 are averaged by batch: 0.5 instead of 0.8 (A24)."""
    assert mean_scores(score_rows(["the cat"] * 4 + [""], ["the cat"] * 5)) == dict.fromkeys(METRICS, 0.8)


# -- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "resamples"), [(1, 10), (37, 200), (3000, 700)])  # the last is drawn in two parts
def test_intervals_equal_a_plain_bootstrap(count, resamples):
    """Fault: means of wrong rows, ends at wrong ranks, or each metric with draws of its own."""
    values = random.Random(5)
    rows = [{"rouge1": values.random(), "rouge2": values.random()} for _ in range(count)]
    draws = np.random.default_rng(11).integers(count, size=(resamples, count)).tolist()
    actual = confidence_intervals(rows, resamples=resamples, seed=11, level=0.9)
    for metric in ("rouge1", "rouge2"):
        column = [row[metric] for row in rows]
        means = sorted(math.fsum(column[index] for index in draw) / count for draw in draws)
        assert actual.pop(metric) == pytest.approx([value_at(means, 0.05), value_at(means, 0.95)], abs=1e-12)
    assert not actual


def value_at(ordered, share):
    """The quantile between the two nearest ranks (Hyndman & Fan 1996, type 7)."""
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def test_paired_bootstrap_finds_no_null_difference():
    """Fault: chance passes for a difference: of 200 pairs of equal systems about 10 may have p < 0.05."""
    rng = np.random.default_rng(6)
    p_values = [paired_bootstrap(*rng.normal(0.4, 0.1, (2, 60)), resamples=400, seed=seed)["p_value"]
                for seed in range(200)]
    assert 2 <= sum(p_value < 0.05 for p_value in p_values) <= 22  # binomial: outside with probability < 1 in 500


def test_p_value_by_hand():
    """Fault: one-sided, or 0, or blind to ties: differences 1, 1, -1 have a mean at or below 0 in 7 of 27 resamples."""
    assert paired_bootstrap([1, 1, 0], [0, 0, 1], resamples=40_000)["p_value"] == pytest.approx(14 / 27, abs=0.01)
    steady = paired_bootstrap([1.0] * 5, [0.5] * 5, resamples=999)
    assert steady == {"difference": 0.5, "interval": [0.5, 0.5], "p_value": 2 / 1000}
    assert paired_bootstrap([1, 0], [1, 0]) == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    assert paired_bootstrap([1.0], [0.0])["p_value"] == 1.0


@pytest.mark.parametrize(("p_values", "adjusted"), [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]), ([0.7, 0.6], [1.0, 1.0]), ([0.02], [0.02]), ([], []),
])
def test_holm(p_values, adjusted):
    """Fault: Bonferroni (all times their number), ranks in the wrong order, values that fall again or pass 1."""
    assert holm(p_values) == pytest.approx(adjusted, abs=1e-15)


# -- lead-3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("article", [
    "Dr. Smith left.|He ran.",
    "Sen. Jo Lee and Mr. and Mrs. Ray met at No. 10.|They talked.",
    "George W. Bush spoke.|Then J. R. R. Tolkien wrote.|End.",
    "The U.S. Army left.|It came to the U.S.|The end came at 5 p.m. Monday.",
    "Ted Cruz Jr. spoke on Oct. 5 on Fifth Ave.|In Boston it rained.",
    "Sales rose 3.5 percent to $1.2 million.|3,000 people came.|Version 2.0 failed.",
    '"Why?" he asked.|"Go!"|She went.|"It is over," he said.',
    "He said “Stop.”|She did.|‘Why?’ he said.|(It was late.)|They left.",
    "Wait ... what?|Really?!|Yes… no.|Maybe.",
    "No stop at the end",
    "Rossi resigned .|Voters choose in June .|Who wins ?|Nobody knows .",  # tokenised texts
    "`` I resigned . ''|Voters chose Mr. Berg .|He paid $ 3.5 million .",
    'Why ? " he said .|They left .',
    "By .|Daily Mail Reporter .|PUBLISHED: .|12:00 EST .",  # documented: bylines count
])
def test_sentences_end_where_they_end(article):
    """Fault: a sentence ends after a title, an initial, a decimal or a quoted question, or runs on past its end."""
    sentences = article.split("|")
    assert lead_sentences(article.replace("|", " "), 9) == "\n".join(sentences)
    assert lead_sentences(article.replace("|", " ")) == "\n".join(sentences[:3])


def test_other_full_stops_and_white_space():
    """Fault: Hindi and Chinese text is one sentence; line breaks inside an article end up inside a sentence."""
    assert lead_sentences("首相辞职。选民将在六月投票。他走了！好。") == "首相辞职。\n选民将在六月投票。\n他走了！"
    assert lead_sentences("वह गया। वे आए। सब खुश थे।", 2) == "वह गया।\nवे आए।"
    assert lead_sentences("  Headline\n\n The cat\n sat.\tIt  purred. ", 9) == "Headline\nThe cat sat.\nIt purred."
    assert lead_sentences("") == lead_sentences(" \n\n ") == ""


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aB. ?!\"'”)\n1,"), max_size=40), st.integers(1, 4))
def test_lead_loses_no_text(article, n):
    """Fault: characters are lost or doubled between sentences, or a line is empty."""
    lines = lead_sentences(article, 99).split("\n")
    assert "".join(lines).replace(" ", "") == "".join(article.split())
    assert all(line == " ".join(line.split()) for line in lines) and (all(lines) or not article.strip())
    assert lead_sentences(article, n).split("\n") == lines[:n]
