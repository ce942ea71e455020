"""Speed of `utils.evaluation.rouge` beside the plain `rouge-score` package, with the same numbers.

    python -m benchmarks.rouge_speed --csv test.csv --rows 11490

scores the first three sentences of each article against its highlights; the table (without --csv: made-up news) is
repeated until there are enough rows. The first --sample rows are scored by both, in turns, in one process; before any
timing all their numbers must be equal. Then ours scores all rows, in as many processes as it takes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from data.articles import read_articles
from data.demo_news import SIZES, generate
from utils.cli import OneLineParser
from utils.evaluation.lead import lead_sentences
from utils.evaluation.rouge import METRICS, score_row, score_rows

Scores = list[dict[str, float]]


def load_pairs(csv: Path | None, rows: int) -> tuple[list[str], list[str]]:
    """(predictions, references): lead-3 and highlights."""
    if csv is None:
        table = generate(sizes=dict.fromkeys(SIZES, 1) | {"test": min(rows, 500)})["test"]
        texts = [(row["article"], row["highlights"]) for row in table]
    else:
        texts = [(row.article, row.highlights) for row in read_articles(csv)[0]]
    predictions = [lead_sentences(article) for article, _ in texts]
    return [list(islice(cycle(column), rows)) for column in (predictions, [highlights for _, highlights in texts])]


def package_rows(predictions: list[str], references: list[str]) -> Scores:
    """F-measures by `rouge-score` alone."""
    scorer = RougeScorer(METRICS, use_stemmer=True)
    scored = map(scorer.score, references, predictions)
    return [{metric: score.fmeasure for metric, score in scores.items()} for scores in scored]


def first_difference(expected: Scores, actual: Scores) -> str | None:
    """The first number that differs in any bit."""
    for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
        for metric in METRICS:
            if left[metric] != right[metric]:
                return f"row {index + 1}, {metric}: rouge-score gives {left[metric]!r}, ours {right[metric]!r}"
    return None


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each function in each round after the first, the functions taking turns."""
    timings = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [list(column) for column in zip(*timings[1:], strict=True)]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser("rouge_speed", description="Speed of utils.evaluation.rouge beside rouge-score.")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with id, article, highlights; default: made-up news")
    parser.add_argument("--rows", type=int, default=11_490, help="default: %(default)s, the test set of CNN/DailyMail")
    parser.add_argument("--sample", type=int, default=200, help="rows scored by both; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="at least 2, the first is dropped; default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 1 if a number differs."""
    options = parse_arguments(arguments)
    predictions, references = load_pairs(options.csv, options.rows)
    sample = predictions[: options.sample], references[: options.sample]
    if difference := first_difference(package_rows(*sample), list(map(score_row, *sample))):
        print(f"rouge_speed: error: {difference}", file=sys.stderr)
        return 1
    print(f"{len(sample[0])} rows, {len(METRICS)} metrics: all numbers equal to the last bit")
    ways = [lambda: package_rows(*sample), lambda: list(map(score_row, *sample))]
    for name, timings in zip(("rouge-score", "ours"), interleaved(ways, options.rounds), strict=True):
        low, median, high = (1000 * function(timings) / len(sample[0]) for function in (min, statistics.median, max))
        print(f"{name:<12} {median:.2f} ms a row ({low:.2f} to {high:.2f}), one process")
    print(f"{'ours':<12} {seconds(lambda: score_rows(predictions, references)):.1f} s for {len(predictions)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
