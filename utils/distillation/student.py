"""Where a student's weights come from: a checkpoint of this run, a given one, the teacher's blocks, or its own."""

from pathlib import Path

from model.errors import ModelError
from model.language_model import LanguageModel
from model.loading import (
    DEMO_SHAPES,
    GPT2_SHAPES,
    check_same_architecture,
    has_tokenizer,
    load_language_model,
    model_config,
)
from model.student_init import copy_teacher_layers
from utils.config.distill import DistillConfig
from utils.distillation.teacher import TeacherSource, check_weights_path
from utils.manifest import check_model_folder
from utils.training.load_model import load_model

KEY = "trainer_kwargs.student_ckpt_path"


def load_student(config: DistillConfig, checkpoint: Path | None, source: TeacherSource) -> LanguageModel:
    """The student on the CPU; of `checkpoint` if a run is resumed.

    Raises:
        ModelError: one line that names the key.
    """
    if checkpoint is not None:
        return load_model(config, checkpoint)
    if config.distillation_kwargs.student_init is not None:
        return from_teacher_layers(config, source)
    if config.trainer_kwargs.student_ckpt_path is not None:
        return from_checkpoint(config, config.trainer_kwargs.student_ckpt_path)
    return load_model(config, checkpoint)


def from_checkpoint(config: DistillConfig, path: str) -> LanguageModel:
    """The weights of a folder or of a legacy `.pt` state dict, which must be those of a `student_lang_model`."""
    arch = config.model_arch
    try:
        otherwise = "or null, for the weights of student_lang_model"
        check_weights_path(path, config.trainer_kwargs.output_dir, otherwise)
        check_model_folder(path, KEY)
        if path.endswith(".pt"):
            return load_language_model(
                arch.lang_model, weights=path, tokenizer=arch.tokenizer, dropout=arch.dropout
            )
        if arch.lang_model in GPT2_SHAPES | DEMO_SHAPES or Path(arch.lang_model).is_dir():
            check_same_architecture(model_config(path), arch.lang_model)
        tokenizer = arch.tokenizer or (None if has_tokenizer(path) else arch.lang_model)
        return load_language_model(path, tokenizer=tokenizer, dropout=arch.dropout)
    except ModelError as error:
        raise ModelError(f"{KEY}: {error}") from error


def from_teacher_layers(config: DistillConfig, source: TeacherSource) -> LanguageModel:
    """A student of student_lang_model's shape with blocks of the teacher, which is loaded for it and let go."""
    arch = config.model_arch
    student = load_language_model(
        arch.lang_model, tokenizer=source.tokenizer_name, from_scratch=True, architecture=arch.architecture,
        dropout=arch.dropout,
    )
    copy_teacher_layers(source.load(), student, config.distillation_kwargs.student_layers)
    return student
