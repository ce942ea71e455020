"""The objective of config_kd.json's `distillation_kwargs`, and what of it a checkpoint belongs to."""

from model import policy_gradient, teacher_student
from model.decoding.rollout_buffer import RewardConfig, RolloutBuffer
from model.decoding.rollouts import RolloutConfig
from model.decoding.sampling import SamplingOptions
from model.language_model import LanguageModel
from model.losses.policy_loss import Penalties
from model.losses.registry import DIVERGENCES
from model.teacher import Teacher
from utils.config.checks import PENALTY_KEYS, POLICY_KEYS, SAMPLING_KEYS
from utils.config.distill import DistillationKwargs, DistillConfig
from utils.distillation.cached_teacher import CachedTeacher
from utils.training.distributed import DistributedContext


def samples_rollouts(kwargs: DistillationKwargs) -> bool:
    """Whether sequences are sampled in training."""
    return kwargs.rollout != "labels" if kwargs.method == "policy_gradient" else kwargs.on_policy_fraction > 0


def make_objective(
    config: DistillConfig, student: LanguageModel, teacher: Teacher | CachedTeacher, vocabulary: int,
    context: DistributedContext, prompt_format, log,
) -> teacher_student.TeacherStudent | policy_gradient.TeacherStudent:
    """prompt_format: a `PromptFormat`, for the prompts of rollouts.

    Raises:
        DataError: max_generation_length leaves no room for an article, if sequences are sampled.
    """
    kwargs, max_new_tokens = config.distillation_kwargs, config.model_arch.generation_kwargs.max_generation_length
    batch_size = kwargs.rollout_batch_size or config.dataset_kwargs.val_batch_size
    if samples_rollouts(kwargs):
        prompt_format.prediction_prompts([], max_new_tokens)

    source = kwargs.rollout if kwargs.method == "policy_gradient" else "student"
    alpha = {"student": 0.0, "teacher": 1.0}.get(source, kwargs.alpha)
    sampling = SamplingOptions(alpha, kwargs.rollout_temperature, kwargs.rollout_top_k, kwargs.rollout_top_p)
    rollout = RolloutConfig(
        None if source == "labels" else sampling, max_new_tokens, batch_size, kwargs.rollout_epochs,
        config.trainer_kwargs.seed,
    )
    rollouts = RolloutBuffer(
        student, teacher, rollout, vocabulary,
        RewardConfig(kwargs.temperature, kwargs.importance_weight, whiten=kwargs.whiten),
        chunk_size=kwargs.chunk_size, truncate_prompt=lambda prompt: prompt_format.shorten(prompt, max_new_tokens),
        autocast=context.autocast, all_reduce=context.all_reduce, log=log.info,
        hint="raise distillation_kwargs.lm_weight or set penalty to true" if kwargs.method == "policy_gradient"
        else "lower distillation_kwargs.on_policy_fraction or kd_weight",
    )
    if kwargs.method == "policy_gradient":
        penalties = Penalties(
            kwargs.frequency_weight, kwargs.diversity_weight, kwargs.entropy_weight, kwargs.entropy_floor
        )
        return policy_gradient.TeacherStudent(
            student, teacher, kwargs.penalty, kwargs.lm_weight, kwargs.clip_epsilon, penalties, rollouts
        )
    parameters = {key: getattr(kwargs, key) for key in DIVERGENCES[kwargs.kl_div].parameters}
    return teacher_student.TeacherStudent(
        student, teacher, kwargs.kl_div, kwargs.temperature, kwargs.kd_weight, kwargs.chunk_size, vocabulary,
        kwargs.on_policy_fraction, rollouts if kwargs.on_policy_fraction else None, **parameters,
    )


def identity_of(config: DistillConfig, fingerprint: str) -> dict:
    """Settings that fix the initial weights and the loss, so that a resumed run must share them. The kind of teacher
    cache is one only if it is not exact."""
    kwargs = config.distillation_kwargs
    cache = kwargs.teacher_cache
    keys = ["student_init", "student_layers", "method"]
    if kwargs.method == "policy_gradient":
        unused = {*([] if kwargs.rollout == "mixed" else ["alpha"]), *([] if kwargs.penalty else PENALTY_KEYS)}
        keys += ["temperature", *(key for key in POLICY_KEYS if key not in unused)]
        keys += [] if kwargs.rollout == "labels" else SAMPLING_KEYS
    else:
        keys += ["kl_div", "temperature", "kd_weight", "on_policy_fraction"]
        keys += DIVERGENCES[kwargs.kl_div].parameters
        keys += SAMPLING_KEYS if kwargs.on_policy_fraction else []
    # How many rows are decoded at a time changes nothing but rounding.
    keys = [key for key in keys if key != "rollout_batch_size"]
    length = {"model_arch.generation_kwargs.max_generation_length":
              config.model_arch.generation_kwargs.max_generation_length}
    return {
        "the teacher's weights": fingerprint,
        "trainer_kwargs.student_ckpt_path": config.trainer_kwargs.student_ckpt_path,
        **{f"distillation_kwargs.{key.rstrip('_')}": getattr(kwargs, key) for key in keys},
        **(length if samples_rollouts(kwargs) else {}),
        "distillation_kwargs.teacher_cache.top_k": cache.top_k if cache and cache.kind == "top_k" else None,
        "distillation_kwargs.teacher_cache.dtype":
            cache.dtype if cache and cache.kind == "hidden" and cache.dtype == "bfloat16" else None,
    }
