"""The distillation config (`config_kd.json`): what it has beside or instead of the sections of `utils/config.py`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from utils.config import (
    Architecture,
    CallbacksKwargs,
    DatasetKwargs,
    Dropout,
    FromScratch,
    GenerationKwargs,
    GpuNumber,
    LrSchedulerKwargs,
    Name,
    OptimizerKwargs,
    PackRows,
    PruneLastBlock,
    Section,
    TokenizerName,
    TrainerKwargs,
    contradictions,
    monitored_metric,
)

# Which divergences a number belongs to; it has no effect on the others.
NUMBERS = {"beta": ("generalized_js",), "lambda": ("skew_forward", "skew_reverse"), "mu": ("symmetric",)}


class DistillModelArch(Section):
    """Teacher and student, and where they reside. The keys from from_scratch on are the student's."""

    teacher_lang_model: Name | None = Field(
        None, description="hub id or local folder of the teacher; null is what teacher_ckpt_path holds"
    )
    student_lang_model: Name = Field(
        "gpt2", description="hub id, local folder, or a built-in demo size (demo-student)"
    )
    teacher_gpu_device_id: GpuNumber = Field(
        0, description="number of the teacher's GPU; null is 0; may be the student's; ignored with a notice where "
        "there is no GPU, and with multi_gpu, where each process holds a teacher beside its student"
    )
    student_gpu_device_id: GpuNumber = Field(
        0, description="number of the student's GPU; null is 0; ignored with a notice where there is no GPU"
    )
    from_scratch: FromScratch = False
    architecture: Architecture = Field(default={})
    tokenizer: TokenizerName = None
    dropout: Dropout = None
    pack_rows: PackRows = True
    prune_last_block: PruneLastBlock = True
    generation_kwargs: GenerationKwargs = Field(default_factory=GenerationKwargs)

    @property
    def lang_model(self) -> str:
        """The model that is trained."""
        return self.student_lang_model

    @property
    def gpu_device_id(self) -> int | None:
        """The GPU of the model that is trained."""
        return self.student_gpu_device_id


class DistillTrainerKwargs(TrainerKwargs):
    """The training loop: how long, on what, what is measured and what is kept."""

    output_dir: Name = Field("runs/distill", description="folder for logs and checkpoints; made if absent")
    teacher_ckpt_path: Name | None = Field(
        None, description="the fine-tuned teacher: a checkpoint folder, a save_pretrained folder or a legacy .pt state "
        "dict; null is the weights of teacher_lang_model itself"
    )
    student_ckpt_path: Name | None = Field(
        None, description="start the student from there (the same kinds); null is the weights of student_lang_model"
    )


class TeacherCache(Section):
    """Teacher outputs kept on disk."""

    kind: Literal["hidden", "top_k"] = Field(
        "hidden", description="hidden is the hidden states, exact; top_k is the log-probabilities of the top_k best "
        "tokens and of all the others together, smaller, a lower bound of the divergence"
    )
    top_k: int = Field(64, ge=1, description="with kind top_k: tokens kept at each label position")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="with kind hidden: stored precision; auto is that of the forward pass"
    )
    dir: Name | None = Field(
        None, description="folder of the cache, shared by runs; null is teacher_cache in output_dir"
    )


def check_layers(layers: list[int] | None) -> list[int] | None:
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise PydanticCustomError("value_error", "expected block numbers, each once, such as [0, 4, 8, 11]")
    return layers


class DistillationKwargs(Section):
    """What the student learns from the teacher."""

    model_config = ConfigDict(serialize_by_alias=True)

    method: Literal["divergence"] = Field("divergence", description="a divergence at the label positions")
    kl_div: Literal[
        "forward", "reverse", "JS", "generalized_js", "skew_forward", "skew_reverse", "total_variation", "symmetric",
        "adaptive",
    ] = Field("forward", description="the divergence D(teacher, student)")
    temperature: float = Field(
        1.0, gt=0, description="of both softmaxes in the divergence, which is multiplied by its square"
    )
    kd_weight: float = Field(
        0.5, ge=0, le=1, description="share w of the divergence: the loss is (1 - w) cross-entropy + w temperature² D"
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="generalized_js: the teacher's share of the mixture; the loss gets weak towards 0 "
        "and 1"
    )
    lambda_: float = Field(
        0.1, gt=0, lt=1, alias="lambda", description="skew_forward, skew_reverse: share of the first argument"
    )
    mu: float = Field(0.5, ge=0, le=1, description="symmetric: share of forward KL; the rest is reverse KL")
    chunk_size: int = Field(64, ge=1, description="label positions whose logits exist at a time")
    teacher_cache: TeacherCache | None = Field(
        None, description='keep the teacher\'s outputs on disk: the first epoch fills it, later ones do not need the '
        'teacher; such as {"kind": "hidden"}; null is off'
    )
    student_init: Literal["teacher_layers"] | None = Field(
        None, description="teacher_layers starts the student from blocks of a teacher of the same width"
    )
    student_layers: Annotated[
        list[Annotated[int, Field(ge=0)]] | None, AfterValidator(check_layers)
    ] = Field(None, description="with student_init: numbers of the teacher's blocks, from 0; null spreads them evenly")


class DistillConfig(Section):
    """Config of train_kd.py."""

    model_arch: DistillModelArch = Field(default_factory=DistillModelArch)
    trainer_kwargs: DistillTrainerKwargs = Field(default_factory=DistillTrainerKwargs)
    optimizer_kwargs: OptimizerKwargs = Field(default_factory=OptimizerKwargs)
    lr_scheduler_kwargs: LrSchedulerKwargs = Field(default_factory=LrSchedulerKwargs)
    callbacks_kwargs: CallbacksKwargs = Field(default_factory=CallbacksKwargs)
    dataset_kwargs: DatasetKwargs = Field(default_factory=DatasetKwargs)
    distillation_kwargs: DistillationKwargs = Field(default_factory=DistillationKwargs)

    @property
    def monitored_metric(self) -> str:
        """The validation metric that decides about best and about stopping."""
        return monitored_metric(self.callbacks_kwargs.kwargs)

    @model_validator(mode="after")
    def check_together(self) -> "DistillConfig":
        if lines := [*contradictions(self), *model_contradictions(self)]:
            raise PydanticCustomError("contradiction", "{lines}", {"lines": "\n".join(lines)})
        return self


def model_contradictions(config: DistillConfig) -> list[str]:
    """One line for each pair of keys about teacher and student that cannot both be meant."""
    arch, trainer, distillation = config.model_arch, config.trainer_kwargs, config.distillation_kwargs
    teacher, student, init = trainer.teacher_ckpt_path, trainer.student_ckpt_path, distillation.student_init
    lines = []
    if arch.teacher_lang_model is None and teacher is None:
        lines.append("model_arch.teacher_lang_model and trainer_kwargs.teacher_ckpt_path are both null: name the "
                     "teacher, such as the model_checkpoints/best of a train.py run in teacher_ckpt_path")
    if teacher is not None and teacher.endswith(".pt") and arch.teacher_lang_model is None:
        lines.append(f'trainer_kwargs.teacher_ckpt_path is "{teacher}" but model_arch.teacher_lang_model is null: name '
                     "the architecture of that state dict there, such as gpt2-medium")
    if student is not None and init is not None:
        lines.append(f'trainer_kwargs.student_ckpt_path is "{student}" but distillation_kwargs.student_init is '
                     f'"{init}": the student has one start, set one of them to null')
    if arch.from_scratch and (student is not None or init is not None):
        other = ("trainer_kwargs.student_ckpt_path" if student is not None else "distillation_kwargs.student_init")
        lines.append(f"model_arch.from_scratch is true but {other} names weights: set one of them to "
                     "its default (false, null)")
    if arch.architecture and student is not None:
        lines.append("model_arch.architecture changes the student's shape but trainer_kwargs.student_ckpt_path names "
                     "weights: remove architecture, or set student_ckpt_path to null")
    if distillation.student_layers is not None and init is None:
        lines.append('distillation_kwargs.student_layers is set but distillation_kwargs.student_init is null: set '
                     'student_init to "teacher_layers", or student_layers to null')
    if init is not None and arch.tokenizer is not None:
        lines.append('model_arch.tokenizer is set but distillation_kwargs.student_init is "teacher_layers", whose '
                     "tokenizer is the teacher's: set tokenizer to null")
    return lines


def distillation_warnings(config: DistillConfig) -> list[str]:
    """One line for each number that is set but has no effect."""
    distillation = config.distillation_kwargs
    values = distillation.model_dump()
    lines = []
    for key, names in NUMBERS.items():
        default = type(distillation).model_fields["lambda_" if key == "lambda" else key].default
        if values[key] != default and distillation.kl_div not in names:
            lines.append(f'distillation_kwargs.{key} has no effect: it belongs to kl_div {" and ".join(names)}, and '
                         f"kl_div is {distillation.kl_div}")
    if distillation.kd_weight == 0:
        lines.append("distillation_kwargs.kd_weight is 0: the student learns nothing from the teacher")
    return lines
