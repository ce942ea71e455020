"""Decode the articles of a table with a model and score them: predictions.json and scores.json."""

import time
from pathlib import Path

from data.articles import Article, BadRow, describe_bad_rows, read_articles
from data.prompts import DEFAULT_TEMPLATE, PromptFormat
from model.language_model import LanguageModel
from model.loading import check_same_architecture, has_tokenizer, load_language_model
from model.verify import verify_model
from utils.cli import quiet_libraries
from utils.config.validate_options import DEFAULT_LENGTH, LEAD_3, ValidateOptions
from utils.evaluation.evaluate import Generation, predict, score_lines, scored_predictions
from utils.evaluation.lead import lead_sentences
from utils.evaluation.weights import weights_of
from utils.files import json_text, sha256_text, write_text
from utils.manifest import check_model_folder
from utils.runs.folder_lock import check_not_a_run, lock_folder
from utils.runs.run_log import RunLog
from utils.text import printable
from utils.training.distributed import DistributedContext, init_distributed
from utils.training.out_of_memory import decoding_remedy, out_of_memory_remedy

RESULTS = ("predictions.json", "scores.json")


def score_table(options: ValidateOptions) -> int:
    quiet_libraries()
    output_dir = Path(options.output_dir)
    device = "auto" if options.device_id is None or options.device_id >= 0 else "cpu"
    context = init_distributed(device, options.device_id, options.precision, "--device_id")
    log = RunLog(output_dir)
    articles, bad_rows = read_articles(options.csv_path, options.columns, options.on_bad_row)
    check_not_a_run(output_dir, "--output_dir")
    with out_of_memory_remedy(decoding_remedy(options)), lock_folder(output_dir, "--output_dir"):
        return evaluate(options, articles, bad_rows, context, log)


def evaluate(
    options: ValidateOptions, articles: list[Article], bad_rows: list[BadRow], context: DistributedContext, log: RunLog
) -> int:
    """Decode, score, write, show; in the folder that this process holds."""
    output_dir = Path(options.output_dir)
    if bad_rows:
        log.info(f"skipped: {describe_bad_rows(options.csv_path, bad_rows, len(articles) + len(bad_rows))}")
    started = time.perf_counter()
    if options.model_path == LEAD_3:
        texts, max_new_tokens = [lead_sentences(row.article) for row in articles], None
        facts = {"prompt_template": None, "weights": {"sha256": None, "step": None}}
    else:
        texts, facts, max_new_tokens = model_predictions(options, articles, context, log)
    facts["seconds"] = round(time.perf_counter() - started, 3)
    records, scores = scored_predictions(articles, texts)
    predictions = json_text(records)
    scores |= {"skipped_rows": len(bad_rows), **facts,
               "settings": {**options.model_dump(), "max_generation_length": max_new_tokens},
               "predictions_sha256": {"predictions.json": sha256_text(predictions)}}
    # The scores last: by the SHA-256 in them utils.compare notices that they are not of these predictions.
    write_text(output_dir / "predictions.json", predictions)
    write_text(output_dir / "scores.json", json_text(scores))
    print("\n".join(score_lines(scores)))
    print(printable(f"written: {', '.join(str(output_dir / name) for name in RESULTS)}"))
    return 0


def model_predictions(
    options: ValidateOptions, articles: list[Article], context: DistributedContext, log: RunLog
) -> tuple[list[str], dict, int]:
    """(the generated highlights, what scores.json records of the model, maximum tokens of a summary)."""
    for line in (*context.notices, context.describe()):
        log.info(line)
    path = Path(options.model_path).resolve()  # a training may point the link to other weights meanwhile
    language_model = load_model(options).to(context.device)
    verify_model(language_model)
    template = language_model.prompt_template if options.prompt_template is None else options.prompt_template
    if template is None:
        template = DEFAULT_TEMPLATE
        log.info(f"the model does not say which prompt it was trained on: using --prompt_template {template!r}")
    max_length = min(language_model.prompt_max_length or language_model.context, language_model.context)
    prompt_format = PromptFormat(language_model.tokenizer, template, max_length)
    max_new_tokens = options.max_generation_length or language_model.max_new_tokens or DEFAULT_LENGTH
    if options.max_generation_length is None and not prompt_format.has_room(max_new_tokens):
        log.info(f"the model's folder records max_new_tokens {max_new_tokens}, which leaves no room for an article in "
                 f"{max_length} tokens: using --max_generation_length {DEFAULT_LENGTH}")
        max_new_tokens = DEFAULT_LENGTH
    generation = Generation(max_new_tokens, options.num_beams, options.early_stopping, options.batch_size)
    texts = predict(language_model, prompt_format, articles, generation, context)
    return texts, {
        "prompt_template": template, "prompt_max_length": max_length, "precision": context.precision,
        "device": str(context.device), "parameters": language_model.parameter_count(),
        "weights": {**weights_of(path), "path": str(Path(options.model_path).absolute())},
    }, max_new_tokens


def load_model(options: ValidateOptions) -> LanguageModel:
    """A folder or hub id as it is; a legacy .pt file into the architecture of model_name."""
    check_model_folder(options.model_name, "--model_name")
    if options.is_legacy_file:
        return load_language_model(options.model_name, weights=options.model_path)
    check_model_folder(options.model_path, "--model_path")
    own_tokenizer = not Path(options.model_path).is_dir() or has_tokenizer(options.model_path)
    language_model = load_language_model(
        options.model_path, tokenizer=None if own_tokenizer else options.model_name
    )
    if options.model_name is not None:
        check_same_architecture(language_model.model.config, options.model_name)
    return language_model
