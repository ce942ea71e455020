"""What is measured after each epoch: loss and perplexity on the validation set, ROUGE on its subset, predictions."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from data.prompts import PromptFormat
from utils.config.fine_tune import FineTuneConfig
from utils.evaluation.evaluate import Generation, articles_sha256, measure_loss, never, predict, scored_predictions
from utils.evaluation.rouge import METRICS
from utils.evaluation.splits import TokenizedSplits
from utils.evaluation.weights import json_object, weights_of
from utils.files import json_text, sha256_text, write_text
from utils.training.distributed import DistributedContext


def measured_datasets(config: FineTuneConfig) -> dict[str, str]:
    """{"validation", "test", "loss scaling": its file}, of the sets whose loss is measured."""
    data, options, files = config.dataset_kwargs, config.trainer_kwargs, {}
    if options.monitor_val:
        files["validation"] = data.validation_dataset
        if options.adaptive_loss_scaling and options.adaptive_loss_metric == "perplexity":
            files["loss scaling"] = data.validation_subset or data.validation_dataset
    if options.monitor_test:
        files["test"] = data.test_dataset
    return files


class Validation:
    """Evaluates the model in training on every set; writes predictions and `scores.json` into output_dir.

    Raises DataError for a table that cannot be used, and if max_generation_length leaves no room for an article.
    """

    def __init__(
        self, config: FineTuneConfig, objective: nn.Module, prompt_format: PromptFormat, splits: TokenizedSplits,
        context: DistributedContext, log,
    ):
        data, options, decoding = config.dataset_kwargs, config.trainer_kwargs, config.model_arch.generation_kwargs
        self.config, self.objective, self.prompt_format = config, objective, prompt_format
        self.context, self.log, self.output_dir = context, log, Path(options.output_dir)
        self.generation = Generation(**decoding.model_dump(), batch_size=data.val_batch_size)
        self.tables = {name: splits.open(file) for name, file in measured_datasets(config).items()}
        rouge_files = {"validation": data.validation_subset or data.validation_dataset, "test": data.test_dataset}
        self.articles = {name: splits.articles(file) for name, file in rouge_files.items()
                         if name in self.tables and "rouge" in options.metrics}
        if self.articles:
            prompt_format.prediction_prompts([], self.generation.max_generation_length)

    def run(self, step: int, epoch: int, interrupted: Callable[[], bool] = never) -> dict[str, float]:
        """Measures all sets, logs them, and returns the metrics of the validation set ({} if there is none)."""
        results, scores, texts = {}, {}, {}
        for name in ("validation", "test"):
            if name not in self.tables:
                continue
            metrics = results[name] = self.losses(name, f"{name} loss", interrupted)
            if name in self.articles:
                records, scores[name] = self.predict_and_score(name, interrupted)
                metrics |= {key: scores[name][key] for key in (*METRICS, "facts") if key in scores[name]}
                scores[name] |= self.how_decoded()
                if self.config.trainer_kwargs.save_predictions:
                    texts[f"predictions/{name}-step-{step}.json"] = json_text(records)
            self.log.record(name, step, epoch=epoch, **metrics)
            shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "cross_entropy")
            self.log.info(f"{name} after step {step}: {shown}")
        if scores and self.context.is_main:
            sums = {"predictions_sha256": {name: sha256_text(text) for name, text in texts.items()}}
            unsaved = {"sha256": None, "step": step}  # until a checkpoint holds them
            content = {"step": step, "weights": unsaved, **scores, **sums}
            self.write({**texts, "scores.json": json_text(content)})
        return results.get("validation", {})

    def losses(self, name: str, title: str, interrupted: Callable[[], bool]) -> dict[str, float]:
        batch_size = self.generation.batch_size
        return measure_loss(self.objective, self.tables[name], batch_size, self.context, interrupted, title)

    def predict_and_score(self, name: str, interrupted: Callable[[], bool]) -> tuple[list[dict], dict]:
        """(prediction records, which only the main process has; scores)."""
        texts = predict(self.objective.language_model, self.prompt_format, self.articles[name], self.generation,
                        self.context, interrupted, f"{name} ROUGE")
        records, scores = scored_predictions(self.articles[name], texts) if self.context.is_main else ([], None)
        return records, self.context.broadcast_object(scores)

    def how_decoded(self) -> dict:
        """What changes the predictions, under the names that validate_model.py gives it."""
        return {
            "prompt_template": self.prompt_format.template, "prompt_max_length": self.prompt_format.max_length,
            "precision": self.context.precision,
            "settings": {**self.config.model_arch.generation_kwargs.model_dump(),
                         "on_bad_row": self.config.dataset_kwargs.on_bad_row},
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

    def score(self, metric: str, interrupted: Callable[[], bool] = never) -> float:
        """One metric of the validation set, for adaptive loss scaling."""
        if metric == "perplexity":
            return self.losses("loss scaling", "loss scaling loss", interrupted)[metric]
        return self.predict_and_score("validation", interrupted)[1][metric]

    def score_identity(self, metric: str) -> str | None:
        """What a score of the validation set is of: on other rows, or decoded differently, it is another score.

        None if it is not measured.
        """
        if "validation" not in self.tables:
            return None
        if metric not in METRICS:
            return f"{metric} on {self.tables['validation'].name}"
        decoding = ", ".join(f"{key} {value}" for key, value in self.config.model_arch.generation_kwargs)
        return f"{metric} on rows {articles_sha256(self.articles['validation'])[:16]}, {decoding}"


def score_identities(config: FineTuneConfig, validation: Validation) -> dict[str, str | None]:
    """What the scores that a checkpoint remembers are of; None if they are not measured."""
    options = config.trainer_kwargs
    judged_by = validation.score_identity(config.monitored_metric)
    scaled_by = validation.score_identity(options.adaptive_loss_metric) if options.adaptive_loss_scaling else None
    return {"judged_by": judged_by and f"{config.callbacks_kwargs.kwargs.mode} {judged_by}", "scaled_by": scaled_by}
