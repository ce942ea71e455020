"""The model that is trained: from a checkpoint of the run, or what `model_arch` asks for."""

from pathlib import Path

from model.errors import ModelError
from model.language_model import LanguageModel
from model.loading import load_language_model
from model.verify import verify_model
from utils.config.fine_tune import FineTuneConfig
from utils.manifest import check_model_folder
from utils.training.distributed import DistributedContext


def arch_key(config: FineTuneConfig, name: str) -> str:
    """The config's key of a setting of the model that is trained; in a distillation it is the student's."""
    is_student = f"student_{name}" in type(config.model_arch).model_fields
    return f"model_arch.{'student_' if is_student else ''}{name}"


def load_model(config: FineTuneConfig, checkpoint: Path | None) -> LanguageModel:
    """The model of `checkpoint`, if a run is resumed; else what model_arch asks for.

    Raises:
        ModelError, CheckpointError: one line that names the key.
    """
    arch = config.model_arch
    if checkpoint is not None:
        return load_language_model(str(checkpoint), dropout=arch.dropout)
    key = arch_key(config, "lang_model")
    check_model_folder(arch.lang_model, key)
    check_model_folder(arch.tokenizer, "model_arch.tokenizer")
    try:
        return load_language_model(
            arch.lang_model, tokenizer=arch.tokenizer, from_scratch=arch.from_scratch, architecture=arch.architecture,
            dropout=arch.dropout,
        )
    except ModelError as error:
        raise ModelError(f"{key}{' and model_arch.tokenizer' if arch.tokenizer else ''}: {error}") from error


def prepare_model(
    language_model: LanguageModel, config: FineTuneConfig, context: DistributedContext, log, resumed: bool
) -> LanguageModel:
    """The model on its device, verified, with the options of its forward pass; log: a `RunLog`."""
    arch = config.model_arch
    # A checkpoint keeps its rows, for its optimizer state, and model_arch.architecture the rows that it asks for.
    keeps_rows = resumed or "vocab_size" in arch.architecture
    if not keeps_rows and (removed := language_model.remove_unused_rows()) > 0:
        log.info(f"embedding: {removed} rows that no token of the tokenizer uses are removed")
    language_model.to(context.device)
    language_model.pack_rows, language_model.prune_last_block = arch.pack_rows, arch.prune_last_block
    verify_model(language_model)
    if config.trainer_kwargs.compile:
        language_model.compile_forward()
    return language_model
