"""The distillation config (`config_kd.json`): what it has beside or instead of the sections of `utils/config.py`.

In a file, on the command line and in errors `lambda_` is called lambda. Nothing here imports torch.
"""

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
NUMBERS = {"beta": ("generalized_js",), "lambda_": ("skew_forward", "skew_reverse"), "mu": ("symmetric",)}
# Keys of config.json that stand for one model there: where they are here.
STUDENT_KEYS = {"lang_model": "student_lang_model", "gpu_device_id": "student_gpu_device_id"}


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
        "auto", description="with kind hidden: stored precision; auto is that of the forward pass, which loses nothing"
    )
    dir: Name | None = Field(
        None, description="folder of the cache, shared by runs; null is teacher_cache in output_dir"
    )


def check_layers(layers: list[int] | None) -> list[int] | None:
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise PydanticCustomError("layers", "expected block numbers, each once, such as [0, 4, 8, 11]")
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
        1.0, ge=0.001, le=1000, description="of both softmaxes in the divergence D; the loss multiplies D by its square"
    )
    kd_weight: float = Field(
        0.5, ge=0, le=1, description="share w of the divergence; the rest is cross-entropy: the loss of a label token "
        "is (1 - w) cross-entropy + w temperature² D"
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="generalized_js: weight of the teacher in the mixture; the loss tends to 0 at "
        "both ends"
    )
    lambda_: float = Field(
        0.1, gt=0, lt=1, alias="lambda", description="skew_forward, skew_reverse: weight of the first argument"
    )
    mu: float = Field(0.5, ge=0, le=1, description="symmetric: share of forward KL; the rest is reverse KL")
    chunk_size: int = Field(128, ge=1, le=1_000_000, description="label positions whose logits exist at a time")
    teacher_cache: TeacherCache | None = Field(
        None, description='keep the teacher\'s outputs on disk: the first epoch fills it, later ones do not need the '
        'teacher; {"kind": "hidden"} is the simplest; null is off'
    )
    student_init: Literal["teacher_layers"] | None = Field(
        None, description="teacher_layers copies blocks of a teacher of the same width; null is the student's weights"
    )
    student_layers: Annotated[
        list[Annotated[int, Field(ge=0)]] | None, AfterValidator(check_layers)
    ] = Field(None, description="with student_init: numbers of the teacher's blocks, from 0; null spreads "
            "them evenly from first to last")


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
    return [*teacher_contradictions(arch, trainer), *student_contradictions(arch, trainer, distillation)]


def teacher_contradictions(arch: DistillModelArch, trainer: DistillTrainerKwargs) -> list[str]:
    if arch.teacher_lang_model is not None:
        return []
    if trainer.teacher_ckpt_path is None:
        return ["model_arch.teacher_lang_model and trainer_kwargs.teacher_ckpt_path are both null: name the teacher, "
                "such as the model_checkpoints/best of a train.py run in teacher_ckpt_path"]
    if trainer.teacher_ckpt_path.endswith(".pt"):
        return ["trainer_kwargs.teacher_ckpt_path is a .pt file but model_arch.teacher_lang_model is null: set "
                "teacher_lang_model to the architecture of that file, such as gpt2-medium"]
    return []


def student_contradictions(
    arch: DistillModelArch, trainer: DistillTrainerKwargs, distillation: DistillationKwargs
) -> list[str]:
    from_checkpoint, from_teacher = trainer.student_ckpt_path is not None, distillation.student_init is not None
    checkpoint, init = "trainer_kwargs.student_ckpt_path", "distillation_kwargs.student_init"
    lines = []
    if from_checkpoint and from_teacher:
        lines.append(f'{checkpoint} is set but {init} is "{distillation.student_init}", another start of the student: '
                     "set student_ckpt_path or student_init to null")
    if from_checkpoint and arch.from_scratch:
        lines.append(f"{checkpoint} is set but model_arch.from_scratch is true, another start of the student: set "
                     "student_ckpt_path to null, or from_scratch to false")
    if from_teacher and arch.from_scratch:
        lines.append(f'{init} is "{distillation.student_init}" but model_arch.from_scratch is true, another start of '
                     "the student: set student_init to null, or from_scratch to false")
    if from_checkpoint and arch.architecture:
        lines.append(f"{checkpoint} is set but model_arch.architecture is not empty: that checkpoint has its own, "
                     "remove architecture, or set student_ckpt_path to null")
    if from_teacher and arch.tokenizer is not None:
        lines.append(f'{init} is "{distillation.student_init}" but model_arch.tokenizer is set: the student has the '
                     "teacher's embeddings and so its tokenizer, set tokenizer or student_init to null")
    if distillation.student_layers is not None and not from_teacher:
        lines.append(f'distillation_kwargs.student_layers is set but {init} is null: set student_init to '
                     '"teacher_layers", or student_layers to null')
    return lines


def distillation_warnings(config: DistillConfig) -> list[str]:
    """One line for each number that is set but has no effect."""
    distillation, fields = config.distillation_kwargs, DistillationKwargs.model_fields
    lines = []
    for name, divergences in NUMBERS.items():
        if getattr(distillation, name) != fields[name].default and distillation.kl_div not in divergences:
            lines.append(f"distillation_kwargs.{fields[name].alias or name} has no effect: it belongs to kl_div "
                         f"{' and '.join(divergences)}, and kl_div is {distillation.kl_div}")
    if distillation.temperature != 1 and distillation.kd_weight == 0:
        lines.append("distillation_kwargs.temperature has no effect: it belongs to the divergence, and kd_weight is 0")
    return lines
