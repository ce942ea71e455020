"""The tokenised splits of a config."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path

from data.articles import Article, BadRow, DataError, describe_bad_rows, iterate_articles, read_articles
from data.prompts import PromptFormat
from data.tokenized import TokenizedDataset, open_token_table
from model.language_model import LanguageModel
from utils.config.fine_tune import FineTuneConfig
from utils.files import write_json
from utils.progress import progress_bar
from utils.training.distributed import DistributedContext

GET_DATA = "python -m data.cnn_dailymail downloads CNN/DailyMail there; ./demo.sh shows everything without it"


def make_prompt_format(config: FineTuneConfig, language_model: LanguageModel) -> PromptFormat:
    """Template, tokenizer and row length of a config; also stored in the model's own config, for later predictions.

    Raises:
        DataError: max_length exceeds the model's context, or leaves no room for an article.
    """
    data, context = config.dataset_kwargs, language_model.context
    if data.max_length is not None and data.max_length > context:
        raise DataError(f"dataset_kwargs.max_length is {data.max_length}: the model's context is {context} tokens")
    prompt_format = PromptFormat(language_model.tokenizer, data.prompt_template, data.max_length or context)
    max_new_tokens = config.model_arch.generation_kwargs.max_generation_length
    language_model.record_training(prompt_format.template, prompt_format.max_length, max_new_tokens)
    return prompt_format


class TokenizedSplits:
    """Opens the tokenised tables of a run, every file once, and collects the rows that were skipped."""

    def __init__(self, config: FineTuneConfig, prompt_format: PromptFormat, context: DistributedContext, log):
        self.data, self.prompt_format, self.context, self.log = config.dataset_kwargs, prompt_format, context, log
        self.cache_dir = self.data.cache_dir or str(Path(config.trainer_kwargs.output_dir) / "token_cache")
        self.skipped: dict[str, list[dict]] = {}
        self.opened: dict[str, TokenizedDataset] = {}

    def path(self, name: str) -> Path:
        """The path of a file of the config. Raises DataError if it does not exist, with the way to get it."""
        path = Path(self.data.data_dir) / name
        if not path.exists():
            raise DataError(f"{path} does not exist (dataset_kwargs.data_dir and the file names in it): {GET_DATA}")
        return path

    def open(self, name: str) -> TokenizedDataset:
        """The rows of one file, tokenised by the main process while the others wait."""
        if name not in self.opened:
            path = self.path(name)
            if not self.context.is_main:
                self.context.barrier()
            with progress_bar(f"tokenising {path.name}", None, "row", is_main=self.context.is_main) as bar:
                table = self.opened[name] = open_token_table(
                    path, self.prompt_format, self.cache_dir, self.data.columns, self.data.on_bad_row, bar.update)
            if self.context.is_main:
                self.context.barrier()
            self.note_skipped(path, table.skipped, len(table))
        return self.opened[name]

    def first_texts(self, name: str) -> list[str]:
        """The beginnings of the first eight rows' articles and highlights."""
        rows = islice(iterate_articles(self.path(name), self.data.columns), 8)
        return [text[:200] for row in rows if isinstance(row, Article) for text in (row.article, row.highlights)]

    def articles(self, name: str) -> list[Article]:
        """The rows of a file as text, for predictions."""
        path = self.path(name)
        articles, bad_rows = read_articles(path, self.data.columns, self.data.on_bad_row)
        self.note_skipped(path, bad_rows, len(articles))
        return articles

    def note_skipped(self, path: Path, bad_rows: list[BadRow], good: int) -> None:
        """Log the skipped rows, once per file."""
        if bad_rows and str(path) not in self.skipped:
            self.log.info(f"skipped: {describe_bad_rows(path, bad_rows, good + len(bad_rows))}")
            self.skipped[str(path)] = [asdict(row) for row in bad_rows]

    def write_skipped(self, output_dir: Path) -> None:
        """`skipped_rows.json`: every skipped row, with the reason."""
        if self.skipped and self.context.is_main:
            write_json(output_dir / "skipped_rows.json", self.skipped)
