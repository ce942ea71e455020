"""A student initialised with blocks of its teacher (as DistilBERT, Sanh et al. 2019, arXiv 1910.01108, section 3)."""

import re

import torch
from torch import nn

from model.errors import ModelError
from model.language_model import LanguageModel

# Config values that may differ between teacher and student, since they do not change what a block computes.
SIZE_ONLY = {
    "n_layer", "num_hidden_layers", "num_layers", "layer_types", "max_window_layers", "vocab_size", "n_positions",
    "n_ctx", "max_position_embeddings", "initializer_range", "use_cache", "architectures", "transformers_version",
    "_name_or_path", "dtype", "torch_dtype", "prompt_template", "prompt_max_length", "task_specific_params",
    "return_dict", "output_hidden_states", "output_attentions", "problem_type", "id2label", "label2id", "num_labels",
    "chunk_size_feed_forward", "is_encoder_decoder",
}


def spread_layers(teacher_blocks: int, student_blocks: int) -> list[int]:
    """Indices of the teacher's blocks, evenly from the first to the last; only the first for one."""
    gaps = max(1, student_blocks - 1)
    return [round(index * (teacher_blocks - 1) / gaps) for index in range(student_blocks)]


@torch.no_grad()
def copy_teacher_layers(teacher: LanguageModel, student: LanguageModel, layers: list[int] | None = None) -> list[int]:
    """Copy embeddings, final norm, head and chosen blocks of the teacher into the student; returns the indices.

    layers: indices of the teacher's blocks, from 0, one for each of the student's; None spreads them evenly.

    Raises:
        ModelError: another family or width, or indices that do not fit; the student is then unchanged.
    """
    check_same_computation(teacher, student)
    teacher_blocks, student_blocks = (model.model.config.num_hidden_layers for model in (teacher, student))
    if layers is None:
        if student_blocks > teacher_blocks:
            raise misfit("the number of blocks", teacher_blocks, student_blocks)
        layers = spread_layers(teacher_blocks, student_blocks)
    if len(layers) != student_blocks or max(layers) >= teacher_blocks:
        raise ModelError(f"distillation_kwargs.student_layers is {layers}: expected {student_blocks} numbers from 0 to "
                         f"{teacher_blocks - 1}, one for each block of the student")
    source, own, path = teacher.model.state_dict(), student.model.state_dict(), re.escape(block_path(student.model))
    copied = {}
    for name, value in own.items():
        wanted = re.sub(rf"^({path})\.(\d+)\.", lambda found: f"{found[1]}.{layers[int(found[2])]}.", name)
        found = source.get(wanted)
        if found is None or found.shape[1:] != value.shape[1:] or len(found) < len(value):
            raise misfit(f"the shape of {wanted}", None if found is None else [*found.shape], [*value.shape])
        copied[name] = found[: len(value)]
    for name, value in copied.items():
        own[name].copy_(value)
    return layers


def check_same_computation(teacher: LanguageModel, student: LanguageModel) -> None:
    """Raises ModelError if equal weights would compute something else in the student."""
    names = ["model_type", "hidden_size", "num_attention_heads", "intermediate_size"]
    known = type(student.model.config)().to_dict()  # old checkpoints have keys that are no longer used
    names += sorted({name for name in known if not name.endswith(("dropout", "pdrop", "_token_id"))} - SIZE_ONLY)
    for name in names:
        theirs, ours = (getattr(model.model.config, name, None) for model in (teacher, student))
        if ours != theirs:
            raise misfit(name, theirs, ours)


def misfit(what: str, teacher_value, student_value) -> ModelError:
    return ModelError(f'distillation_kwargs.student_init "teacher_layers": {what} of the teacher is {teacher_value!r} '
                      f"and of the student {student_value!r}: change student_lang_model or model_arch.architecture, or "
                      "set student_init to null")


def block_path(model: nn.Module) -> str:
    """Name of the list of blocks, such as transformer.h."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == model.config.num_hidden_layers:
            return name
    raise ModelError(f"{type(model).__name__}: its blocks are not a list: student_init is not possible for this family")
