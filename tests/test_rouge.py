import csv
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from benchmarks import rouge_speed
from utils.evaluation import rouge
from utils.evaluation.rouge import METRICS, lead_sentences, score_rows

PACKAGE = RougeScorer(list(METRICS), use_stemmer=True)
ZERO = dict.fromkeys(METRICS, 0.0)
ONE = dict.fromkeys(METRICS, 1.0)
# Few distinct words, in several inflections, so that pairs share words, word pairs and stems.
WORDS = st.sampled_from(
    "the The cat cats running runs ran national nation rational relational ties dying a as s 3.5 1,000 U.S. don't "
    "x-ray skies news e-mail _ -- . generously".split()
)
LINES = st.lists(WORDS, max_size=8).map(" ".join)
NEWS_TEXTS = st.lists(LINES, max_size=5).map("\n".join)
ASCII_TEXTS = st.text(st.characters(max_codepoint=127), max_size=60)
LATIN_TEXTS = st.text(st.sampled_from("abcdeABC éüÉßſİK’\n"), max_size=40)


def package_scores(prediction, reference):
    return {metric: score.fmeasure for metric, score in PACKAGE.score(reference, prediction).items()}


def rows_of(values, metric="rouge1"):
    return [{metric: value} for value in values]


def error_of(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- equality with rouge-score -----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.one_of(NEWS_TEXTS, ASCII_TEXTS), st.one_of(NEWS_TEXTS, ASCII_TEXTS))
def test_equals_the_package_on_ascii(prediction, reference):
    """A score differs from rouge-score in its last bit: stems, repeated words, empty lines, choice among LCS."""
    assert score_rows([prediction], [reference]) == [package_scores(prediction, reference)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("ab"), max_size=24), st.lists(st.sampled_from("ab\n"), max_size=24))
def test_equals_the_package_where_many_lcs_tie(prediction, reference):
    """Of several LCS of one length another is taken, and the union over sentences changes rougeLsum."""
    for a, b in ((" ".join(prediction), " ".join(reference)), (" ".join(reference), " ".join(prediction))):
        assert score_rows([a], [b]) == [package_scores(a, b)]


@settings(max_examples=100, deadline=None)
@given(LATIN_TEXTS, LATIN_TEXTS)
def test_latin_text_stays_english(prediction, reference):
    """A few accents send an English row through the Unicode tokenizer, and its score is no longer rouge-score's."""
    letters = [character for character in reference if character.isalpha()]
    if 2 * sum(letter.isascii() for letter in letters) >= len(letters):
        assert score_rows([prediction], [reference]) == [package_scores(prediction, reference)]


def test_equals_the_package_on_real_rows(shared):
    """Real articles (quotes, dashes, accents, numbers) score otherwise than with rouge-score."""
    with (shared / "data" / "cnn_dm_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:60]
    leads = [lead_sentences(row["article"]) for row in rows]
    whole = [row["article"] for row in rows[:3]]  # some 500 words against 40
    predictions, references = leads + whole, [row["highlights"] for row in (*rows, *rows[:3])]
    expected = [package_scores(*pair) for pair in zip(predictions, references, strict=True)]
    assert score_rows(predictions, references) == expected
    assert 0.3 < rouge.mean_scores(score_rows(leads[:12], references[:12]))["rouge1"] < 0.38  # benchmarks.md: 0.340


def test_equals_the_package_past_its_memory():
    """A word dropped from the memory of stems, or one that shares its place, comes back with another stem."""
    tokenizer = rouge.EnglishTokenizer(cached_words=2)
    text = "running runs nationalities running relational flies running generously nationalities"
    assert tokenizer.tokenize(text) == "run run nation run relat fli run gener nation".split()
    custom = RougeScorer(list(METRICS), tokenizer=tokenizer).score("the cats ran", "a cat ran")
    assert custom == PACKAGE.score("the cats ran", "a cat ran")


# -- the cases of A24 --------------------------------------------------------------------------------------------


def test_rouge_lsum_needs_newlines():
    """Newlines are lost on the way, and exchanged sentences then cost rougeLsum half its value (A24)."""
    reference = "the minister resigned on monday\nvoters will choose a successor in june"
    prediction = "voters will choose a successor in june\nthe minister resigned on monday"
    (lines,) = score_rows([prediction], [reference])
    assert {name: round(value, 6) for name, value in lines.items()} == {
        "rouge1": 1.0, "rouge2": 0.909091, "rougeL": 0.583333, "rougeLsum": 1.0,
    }
    (one_line,) = score_rows([prediction.replace("\n", " ")], [reference.replace("\n", " ")])
    assert round(one_line["rougeLsum"], 6) == 0.583333
    stops = [text.replace("\n", ". ") + "." for text in (prediction, reference)]
    assert score_rows(stops[:1], stops[1:]) == [one_line]  # documented: full stops alone split nothing


@pytest.mark.parametrize("empty", ["", ".", "   ", "\n\n", "—"])
def test_empty_texts_count_as_zero(empty):
    """An empty prediction raises, or its row leaves the mean (A24)."""
    rows = score_rows([empty, "the cat", "the cat"], ["the cat", empty, "the cat"])
    assert rows == [ZERO, ZERO, ONE]
    assert rouge.mean_scores(rows)["rouge1"] == pytest.approx(1 / 3)
    assert score_rows([empty], [empty]) == [ZERO]


def test_other_scripts_are_scored():
    """Identical Russian text scores 0.0, as with the default tokenizer (A24)."""
    text = "Премьер ушёл в отставку"
    assert package_scores(text, text) == ZERO
    assert score_rows([text], [text]) == [ONE]
    (half,) = score_rows(["премьер ушел в отпуск"], [text])  # two of four words: case does not count, ё does
    assert half["rouge1"] == 0.5 and half["rouge2"] == 0.0
    nfd = "Премьер уше\u0308л в отставку"
    assert score_rows([nfd], [text]) == [ONE]


def test_english_with_accents_is_unchanged():
    """The Unicode tokenizer changes English figures: they would no longer compare with anyone's (A24)."""
    (row,) = score_rows(["the café in Zürich"], ["the cafe in Zurich"])
    assert round(row["rouge1"], 6) == 0.444444
    assert row == package_scores("the café in Zürich", "the cafe in Zurich")
    assert score_rows(["the cafe in Zurich"], ["the café in Zürich"]) == [row]


def test_scripts_without_spaces():
    """A Chinese sentence becomes one long word, so that anything but equality scores 0."""
    assert rouge.unicode_tokens("首相辞职。GDP 3%") == [*"首相辞职", "gdp", "3"]
    (row,) = score_rows(["首相辞职了"], ["首相辞职"])
    assert row["rouge1"] == pytest.approx(2 * 4 / 9)  # 4 hits, precision 4/5, recall 4/4
    assert rouge.unicode_tokens("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]  # vowel signs stay in their word
    assert rouge.unicode_tokens("می‌خواهم") == ["میخواهم"]  # a joiner ends no word


def test_special_tokens_lower_the_score():
    """Shows why special tokens are left out before scoring: the scorer takes them for words (A24)."""
    assert round(score_rows(["the cat sat<|endoftext|>"], ["the cat sat"])[0]["rouge1"], 6) == 0.857143


def test_mean_is_over_rows():
    """Row scores 1,1,1,1,0 in batches of 4 averaged by batch: 0.5 instead of 0.8 (A24)."""
    rows = score_rows(["the cat"] * 4 + [""], ["the cat"] * 5)
    assert rouge.mean_scores(rows) == dict.fromkeys(METRICS, 0.8)


# -- the bootstrap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "resamples"), [(1, 10), (37, 200), (3000, 700)])  # the last is drawn in two parts
def test_intervals_equal_a_plain_bootstrap(count, resamples):
    """Means of wrong rows, ends at wrong ranks, metrics drawn apart, or other draws where they come in parts."""
    values = random.Random(5)
    rows = [{"rouge1": values.random(), "rouge2": values.random()} for _ in range(count)]
    draws = np.random.default_rng(11).integers(count, size=(resamples, count)).tolist()
    expected = {}
    for metric in ("rouge1", "rouge2"):
        column = [row[metric] for row in rows]
        means = sorted(math.fsum(column[index] for index in draw) / count for draw in draws)
        expected[metric] = [value_at(means, 0.05), value_at(means, 0.95)]
    actual = rouge.confidence_intervals(rows, resamples=resamples, seed=11, level=0.9)
    assert actual.keys() == expected.keys()
    for metric, ends in expected.items():
        assert actual[metric] == pytest.approx(ends, abs=1e-12)


def value_at(ordered, share):
    """The quantile between the two nearest ranks (Hyndman & Fan 1996, type 7)."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_intervals_have_the_width_of_theory():
    """Intervals of single rows (too wide), or of another level: the mean of n values spreads by sd / sqrt(n)."""
    values = np.random.default_rng(3).normal(0.4, 0.1, size=400)
    low, high = rouge.confidence_intervals(rows_of(values.tolist()), resamples=4000)["rouge1"]
    expected = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - expected, abs=0.1 * expected)
    assert high == pytest.approx(values.mean() + expected, abs=0.1 * expected)


def test_same_seed_same_interval():
    """Two runs on the same predictions report different intervals; another seed gives the same draws."""
    rows, others = (rows_of(np.random.default_rng(seed).random(50).tolist()) for seed in (1, 2))
    first = rouge.confidence_intervals(rows, seed=1)
    assert rouge.confidence_intervals(rows, seed=1) == first != rouge.confidence_intervals(rows, seed=2)
    first = rouge.paired_bootstrap(rows, others, "rouge1", seed=1)
    assert rouge.paired_bootstrap(rows, others, "rouge1", seed=1) == first
    assert rouge.paired_bootstrap(rows, others, "rouge1", seed=2)["interval"] != first["interval"]


def test_paired_bootstrap_finds_a_real_difference():
    """Rows resampled apart: a steady gain of 0.02 drowns in rows that spread by 0.2."""
    rng = np.random.default_rng(4)
    base = rng.normal(0.4, 0.2, 200)
    better = base + rng.normal(0.02, 0.05, 200)
    result = rouge.paired_bootstrap(rows_of(better.tolist()), rows_of(base.tolist()), "rouge1", resamples=2000)
    assert result["difference"] == pytest.approx((better - base).mean())
    assert 0 < result["interval"][0] < result["difference"] < result["interval"][1]
    assert result["p_value"] < 0.01
    turned = rouge.paired_bootstrap(rows_of(base.tolist()), rows_of(better.tolist()), "rouge1", resamples=2000)
    assert turned["difference"] == -result["difference"] and turned["p_value"] == result["p_value"]
    assert turned["interval"] == pytest.approx([-end for end in reversed(result["interval"])])


def test_paired_bootstrap_finds_no_null_difference():
    """Chance passes for a difference: of 200 pairs of equal systems some 10 may have p < 0.05, not many more."""
    rng = np.random.default_rng(6)
    false_alarms = 0
    for seed in range(200):
        a, b = rng.normal(0.4, 0.1, (2, 60))
        result = rouge.paired_bootstrap(rows_of(a.tolist()), rows_of(b.tolist()), "rouge1", resamples=400, seed=seed)
        false_alarms += result["p_value"] < 0.05
        if result["p_value"] > 0.06:
            assert result["interval"][0] < 0 < result["interval"][1]
    assert 2 <= false_alarms <= 22  # binomial(200, 0.05 to 0.06): outside with probability below 1 in 500


def test_p_value_by_hand():
    """One-sided, zero without ties, or 0: differences 1, 1, -1 have a mean at or below 0 in 7 of 27 resamples."""
    rows_a, rows_b = rows_of([1.0, 1.0, 0.0]), rows_of([0.0, 0.0, 1.0])
    result = rouge.paired_bootstrap(rows_a, rows_b, "rouge1", resamples=40_000)
    assert result["p_value"] == pytest.approx(2 * 7 / 27, abs=0.01)
    steady = rouge.paired_bootstrap(rows_of([1.0] * 5), rows_of([0.5] * 5), "rouge1", resamples=999)
    assert steady == {"difference": 0.5, "interval": [0.5, 0.5], "p_value": 2 / 1000}
    same = rouge.paired_bootstrap(rows_a, rows_a, "rouge1", resamples=100)
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    assert rouge.paired_bootstrap(rows_of([1.0]), rows_of([0.0]), "rouge1")["p_value"] == 1.0


# -- lead-3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("article", [
    "Dr. Smith left.|He ran.",
    "Sen. Jo Lee and Mr. and Mrs. Ray met at No. 10.|They talked.",
    "George W. Bush spoke.|Then J. R. R. Tolkien wrote.|End.",
    "The U.S. Army left.|It came to the U.S.|The end came at 5 p.m. Monday.",
    "He lives in Washington, D.C.|He works.",
    "Ted Cruz Jr. spoke on Oct. 5 on Fifth Ave.|In Boston it rained.",
    "Sales rose 3.5 percent to $1.2 million.|3,000 people came.|Version 2.0 failed.",
    '"Why?" he asked.|"Go!"|She went.|"It is over," he said.',
    "He said “Stop.”|She did.|‘Why?’ he said.|(It was late.)|They left.",
    "Wait ... what?|Really?!|Yes… no.|Maybe.",
    "eBay shares rose. iPhone sales fell.|All cheered.",  # a lower-case name opens no sentence
    "No stop at the end",
    "One.|Two",
])
def test_sentences_end_where_they_end(article):
    """A sentence is cut after a title, an initial, a decimal or a quoted question, or runs on past its end."""
    sentences = article.split("|")
    assert lead_sentences(article.replace("|", " "), 9) == "\n".join(sentences)
    assert lead_sentences(article.replace("|", " "), 2) == "\n".join(sentences[:2])


@pytest.mark.parametrize("article", [
    "Rossi resigned .|Voters choose in June .|Who wins ?|Nobody knows .",
    "`` I resigned . ''|Voters chose Mr. Berg .|He paid $ 3.5 million .",
    "`` Why ? '' he said .|They left .",
    'Why ? " he said .|They left .',
    "By .|Daily Mail Reporter .|PUBLISHED: .|12:00 EST .",  # documented: bylines count
])
def test_tokenised_text_is_split_the_same_way(article):
    """Articles with spaces around their signs are not split, or a question within a quotation ends a sentence."""
    assert lead_sentences(article.replace("|", " "), 9).split("\n") == article.split("|")


def test_other_full_stops_and_white_space():
    """Hindi and Chinese text is one sentence; line breaks inside an article end up inside a highlight."""
    assert lead_sentences("首相辞职。选民将在六月投票。他走了！好。") == "首相辞职。\n选民将在六月投票。\n他走了！"
    assert lead_sentences("वह गया। वे आए। सब खुश थे।", 2) == "वह गया।\nवे आए।"
    assert lead_sentences("  Headline\n\n The cat\n sat.\tIt  purred. ", 9) == "Headline\nThe cat sat.\nIt purred."
    assert lead_sentences("") == lead_sentences(" \n\n ") == ""


def test_lead_takes_three():
    """The baseline of another length: lead-3 is what papers report (See et al., 2017)."""
    assert lead_sentences("One cat. Two dogs. Three cows. Four.") == "One cat.\nTwo dogs.\nThree cows."


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aB. ?!\"'”)\n1,"), max_size=40), st.integers(1, 4))
def test_lead_loses_no_text(article, n):
    """Characters are lost or doubled at a cut, a line is empty, or fewer sentences are no beginning of more."""
    lines = lead_sentences(article, 99).split("\n")
    assert "".join(lines).replace(" ", "") == "".join(article.split())
    assert all(line == " ".join(line.split()) for line in lines) and (all(lines) or not article.strip())
    assert lead_sentences(article, n).split("\n") == lines[:n]


# -- complaints --------------------------------------------------------------------------------------------------


def test_error_messages():
    """Wrong input passes, or the complaint does not name the argument, its value and what was expected."""
    assert error_of(score_rows, ["a"], []) == "1 predictions but 0 references: expected one each"
    assert error_of(score_rows, ["a", float("nan")], ["a", "b"]) == "predictions[1] is nan: expected a string"
    assert error_of(score_rows, ["a"], [None]) == "references[0] is None: expected a string"
    for function in (rouge.mean_scores, rouge.confidence_intervals):
        assert "no rows" in error_of(function, [])
    assert "no rows" in error_of(rouge.paired_bootstrap, [], [], "rouge1")
    row = rows_of([0.5])
    assert error_of(rouge.confidence_intervals, row, resamples=0) == "resamples is 0: expected at least 1"
    assert "level is 95: expected a fraction" in error_of(rouge.confidence_intervals, row, level=95)
    assert "rows_a has 1 rows and rows_b 2" in error_of(rouge.paired_bootstrap, row, row * 2, "rouge1")
    unknown = error_of(rouge.paired_bootstrap, row, row, "rougeX")
    assert unknown == "metric is 'rougeX': expected one of ['rouge1']"
    assert error_of(lead_sentences, "A b.", 0) == "n is 0: expected at least 1 sentence"
    assert score_rows([], []) == []


def test_benchmark_compares_before_it_times(capsys, monkeypatch):
    """Figures are printed for numbers that differ, by one bit too, or the usage errors are no single line."""
    assert rouge_speed.main(["--rows", "5", "--rounds", "2"]) == 0
    assert "5 pairs, 4 metrics, all numbers equal" in capsys.readouterr().out
    (row,) = score_rows(["the cat sat"], ["the cat"])
    other = row | {"rougeL": math.nextafter(row["rougeL"], 1)}
    assert "row 2, rougeL: rouge-score gives 0.8" in rouge_speed.first_difference([row, row], [row, other])
    monkeypatch.setattr(rouge_speed, "package_rows", lambda *pairs: [ZERO] * 5)
    assert rouge_speed.main(["--rows", "5", "--rounds", "2"]) == 1
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as caught:
        rouge_speed.main(["--rounds", "1"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
