"""A config's CSVs as token tables and evaluation sets."""

from dataclasses import asdict
from pathlib import Path

from data.articles import Article, DataError, describe_bad_rows, read_articles
from data.prompts import PromptFormat
from data.token_cache import TokenTable, open_token_table
from model.language_model import LanguageModel
from utils.config import FineTuneConfig
from utils.devices import Place
from utils.files import write_json
from utils.run_log import RunLog, progress_bar
from utils.validation import EvaluationSet

GET_DATA = "python -m data.cnn_dailymail downloads CNN/DailyMail there; ./demo.sh shows everything without it"


def make_prompt_format(config: FineTuneConfig, language_model: LanguageModel) -> PromptFormat:
    """Template, tokenizer and row length of a config; recorded with the model, so that they travel with its weights.

    Raises:
        DataError: max_length over the model's context, or no room for an article.
    """
    data, context = config.dataset_kwargs, language_model.context
    if data.max_length is not None and data.max_length > context:
        raise DataError(f"dataset_kwargs.max_length is {data.max_length}: the model's context is {context} tokens")
    prompt_format = PromptFormat(language_model.tokenizer, data.prompt_template, data.max_length or context)
    language_model.record_training(prompt_format.template, prompt_format.max_length)
    return prompt_format


class Tables:
    """Opens the token tables of a run, each CSV once, and keeps count of the rows that were left out."""

    def __init__(self, config: FineTuneConfig, prompt_format: PromptFormat, place: Place, log: RunLog):
        self.data, self.prompt_format, self.place, self.log = config.dataset_kwargs, prompt_format, place, log
        self.cache_dir = self.data.cache_dir or str(Path(config.trainer_kwargs.output_dir) / "token_cache")
        self.skipped: dict[str, list[dict]] = {}

    def path(self, name: str) -> Path:
        """The CSV of a config's file name. Raises DataError where it is not there, naming the way to get it."""
        path = Path(self.data.data_dir) / name
        if not path.is_file():
            raise DataError(f"{path} does not exist (dataset_kwargs.data_dir and the file names in it): {GET_DATA}")
        return path

    def open(self, name: str) -> TokenTable:
        """The table of one CSV; tokenised by the main process, the others wait."""
        path = self.path(name)
        if self.place.is_main:
            self.tokenise(path)
        self.place.wait_for_all()
        table = self.tokenise(path, quiet=True)
        if table.skipped:
            total = len(table) + len(table.skipped)
            self.log.say(f"skipped: {describe_bad_rows(path, table.skipped, total)}")
            self.skipped[str(path)] = [asdict(row) for row in table.skipped]
        return table

    def tokenise(self, path: Path, quiet: bool = False) -> TokenTable:
        bar = progress_bar(f"tokenising {path.name}", None, "row", is_main=self.place.is_main and not quiet)
        with bar:
            return open_token_table(
                path, self.prompt_format, self.cache_dir, self.data.columns, self.data.on_bad_row, bar.update
            )

    def articles(self, name: str) -> list[Article]:
        """The rows of a CSV for predictions."""
        return read_articles(self.path(name), self.data.columns, self.data.on_bad_row)[0]

    def write_skipped(self, output_dir: Path) -> None:
        """`skipped_rows.json`: every row left out, with its reason."""
        if self.skipped and self.place.is_main:
            write_json(output_dir / "skipped_rows.json", self.skipped)


def evaluation_sets(config: FineTuneConfig, tables: Tables) -> list[EvaluationSet]:
    """What is measured after each epoch, by `monitor_val` and `monitor_test`."""
    data, options = config.dataset_kwargs, config.trainer_kwargs
    rouge = "rouge" in options.metrics
    sets = []
    if options.monitor_val and data.validation_dataset:
        subset = data.validation_subset or data.validation_dataset
        articles = tables.articles(subset) if rouge else []
        sets.append(EvaluationSet("validation", tables.open(data.validation_dataset), articles))
    if options.monitor_test and data.test_dataset:
        articles = tables.articles(data.test_dataset) if rouge else []
        sets.append(EvaluationSet("test", tables.open(data.test_dataset), articles))
    return sets
