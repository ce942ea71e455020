"""Loss, predictions and scores of a model on rows it is not trained on. Nothing here changes the training."""

import json
import math
import re
from collections import Counter
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
from utils.evaluation.rouge import METRICS, score_rows
from utils.evaluation.statistics import confidence_intervals, mean_scores
from utils.progress import progress_bar
from utils.training.distributed import DistributedContext
from utils.training.nonfinite import NotFinite
from utils.training.random_state import forked_random_state
from utils.training.signals import Interrupted


@dataclass(frozen=True)
class Generation:
    """How to decode: greedily if num_beams is 1."""

    max_generation_length: int
    num_beams: int
    early_stopping: bool
    batch_size: int


def never() -> bool:
    return False


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; restores training mode and the random generators."""
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
        NotFinite: the loss, on every process.
        Interrupted: `interrupted` returned True between two batches.
    """
    batches = evaluation_batches(table.lengths, batch_size)[context.rank :: context.world_size]
    pad_id = objective.language_model.tokenizer.pad_token_id
    sums: Counter[str] = Counter()
    bad_rows: list[int] = []
    bar = progress_bar(name, len(batches), "batch", is_main=context.is_main)
    with evaluation_mode(objective), bar:
        steps = objective.iter_steps(table, load_batches(table, batches, pad_id), [1] * len(batches))
        for rows, arguments in zip(batches, chain.from_iterable(steps), strict=True):
            if interrupted():
                raise Interrupted
            with context.autocast():
                terms = objective(*arguments)
            loss = float(terms.loss_sum)
            sums.update({"loss": loss, "tokens": terms.token_count})
            sums.update({part: float(value) for part, value in terms.parts.items()})
            if not math.isfinite(loss):
                bad_rows += map(int, rows)
            bar.update()
    totals: Counter[str] = Counter()  # of all processes; one without batches knows no parts
    for process_sums in context.all_gather_object(sums):
        totals.update(process_sums)
    tokens = totals.pop("tokens")
    means = {part: value / tokens for part, value in totals.items()}
    if not math.isfinite(means["loss"]):
        raise NotFinite(name, means["loss"], table, bad_rows)
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
    prompts = prompt_format.prediction_prompts([row.article for row in articles], generation.max_generation_length)
    own_rows = range(context.rank, len(prompts), context.world_size)
    bar = progress_bar(name, len(own_rows), "row", is_main=context.is_main)
    generated = 0

    def progress(rows: int, tokens: int) -> None:
        nonlocal generated
        if interrupted():
            raise Interrupted
        generated += tokens
        bar.update(rows)
        if elapsed := bar.format_dict["elapsed"]:
            bar.set_postfix_str(f"{generated / elapsed:,.0f} tokens/s", refresh=False)

    arguments = [language_model, [prompts[row] for row in own_rows], generation.max_generation_length]
    options = {"batch_size": generation.batch_size, "progress": progress}
    with evaluation_mode(language_model), bar, context.autocast():
        if generation.num_beams > 1:
            ids = beam_search(*arguments, num_beams=generation.num_beams, early_stopping=generation.early_stopping,
                              **options)
        else:
            ids = greedy_decode(*arguments, **options)
    texts = [""] * len(prompts)
    for rank, process_texts in enumerate(context.all_gather_object(list(map(prompt_format.decode, ids)))):
        texts[rank :: context.world_size] = process_texts
    return texts


def scored_predictions(articles: list[Article], texts: list[str]) -> tuple[list[dict], dict]:
    """(prediction records, scores): means over rows with bootstrap 95 % intervals, and the share of facts.

    `facts` is scored if the CSV has such a column: JSON lists of strings that the highlights contain.
    """
    rows = score_rows(texts, [article.highlights for article in articles])
    scores = {**mean_scores(rows), "confidence_intervals": confidence_intervals(rows), "rows": len(rows),
              "articles_sha256": articles_sha256(articles)}
    facts = [article.extra["facts"] for article in articles if "facts" in article.extra]
    if len(facts) == len(texts) and (share := fact_share(texts, facts)) is not None:
        scores["facts"] = share
    return list(map(prediction_record, articles, texts, rows)), scores


def prediction_record(article: Article, text: str, rouge: dict[str, float]) -> dict:
    """An entry of `predictions.json`; extra columns of the CSV are carried along."""
    extra = article.extra
    sentiment = extra.get("sentiment_label", extra.get("sentiment"))
    record = {"id": article.id, "article": article.article, "target_highlight": article.highlights,
              "generated_highlight": text, "rouge": rouge, "sentiment": sentiment,
              "length_bucket": extra.get("length_bucket"), "category": extra.get("category")}
    return record | {key: value for key, value in extra.items() if key not in record}


def articles_sha256(articles: list[Article]) -> str:
    """SHA-256 (64 hexadecimal digits) of the texts that ROUGE depends on: articles and targets, in order."""
    digest = sha256()
    for row in articles:
        digest.update(json.dumps([row.article, row.highlights]).encode())
    return digest.hexdigest()


def score_lines(scores: dict) -> list[str]:
    """The scores of `scored_predictions`, for the console."""
    lines = [f"{scores['rows']} rows, mean F-measure with 95 % interval"]
    for metric in METRICS:
        low, high = scores["confidence_intervals"][metric]
        lines.append(f"  {metric:<10} {scores[metric]:.4f}   {low:.4f} to {high:.4f}")
    return [*lines, f"  {'facts':<10} {scores['facts']:.4f}"] if "facts" in scores else lines


def fact_share(texts: list[str], facts: list[str]) -> float | None:
    """Share of all facts (a JSON list of strings per row) that their row's text contains as whole words.

    None if there are no facts, or if `facts` is something else.
    """
    try:
        lists = [json.loads(values) for values in facts]
        if not all(isinstance(values, list) for values in lists):
            return None
        found = [holds_words(text, value) for text, values in zip(texts, lists, strict=True) for value in values]
    except (ValueError, TypeError, RecursionError):
        return None
    return sum(found) / len(found) if found else None


def holds_words(text: str, words: str) -> bool:
    """Whether the text contains the words, not as a part of longer ones."""
    return words in text and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
