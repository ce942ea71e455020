"""The distillation config (`config_kd.json`): what differs from `utils/config/fine_tune.py`, and the section
distillation_kwargs. The divergences, and defaults and ranges of their parameters, come from model/losses/registry.py.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from model.losses.registry import DIVERGENCES, PARAMETERS
from utils.config.checks import OWNERS
from utils.config.fine_tune import (
    Architecture,
    Count,
    Dropout,
    FineTuneConfig,
    FromScratch,
    GenerationKwargs,
    Index,
    Name,
    PackRows,
    PruneLastBlock,
    Section,
    Share,
    TokenizerName,
    TrainerKwargs,
)

# Keys of config.json about its one model, and their names here.
STUDENT_KEYS = {"lang_model": "student_lang_model", "gpu_device_id": "student_gpu_device_id"}


class DistillModelArch(Section):
    """Teacher and student, and their GPUs. The keys from from_scratch on are for the student."""

    teacher_lang_model: Name | None = Field(
        None, description="hub id or local folder of the teacher; null: the model in teacher_ckpt_path")
    student_lang_model: Name = Field("gpt2", description="hub id, local folder, or built-in demo size (demo-student)")
    teacher_gpu_device_id: Index | None = Field(
        0, description="GPU index of the teacher, may be the student's; null: 0; ignored, with a notice, if there is "
        "no GPU or with multi_gpu (each process then has a teacher beside its student)")
    student_gpu_device_id: Index | None = Field(
        0, description="GPU index of the student; null: 0; ignored, with a notice, if there is no GPU")
    from_scratch: FromScratch = False
    architecture: Architecture = Field(default={})
    tokenizer: TokenizerName = None
    dropout: Dropout = Field(
        None, description="one value for all dropout layers; null: the model's own, or 0 with policy_gradient, whose "
        "probabilities must be the same during sampling and in the loss")
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
    """The training loop: length, device, evaluation and checkpoints."""

    output_dir: Name = Field("runs/distill", description="folder for logs and checkpoints; created if missing")
    teacher_ckpt_path: Name | None = Field(
        None, description="the fine-tuned teacher: a checkpoint folder, a save_pretrained folder or a legacy .pt state "
        "dict; null: the weights of teacher_lang_model")
    student_ckpt_path: Name | None = Field(
        None, description="initial weights of the student (the same formats); null: the weights of student_lang_model")


class TeacherCache(Section):
    """Teacher outputs stored on disk."""

    kind: Literal["hidden", "top_k"] = Field(
        "hidden", description="hidden: hidden states, exact; top_k: log-probabilities of the top_k most likely tokens "
        "and of all others together: smaller, but only a lower bound of the divergence")
    top_k: Count = Field(64, description="with kind top_k: tokens stored per label position")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="with kind hidden: precision on disk; auto: that of the forward pass, lossless")
    dir: Name | None = Field(
        None, description="folder of the cache, shared by runs; null: teacher_cache in output_dir")


def check_layers(layers: list[int] | None) -> list[int] | None:
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise ValueError("should be different block indices, such as [0, 4, 8, 11]")
    return layers


def parameter_field(key: str):
    """The field of a divergence's parameter; a trailing underscore is only for Python (`lambda_` is lambda)."""
    default, lowest, highest, is_open, description = PARAMETERS[key]
    limits = {"gt": lowest, "lt": highest} if is_open else {"ge": lowest, "le": highest}
    alias = {"alias": key.rstrip("_")} if key.endswith("_") else {}
    return Field(default, description=f"with {', '.join(OWNERS[key])}: {description}", **limits, **alias)


class DistillationKwargs(Section):
    """What the student learns from the teacher."""

    model_config = ConfigDict(serialize_by_alias=True)

    method: Literal["divergence", "policy_gradient"] = Field(
        "divergence", description="divergence: minimize kl_div between teacher and student at each token of the "
        "highlights; policy_gradient: minimize the reverse KL of whole sequences, on rollouts")
    kl_div: Literal[*DIVERGENCES] = Field(
        "forward", description="the divergence D of teacher p and student q; "
        + "; ".join(f"{name}: {entry.description}" for name, entry in DIVERGENCES.items()))
    temperature: float = Field(
        1.0, ge=0.001, le=1000, description="softmax temperature of both models in D, which counts times temperature² "
        "in the loss; with policy_gradient: in the rewards and the single-step part")
    kd_weight: Share = Field(
        0.5, description="weight w of the divergence: the loss of a label token is (1 - w) cross-entropy + "
        "w temperature² D")
    beta: float = parameter_field("beta")
    lambda_: float = parameter_field("lambda_")
    mu: float = parameter_field("mu")
    chunk_size: int = Field(
        128, ge=1, le=1_000_000, description="label positions whose logits are in memory at the same time")
    teacher_cache: TeacherCache | None = Field(
        None, description='store the teacher\'s outputs on disk, so that they are computed once for all epochs and '
        'runs; {"kind": "hidden"} is the simplest; null: off')
    on_policy_fraction: Share = Field(
        0.0, description="with method divergence: share of the optimizer steps whose divergence is computed on the "
        "student's own rollouts; cross-entropy stays on the highlights")
    rollout: Literal["mixed", "student", "teacher", "labels"] = Field(
        "mixed", description="with policy_gradient: source of the sequences, of up to "
        "generation_kwargs.max_generation_length tokens; mixed: sampled from alpha teacher + (1 - alpha) student; "
        "labels: the highlights, without sampling")
    alpha: Share = Field(0.2, description="with rollout mixed: share of the teacher")
    rollout_temperature: float = Field(
        1.0, ge=0.001, le=1000, description="softmax temperature of both models during sampling")
    rollout_top_k: Count | None = Field(None, description="sample from the N most likely tokens; null: from all")
    rollout_top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="sample from the smallest set of tokens with this total probability; null: from all")
    rollout_batch_size: Count | None = Field(
        None, description="rows decoded at the same time; null: dataset_kwargs.val_batch_size")
    rollout_epochs: int = Field(
        1, ge=1, le=1000, description="with policy_gradient: consecutive optimizer steps that use the same rollouts")
    importance_weight: Literal["token", "sequence"] = Field(
        "token", description="with policy_gradient: importance weight for sampling from the mixture; token: each "
        "token's own ratio (below 1 with rollout_top_k or rollout_top_p); sequence: their product, unbiased, high "
        "variance")
    lm_weight: Share = Field(0.5, description="with policy_gradient: weight of the cross-entropy on the highlights")
    clip_epsilon: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        0.2, description="with policy_gradient: PPO clipping range, in the long-term loss, of the importance weight "
        "times the probability ratio; null: no clipping")
    whiten: bool = Field(
        False, description="with policy_gradient: normalize the long-term rewards of a step to mean 0, standard "
        "deviation 1")
    penalty: bool = Field(False, description="with policy_gradient: add the three penalties that follow")
    frequency_weight: float = Field(0.1, ge=0, description="with penalty: weight for repeated tokens")
    diversity_weight: float = Field(0.1, ge=0, description="with penalty: weight for tokens of similar meaning")
    entropy_weight: float = Field(0.01, ge=0, description="with penalty: weight for over-confident predictions")
    entropy_floor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="with penalty: predictions with at least this entropy, in nats, are not penalized; null: a "
        "tenth of the log of the vocabulary size")
    student_init: Literal["teacher_layers"] | None = Field(
        None, description="teacher_layers: copy blocks of a teacher of the same width; null: the student's own weights")
    student_layers: Annotated[list[Index] | None, AfterValidator(check_layers)] = Field(
        None, description="with student_init: indices of the teacher's blocks, from 0; null: spread evenly from first "
        "to last")


class DistillConfig(FineTuneConfig):
    """Config of train_kd.py."""

    model_arch: DistillModelArch = Field(default_factory=DistillModelArch)
    trainer_kwargs: DistillTrainerKwargs = Field(default_factory=DistillTrainerKwargs)
    distillation_kwargs: DistillationKwargs = Field(default_factory=DistillationKwargs)


def without_dropout(config: DistillConfig) -> DistillConfig:
    """The config with model_arch.dropout 0 if it is null and the method is policy_gradient."""
    arch = config.model_arch
    if config.distillation_kwargs.method != "policy_gradient" or arch.dropout is not None:
        return config
    return config.model_copy(update={"model_arch": arch.model_copy(update={"dropout": 0.0})})
