"""The model that is trained: from a checkpoint of the run, or what `model_arch` asks for."""

from pathlib import Path

from model.language_model import LanguageModel, ModelError
from model.loading import load_language_model
from utils.config.fine_tune import FineTuneConfig
from utils.manifest import check_model_folder


def model_key(config: FineTuneConfig) -> str:
    """The config's key that names the model."""
    is_student = "student_lang_model" in type(config.model_arch).model_fields
    return f"model_arch.{'student_' if is_student else ''}lang_model"


def load_model(config: FineTuneConfig, checkpoint: Path | None) -> LanguageModel:
    """The model of `checkpoint`, if a run is resumed; else what model_arch asks for.

    Raises:
        ModelError, CheckpointError: one line that names the key.
    """
    arch = config.model_arch
    if checkpoint is not None:
        return load_language_model(str(checkpoint), dropout=arch.dropout)
    check_model_folder(arch.lang_model, model_key(config))
    check_model_folder(arch.tokenizer, "model_arch.tokenizer")
    try:
        return load_language_model(
            arch.lang_model, tokenizer=arch.tokenizer, from_scratch=arch.from_scratch, architecture=arch.architecture,
            dropout=arch.dropout,
        )
    except ModelError as error:
        keys = [model_key(config), *(["model_arch.tokenizer"] if arch.tokenizer else [])]
        raise ModelError(f"{' and '.join(keys)}: {error}") from error
