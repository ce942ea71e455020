"""What is measured after each epoch: loss and perplexity on the validation set, ROUGE on its subset, predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data.articles import Article
from data.prompts import PromptFormat
from data.tokenized import TokenizedDataset
from utils.config.fine_tune import FineTuneConfig
from utils.evaluation.evaluate import Generation, articles_sha256, measure_loss, never, predict, scored_predictions
from utils.evaluation.rouge import METRICS
from utils.evaluation.weights import json_object, weights_of
from utils.files import json_text, sha256_text, write_text
from utils.training.distributed import DistributedContext


@dataclass(frozen=True)
class EvaluationSet:
    """name: "validation" or "test". table: rows for the loss. articles: rows for ROUGE; empty where none is asked.

    subset: the rows of adaptive loss scaling with metric perplexity; None: the table's.
    """

    name: str
    table: TokenizedDataset
    articles: list[Article]
    subset: TokenizedDataset | None = None


@dataclass
class Validation:
    """Evaluates the model in training on every set; writes predictions and `scores.json` into output_dir.

    on_bad_row: how the articles were read.
    """

    objective: nn.Module
    prompt_format: PromptFormat
    sets: list[EvaluationSet]
    generation: Generation
    context: DistributedContext
    log: object
    output_dir: Path
    save_predictions: bool = False
    on_bad_row: str = "error"

    def run(self, step: int, epoch: int, interrupted: Callable[[], bool] = never) -> dict[str, float]:
        """Measures all sets, logs them, and returns the metrics of the validation set ({} where there is none)."""
        results, scores, texts = {}, {}, {}
        for each in self.sets:
            metrics = self.losses(each.table, each.name, interrupted)
            if each.articles:
                records, scores[each.name] = self.predict_and_score(each, interrupted)
                metrics |= {key: scores[each.name][key] for key in (*METRICS, "facts") if key in scores[each.name]}
                scores[each.name] |= self.how_decoded()
                if self.save_predictions:
                    texts[f"predictions/{each.name}-step-{step}.json"] = json_text(records)
            self.log.record(each.name, step, epoch=epoch, **metrics)
            shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "cross_entropy")
            self.log.info(f"{each.name} after step {step}: {shown}")
            results[each.name] = metrics
        if scores and self.context.is_main:
            sums = {"predictions_sha256": {name: sha256_text(text) for name, text in texts.items()}}
            unsaved = {"sha256": None, "step": step}  # until a checkpoint holds them
            content = {"step": step, "weights": unsaved, **scores, **sums}
            self.write({**texts, "scores.json": json_text(content)})
        return results.get("validation", {})

    def losses(self, table: TokenizedDataset, name: str, interrupted: Callable[[], bool]) -> dict[str, float]:
        batch_size = self.generation.batch_size
        return measure_loss(self.objective, table, batch_size, self.context, interrupted, f"{name} loss")

    def predict_and_score(self, each: EvaluationSet, interrupted: Callable[[], bool]) -> tuple[list[dict], dict]:
        """(prediction records, which only the main process has; scores)."""
        texts = predict(
            self.objective.language_model, self.prompt_format, each.articles, self.generation, self.context,
            interrupted, f"{each.name} ROUGE",
        )
        records, scores = scored_predictions(each.articles, texts) if self.context.is_main else ([], None)
        return records, self.context.broadcast_object(scores)

    def how_decoded(self) -> dict:
        """What changes the predictions, under the names that validate_model.py gives it."""
        how = self.generation
        return {
            "prompt_template": self.prompt_format.template, "prompt_max_length": self.prompt_format.max_length,
            "precision": self.context.precision,
            "settings": {"max_generation_length": how.max_new_tokens, "num_beams": how.num_beams,
                         "early_stopping": how.early_stopping, "on_bad_row": self.on_bad_row},
        }

    def write(self, texts: dict[str, str]) -> None:
        """One file after the other, so that no scores are newer than their predictions."""
        for name, text in texts.items():
            path = self.output_dir / name
            path.parent.mkdir(exist_ok=True)  # not its parents: without them the run folder was removed
            write_text(path, text)

    def note_weights(self, checkpoint: Path) -> None:
        """Adds the weights saved in `checkpoint` to a `scores.json` that is of the same step and lacks them."""
        content, weights = json_object(self.output_dir / "scores.json"), weights_of(checkpoint)
        if content.get("weights") != {**weights, "sha256": None} or weights["sha256"] is None:
            return
        self.write({"scores.json": json_text({**content, "weights": weights})})

    def score(self, metric: str, interrupted: Callable[[], bool] = never) -> float | None:
        """One metric of the validation set, for adaptive loss scaling."""
        for each in self.sets:
            if each.name != "validation":
                continue
            if metric == "perplexity":
                return self.losses(each.subset or each.table, "loss scaling", interrupted)[metric]
            if each.articles:
                return self.predict_and_score(each, interrupted)[1][metric]
        return None

    def score_identity(self, metric: str) -> str | None:
        """What a score of the validation set is of, in words: of other rows, or decoded otherwise, it is another one.

        None where it is not measured.
        """
        how = self.generation
        decoding = f"max_generation_length {how.max_new_tokens}, num_beams {how.num_beams}, " + (
            f"early_stopping {how.early_stopping}")
        for each in self.sets:
            if each.name == "validation" and metric not in METRICS:
                return f"{metric} on {each.table.name}"
            if each.name == "validation" and each.articles:
                return f"{metric} on rows {articles_sha256(each.articles)[:16]}, {decoding}"
        return None


def score_identities(config: FineTuneConfig, validation: Validation) -> dict[str, str | None]:
    """What the scores that a checkpoint remembers are of; None if they are not measured."""
    options = config.trainer_kwargs
    judged_by = validation.score_identity(config.monitored_metric)
    scaled_by = validation.score_identity(options.scaling_metric) if options.adaptive_loss_scaling else None
    return {"judged_by": judged_by and f"{config.callbacks_kwargs.kwargs.mode} {judged_by}", "scaled_by": scaled_by}
