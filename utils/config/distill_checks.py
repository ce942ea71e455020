"""Keys of config_kd.json that cannot both be meant, and keys that have no effect."""

from model.losses.registry import DIVERGENCES, PARAMETERS

# Which divergences a parameter belongs to; it has no effect on the others.
OWNERS = {key: [name for name, entry in DIVERGENCES.items() if key in entry.parameters] for key in PARAMETERS}
DRAWING_KEYS = ("rollout_temperature", "rollout_top_k", "rollout_top_p", "rollout_batch_size")
PENALTY_KEYS = ("frequency_weight", "diversity_weight", "entropy_weight", "entropy_floor")
POLICY_KEYS = ("rollout", "alpha", "rollout_epochs", "importance_weight", "lm_weight", "clip_epsilon", "whiten",
               "penalty", *PENALTY_KEYS)


def model_contradictions(config) -> list[str]:
    """One line for each pair of keys about teacher and student that cannot both be meant."""
    arch, trainer, distillation = config.model_arch, config.trainer_kwargs, config.distillation_kwargs
    return [*teacher_contradictions(arch, trainer), *student_contradictions(arch, trainer, distillation),
            *method_contradictions(distillation)]


def teacher_contradictions(arch, trainer) -> list[str]:
    if arch.teacher_lang_model is not None:
        return []
    if trainer.teacher_ckpt_path is None:
        return ["model_arch.teacher_lang_model and trainer_kwargs.teacher_ckpt_path are both null: name the teacher, "
                "such as the model_checkpoints/best of a train.py run in teacher_ckpt_path"]
    if trainer.teacher_ckpt_path.endswith(".pt"):
        return ["trainer_kwargs.teacher_ckpt_path is a .pt file but model_arch.teacher_lang_model is null: set "
                "teacher_lang_model to the architecture of that file, such as gpt2-medium"]
    return []


def student_contradictions(arch, trainer, distillation) -> list[str]:
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


def method_contradictions(distillation) -> list[str]:
    cached, lines = distillation.teacher_cache is not None, []
    key = "distillation_kwargs.teacher_cache is set but distillation_kwargs"
    if distillation.method == "policy_gradient":
        if cached:
            lines.append(f'{key}.method is "policy_gradient": the cache holds the teacher\'s outputs on the highlights '
                         "alone; set teacher_cache to null, or method to divergence")
        if distillation.on_policy_fraction:
            lines.append('distillation_kwargs.on_policy_fraction is set but distillation_kwargs.method is '
                         '"policy_gradient", which chooses its sequences by rollout: set on_policy_fraction to 0, or '
                         "method to divergence")
    elif cached and distillation.on_policy_fraction:
        lines.append(f"{key}.on_policy_fraction is over 0: the cache holds the teacher's outputs on the highlights "
                     "alone; set teacher_cache to null, or on_policy_fraction to 0")
    return lines


def distillation_warnings(config) -> list[str]:
    """One line for each number that is set but has no effect, or an effect that is not wanted."""
    kwargs = config.distillation_kwargs
    by_policy, on_policy = kwargs.method == "policy_gradient", kwargs.on_policy_fraction > 0
    unused: dict[str, str] = {}  # key -> why it has no effect
    if by_policy:
        unused |= dict.fromkeys(("kl_div", "kd_weight", *PARAMETERS), "it belongs to method divergence")
    else:
        unused |= {name: f"it belongs to kl_div {' and '.join(divergences)}, and kl_div is {kwargs.kl_div}"
                   for name, divergences in OWNERS.items() if kwargs.kl_div not in divergences}
        if kwargs.kd_weight == 0:
            unused |= dict.fromkeys(("temperature", "on_policy_fraction"),
                                    "it belongs to the divergence, and kd_weight is 0")
        unused |= dict.fromkeys(POLICY_KEYS, "it belongs to method policy_gradient")
        if not on_policy:
            unused |= dict.fromkeys(DRAWING_KEYS, "nothing is drawn with method divergence and on_policy_fraction 0")
    if by_policy and kwargs.rollout == "labels":
        unused |= dict.fromkeys((*DRAWING_KEYS, "importance_weight"), "rollout labels draws nothing")
    if by_policy and kwargs.rollout != "mixed":
        unused["alpha"] = f"it belongs to rollout mixed, and rollout is {kwargs.rollout}"
    if by_policy and kwargs.lm_weight == 1:
        unused["temperature"] = "it belongs to the policy gradient, and lm_weight is 1"
        unused |= {key: "nothing is learnt from rollouts with lm_weight 1"
                   for key in (*POLICY_KEYS, *DRAWING_KEYS) if key != "lm_weight"}
    if by_policy and not kwargs.penalty:
        unused |= dict.fromkeys(PENALTY_KEYS, "penalty is false")
    fields = type(kwargs).model_fields
    lines = [f"distillation_kwargs.{fields[name].alias or name} has no effect: {reason}"
             for name, reason in unused.items() if getattr(kwargs, name) != fields[name].default]
    if by_policy and config.model_arch.dropout:
        lines.append(f"model_arch.dropout is {config.model_arch.dropout}: with policy_gradient the student's "
                     "probabilities then differ between drawing and loss; null or 0 is better")
    return lines
