"""Loss, predictions and scores of a model on rows it is not trained on. Nothing here changes the training."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain

import torch
from torch import nn

from data.articles import Article
from data.batches import evaluation_batches, load_batches
from data.prompts import PromptFormat
from data.tokenized import TokenizedDataset
from model.decoding.loop import beam_search, evaluating, greedy_decode
from model.language_model import LanguageModel
from utils.evaluation import rouge
from utils.runs.run_log import progress_bar
from utils.training.distributed import DistributedContext
from utils.training.random_state import forked_random_state


class Interrupted(Exception):
    """A signal asked to stop in the middle of an evaluation."""


class NotFinite(Exception):
    """A loss that was measured is NaN or infinite. rows: of `table`, in this process's batches with such a loss."""

    def __init__(self, name: str, loss: float, table: TokenizedDataset, rows: list[int]):
        super().__init__(f"the {name} is {loss}")
        self.name, self.loss, self.table, self.rows = name, loss, table, rows


@dataclass(frozen=True)
class Generation:
    """How to decode: greedy where num_beams is 1."""

    max_new_tokens: int = 80
    num_beams: int = 1
    early_stopping: bool = False
    batch_size: int = 8


def never() -> bool:
    return False


@contextmanager
def apart(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; modes and random generators afterwards as before."""
    with forked_random_state(), evaluating(module), torch.no_grad():
        yield


def measure_loss(
    objective: nn.Module,
    table: TokenizedDataset,
    batch_size: int,
    context: DistributedContext,
    interrupted: Callable[[], bool] = never,
    name: str = "validation loss",
) -> dict[str, float]:
    """Means over all label tokens of the table: the loss, its parts, and perplexity = exp(cross-entropy).

    Raises:
        NotFinite: the loss; on every process of a group.
        Interrupted: `interrupted` said so between two batches.
    """
    batches = evaluation_batches(table.lengths, batch_size)[context.rank :: context.world_size]
    pad_id = objective.language_model.tokenizer.pad_token_id
    sums: dict[str, float] = {}
    bad: list[int] = []
    bar = progress_bar(name, len(batches), "batch", is_main=context.is_main)
    with apart(objective), bar:
        steps = objective.iter_steps(table, load_batches(table, batches, pad_id), [1] * len(batches))
        for rows, arguments in zip(batches, chain.from_iterable(steps), strict=True):
            if interrupted():
                raise Interrupted
            with context.autocast():
                terms = objective(*arguments)
            values = {"loss": terms.loss_sum, **terms.parts, "tokens": terms.token_count}
            for part, value in values.items():
                values[part] = float(value)
                sums[part] = sums.get(part, 0.0) + values[part]
            if not math.isfinite(values["loss"]):
                bad += map(int, rows)
            bar.update()
    totals: dict[str, float] = {}
    for of_process in context.all_gather_object(sums):
        for part, value in of_process.items():
            totals[part] = totals.get(part, 0.0) + value
    tokens = totals.pop("tokens")
    means = {part: value / tokens for part, value in totals.items()}
    if not math.isfinite(means["loss"]):
        raise NotFinite(name, means["loss"], table, bad)
    nats = means.get("cross_entropy", means["loss"])
    return {**means, "perplexity": math.exp(nats) if nats < 700 else math.inf}


def predict(
    language_model: LanguageModel,
    prompt_format: PromptFormat,
    articles: list[Article],
    generation: Generation,
    context: DistributedContext,
    interrupted: Callable[[], bool] = never,
    name: str = "predictions",
) -> list[str]:
    """The generated highlights of each article, in order, on every process."""
    prompts = prompt_format.prediction_prompts([row.article for row in articles], generation.max_new_tokens)
    own = range(context.rank, len(prompts), context.world_size)
    bar = progress_bar(name, len(own), "row", is_main=context.is_main)
    made = 0

    def progress(rows: int, tokens: int) -> None:
        nonlocal made
        if interrupted():
            raise Interrupted
        made += tokens
        bar.update(rows)
        if elapsed := bar.format_dict["elapsed"]:
            bar.set_postfix_str(f"{made / elapsed:,.0f} tokens/s", refresh=False)

    arguments = [language_model, [prompts[row] for row in own], generation.max_new_tokens]
    options = {"batch_size": generation.batch_size, "progress": progress}
    with apart(language_model), bar, context.autocast():
        if generation.num_beams > 1:
            beams = {"num_beams": generation.num_beams, "early_stopping": generation.early_stopping}
            ids = beam_search(*arguments, **beams, **options)
        else:
            ids = greedy_decode(*arguments, **options)
    texts = [""] * len(prompts)
    for of_process in context.all_gather_object(dict(zip(own, map(prompt_format.decode, ids), strict=True))):
        for row, text in of_process.items():
            texts[row] = text
    return texts


def prediction_records(articles: list[Article], texts: list[str], scores: list[dict[str, float]]) -> list[dict]:
    """What `predictions.json` holds for each row: extra columns of the CSV are carried along."""
    records = []
    for article, text, score in zip(articles, texts, scores, strict=True):
        extra = article.extra
        sentiment = extra.get("sentiment_label", extra.get("sentiment"))
        named = {"id": article.id, "article": article.article, "target_highlight": article.highlights,
                 "generated_highlight": text, "rouge": score, "sentiment": sentiment,
                 "length_bucket": extra.get("length_bucket"), "category": extra.get("category")}
        records.append({**named, **{key: value for key, value in extra.items() if key not in named}})
    return records


def scored_predictions(articles: list[Article], texts: list[str]) -> tuple[list[dict], dict]:
    """(prediction records, scores): means over rows with bootstrap 95 % intervals, and the share of facts.

    `facts` is scored where the CSV has such a column: JSON lists of strings that the highlights hold.
    """
    rows = rouge.score_rows(texts, [row.highlights for row in articles])
    scores = {**rouge.mean_scores(rows), "confidence_intervals": rouge.confidence_intervals(rows), "rows": len(rows),
              "articles_sha256": articles_sha256(articles)}
    facts = [row.extra["facts"] for row in articles if "facts" in row.extra]
    if len(facts) == len(texts) and (share := fact_share(texts, facts)) is not None:
        scores["facts"] = share
    return prediction_records(articles, texts, rows), scores


def articles_sha256(articles: list[Article]) -> str:
    """The SHA-256, as 64 hexadecimal digits, of the texts that ROUGE depends on: articles and targets, in order."""
    digest = sha256()
    for row in articles:
        digest.update(json.dumps([row.article, row.highlights]).encode())
    return digest.hexdigest()


def score_lines(scores: dict) -> list[str]:
    """What `scored_predictions` gives, for the console."""
    lines = [f"{scores['rows']} rows, mean F-measure with 95 % interval"]
    for metric in rouge.METRICS:
        low, high = scores["confidence_intervals"][metric]
        lines.append(f"  {metric:<10} {scores[metric]:.4f}   {low:.4f} to {high:.4f}")
    return [*lines, f"  {'facts':<10} {scores['facts']:.4f}"] if "facts" in scores else lines


def fact_share(texts: list[str], facts: list[str]) -> float | None:
    """Share of all facts (JSON lists of strings, one list a row) that stand in their row's text as whole words.

    None where a list cannot be read, or where there are no facts at all.
    """
    found = total = 0
    for text, listed in zip(texts, facts, strict=True):
        try:
            values = json.loads(listed)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return None
        total += len(values)
        found += sum(holds_words(text, value) for value in values)
    return found / total if total else None


def holds_words(text: str, words: str) -> bool:
    """Whether the words stand in the text, not as a part of longer ones."""
    # The first look keeps what a stranger wrote from becoming an expression that is larger than the text.
    return words in text and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
