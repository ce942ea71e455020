"""A student made of blocks of its teacher (the start of DistilBERT, Sanh et al. 2019, arXiv 1910.01108, section 3)."""

import re

import torch
from torch import nn

from model.language_model import LanguageModel, ModelError

# Values of a model's config that may differ between teacher and student: they do not change what a block computes.
OF_SIZE_ALONE = {
    "n_layer", "num_hidden_layers", "num_layers", "layer_types", "max_window_layers", "vocab_size", "n_positions",
    "n_ctx", "max_position_embeddings", "initializer_range", "use_cache", "architectures", "transformers_version",
    "_name_or_path", "dtype", "torch_dtype", "prompt_template", "prompt_max_length", "task_specific_params",
    "return_dict", "output_hidden_states", "output_attentions", "problem_type", "id2label", "label2id", "num_labels",
    "chunk_size_feed_forward", "is_encoder_decoder",
}


def spread_layers(of_teacher: int, of_student: int) -> list[int]:
    """Numbers of the teacher's blocks, evenly from the first to the last; the first alone for one."""
    if of_student == 1:
        return [0]
    return [round(index * (of_teacher - 1) / (of_student - 1)) for index in range(of_student)]


@torch.no_grad()
def copy_teacher_layers(teacher: LanguageModel, student: LanguageModel, layers: list[int] | None = None) -> list[int]:
    """Copies embeddings, final norm, head and the chosen blocks of the teacher into the student; returns the numbers.

    layers: numbers of the teacher's blocks, from 0, one for each of the student's; None spreads them evenly.

    Raises:
        ModelError: another family or width, or block numbers that do not fit.
    """
    blocks_of_teacher, blocks_of_student = block_count(teacher.model), block_count(student.model)
    for name in ("model_type", "hidden_size", "num_attention_heads", "intermediate_size"):
        ours, theirs = (getattr(model.config, name, None) for model in (student.model, teacher.model))
        if ours != theirs:
            raise ModelError(
                f'distillation_kwargs.student_init "teacher_layers": {name} of the teacher is {theirs} and of the '
                f"student {ours}: name a student_lang_model of the teacher's width, or set student_init to null"
            )
    check_same_computation(teacher, student)
    if layers is None:
        if blocks_of_student > blocks_of_teacher:
            raise ModelError(
                f'distillation_kwargs.student_init "teacher_layers": the student has {blocks_of_student} blocks, the '
                f"teacher only {blocks_of_teacher}: name a smaller student_lang_model"
            )
        layers = spread_layers(blocks_of_teacher, blocks_of_student)
    if len(layers) != blocks_of_student or max(layers) >= blocks_of_teacher:
        raise ModelError(
            f"distillation_kwargs.student_layers is {layers}: expected {blocks_of_student} numbers from 0 to "
            f"{blocks_of_teacher - 1}, one for each block of the student"
        )
    source = teacher.model.state_dict()
    path = re.escape(block_path(student.model))
    own = student.model.state_dict()
    copied = {}
    for name, value in own.items():
        wanted = re.sub(rf"^({path})\.(\d+)\.", lambda found: f"{found[1]}.{layers[int(found[2])]}.", name)
        if wanted not in source or source[wanted].shape[1:] != value.shape[1:] or len(source[wanted]) < len(value):
            raise ModelError(f'distillation_kwargs.student_init "teacher_layers": the teacher has no {wanted} of the '
                             "student's shape: name a student_lang_model of the teacher's family and width")
        copied[name] = source[wanted][: len(value)]
    for name, value in copied.items():
        own[name].copy_(value)
    return layers


def check_same_computation(teacher: LanguageModel, student: LanguageModel) -> None:
    """Raises ModelError where equal weights would compute something else in the student."""
    ours, theirs = (model.model.config.to_dict() for model in (student, teacher))
    known = type(student.model.config)().to_dict()  # old checkpoints carry keys that mean nothing any more
    names = {name for name in known if not name.endswith(("dropout", "pdrop", "_token_id"))}
    for name in sorted(names - OF_SIZE_ALONE):
        if ours.get(name) != theirs.get(name):
            raise ModelError(
                f'distillation_kwargs.student_init "teacher_layers": {name} of the teacher is {theirs.get(name)!r} and '
                f"of the student {ours.get(name)!r}, so its blocks would compute something else: set it in "
                "model_arch.architecture, or set student_init to null"
            )


def block_path(model: nn.Module) -> str:
    """Name of the list of blocks, such as transformer.h."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == model.config.num_hidden_layers:
            return name
    raise ModelError(f"{type(model).__name__}: its blocks are not a list: student_init is not possible for this family")


def block_count(model: nn.Module) -> int:
    return model.config.num_hidden_layers
