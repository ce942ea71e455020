"""Speed of `utils.evaluation.rouge` beside the `rouge-score` package, on the same pairs and with the same numbers.

    python -m benchmarks.rouge_speed --csv test.csv

scores the first three sentences of each article against its highlights: without --csv, of the demo's made-up news.
One core. The two take turns (A B A B ...), the first round is dropped, and before any timing every number of the one
must equal that of the other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from data.articles import DataError, read_articles
from data.demo_news import SIZES, generate
from utils.cli import OneLineParser
from utils.evaluation.rouge import METRICS, lead_sentences, score_rows

Scores = list[dict[str, float]]


def load_pairs(csv: Path | None, rows: int) -> tuple[list[str], list[str]]:
    """(predictions, references): lead-3 and highlights of the first `rows` rows of a CSV file, or of made-up news.

    Raises DataError for a file that cannot be read.
    """
    if csv is None:
        table = generate(sizes=dict.fromkeys(SIZES, 1) | {"test": rows})["test"]
        texts = [(row["article"], row["highlights"]) for row in table]
    else:
        articles, _ = read_articles(csv)
        texts = [(row.article, row.highlights) for row in articles[:rows]]
    return [lead_sentences(article) for article, _ in texts], [highlights for _, highlights in texts]


def package_rows(predictions: list[str], references: list[str]) -> Scores:
    """F-measures by `rouge-score`, in the form of `utils.evaluation.rouge.score_rows`."""
    scorer = RougeScorer(list(METRICS), use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return [
        {metric: score.fmeasure for metric, score in scorer.score(reference, prediction).items()}
        for prediction, reference in pairs
    ]


def first_difference(expected: Scores, actual: Scores) -> str | None:
    """One line about the first number that differs in any bit; None where all are equal."""
    for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
        for metric in METRICS:
            if left[metric] != right[metric]:
                return f"row {index + 1}, {metric}: rouge-score gives {left[metric]!r}, ours {right[metric]!r}"
    return None


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round after the first, the functions taking turns."""
    timings = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [list(column) for column in zip(*timings[1:], strict=True)]


def describe(name: str, timings: list[float]) -> str:
    """Median, minimum and maximum in milliseconds."""
    median, low, high = (1000 * value for value in (statistics.median(timings), min(timings), max(timings)))
    return f"{name:<12} median {median:7.1f} ms   min {low:7.1f} ms   max {high:7.1f} ms"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line. Exits with 2 and one line for a usage error."""
    parser = OneLineParser("rouge_speed", description="Speed of utils.evaluation.rouge beside the rouge-score package.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with id, article, highlights; default: made-up news")
    parser.add_argument("--rows", type=int, default=500, help="at most so many; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="the first is dropped; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error(f"--rows is {options.rows}: expected 1 or more")
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: expected 2 or more, since the first is dropped")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; returns 0, 1 where a number differs, 2 for a file that cannot be read."""
    options = parse_arguments(arguments)
    try:
        pairs = load_pairs(options.csv, options.rows)
    except DataError as error:
        print(f"rouge_speed: error: {error}", file=sys.stderr)
        return 2
    if difference := first_difference(package_rows(*pairs), score_rows(*pairs)):
        print(f"rouge_speed: error: {difference}", file=sys.stderr)
        return 1
    print(f"{len(pairs[0])} pairs, {len(METRICS)} metrics, all numbers equal to the last bit")
    theirs, ours = interleaved([lambda: package_rows(*pairs), lambda: score_rows(*pairs)], options.rounds)
    print(describe("rouge-score", theirs))
    print(describe("utils.evaluation.rouge", ours))
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"ratio of the medians {ratio:.2f} (by round {min(ratios):.2f} to {max(ratios):.2f}), {len(ours)} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
