"""Checks of several keys together: those that contradict each other, and those that have no effect.

`config` is a FineTuneConfig or a DistillConfig throughout.
"""

from collections.abc import Iterator

from model.losses.registry import DIVERGENCES, PARAMETERS

NO_EFFECT = ("is_training", "use_cache")  # accepted, because configs have them
SAMPLING_KEYS = ("rollout_temperature", "rollout_top_k", "rollout_top_p", "rollout_batch_size")
PENALTY_KEYS = ("frequency_weight", "diversity_weight", "entropy_weight", "entropy_floor")
POLICY_KEYS = ("rollout", "alpha", "rollout_epochs", "importance_weight", "lm_weight", "clip_epsilon", "whiten",
               "penalty", *PENALTY_KEYS)
# Parameter -> the divergences that have it; it has no effect on others.
OWNERS = {key: [name for name, entry in DIVERGENCES.items() if key in entry.parameters] for key in PARAMETERS}


# -- contradictions ----------------------------------------------------------------------------------------------


def contradictions(config) -> Iterator[str]:
    """One line, with a remedy, for each set of keys that exclude each other."""
    trainer, data, stopping = config.trainer_kwargs, config.dataset_kwargs, config.callbacks_kwargs.kwargs
    for monitor, dataset in (("monitor_val", "validation_dataset"), ("monitor_test", "test_dataset")):
        if getattr(trainer, monitor) and getattr(data, dataset) is None:
            yield (f"trainer_kwargs.{monitor} is true but dataset_kwargs.{dataset} is null: set {dataset} to a file, "
                   f"or {monitor} to false")

    if not trainer.monitor_val:
        for key, is_set, off in (
            ("callbacks_kwargs.kwargs.patience", stopping.patience is not None, "null"),
            ("lr_scheduler_kwargs.increase_batch_size_on_plateau",
             config.lr_scheduler_kwargs.increase_batch_size_on_plateau, "false"),
            ("trainer_kwargs.adaptive_loss_scaling", trainer.adaptive_loss_scaling, "false"),
        ):
            if is_set:
                yield (f"{key} is set but trainer_kwargs.monitor_val is false: set monitor_val to true, or "
                       f"{key.rpartition('.')[2]} to {off}")

    metric = config.monitored_metric
    mode, other = ("max", "loss") if metric.startswith("rouge") else ("min", "rougeL")
    if stopping.mode != mode:
        yield (f'callbacks_kwargs.kwargs.mode is "{stopping.mode}" but callbacks_kwargs.kwargs.metric is "{metric}": '
               f'set mode to "{mode}", or metric to "{other}"')
    if trainer.monitor_val and mode == "max" and "rouge" not in trainer.metrics:
        yield (f'{metric} is monitored (callbacks_kwargs.kwargs.mode is "{stopping.mode}") but trainer_kwargs.metrics '
               'lacks "rouge": add it, or set mode to "min" and metric to "loss"')

    if trainer.adaptive_loss_scaling and trainer.adaptive_loss_metric.startswith("rouge"):
        if trainer.monitor_val and "rouge" not in trainer.metrics:
            yield ('trainer_kwargs.adaptive_loss_scaling is true but trainer_kwargs.metrics lacks "rouge": add it, set '
                   'adaptive_loss_metric to "perplexity", or adaptive_loss_scaling to false')
        if trainer.baseline_threshold > 1:
            yield (f"trainer_kwargs.baseline_threshold is {trainer.baseline_threshold:g} but "
                   f"trainer_kwargs.adaptive_loss_metric is {trainer.adaptive_loss_metric}, from 0 to 1, and "
                   "trainer_kwargs.adaptive_loss_scaling is true: set baseline_threshold to a score, such as 0.15")

    if hasattr(config, "distillation_kwargs"):
        yield from distillation_contradictions(config.model_arch, trainer, config.distillation_kwargs)


def distillation_contradictions(arch, trainer, distillation) -> Iterator[str]:
    teacher, student = "trainer_kwargs.teacher_ckpt_path", "trainer_kwargs.student_ckpt_path"
    init, layers = "distillation_kwargs.student_init", "distillation_kwargs.student_layers"
    if arch.teacher_lang_model is None and trainer.teacher_ckpt_path is None:
        yield (f"model_arch.teacher_lang_model and {teacher} are both null: set teacher_ckpt_path to the teacher, such "
               "as model_checkpoints/best of a train.py run")
    elif arch.teacher_lang_model is None and trainer.teacher_ckpt_path.endswith(".pt"):
        yield (f"{teacher} is a .pt file but model_arch.teacher_lang_model is null: set teacher_lang_model to the "
               "architecture of that file, such as gpt2-medium")

    starts = {student: trainer.student_ckpt_path is not None, init: distillation.student_init is not None,
              "model_arch.from_scratch": arch.from_scratch}
    if several := if_several(starts):
        yield f"{several} are different ways to initialize the student: keep one, and set the others to null or false"
    if starts[student] and arch.architecture:
        yield (f"{student} is set, and that checkpoint has an architecture, but model_arch.architecture is not empty: "
               "remove architecture, or set student_ckpt_path to null")
    if starts[init] and arch.tokenizer is not None:
        yield (f"{init} is set, so the student has the teacher's embeddings and tokenizer, but model_arch.tokenizer "
               "is set too: set tokenizer or student_init to null")
    if distillation.student_layers is not None and not starts[init]:
        yield f'{layers} is set but {init} is null: set student_init to "teacher_layers", or student_layers to null'

    if several := if_several({"teacher_cache": distillation.teacher_cache is not None,
                              "on_policy_fraction": distillation.on_policy_fraction > 0,
                              'method "policy_gradient"': distillation.method == "policy_gradient"}):
        yield (f"distillation_kwargs: {several} exclude each other (a cache holds outputs for the highlights only, "
               "policy_gradient has its own rollouts): keep one; set teacher_cache to null, on_policy_fraction to 0, "
               'method to "divergence"')


def if_several(chosen: dict[str, bool]) -> str:
    """The names of the chosen, if there are at least two; else nothing."""
    names = [name for name, is_chosen in chosen.items() if is_chosen]
    return " and ".join(names) if len(names) > 1 else ""


# -- notices -----------------------------------------------------------------------------------------------------


def warnings_of(config) -> list[str]:
    """One line for each key that is set but has no effect, or an effect that is not wanted."""
    lines = []
    if useless := [f"trainer_kwargs.{key}" for key in NO_EFFECT if getattr(config.trainer_kwargs, key) is not None]:
        lines.append(f"{' and '.join(useless)}: no effect, and nothing to set instead: training scripts train, and the "
                     "KV cache is always used")
    if config.lr_scheduler_kwargs.increase_batch_size_on_plateau and config.callbacks_kwargs.kwargs.patience is None:
        lines.append("lr_scheduler_kwargs.increase_batch_size_on_plateau has no effect: set "
                     "callbacks_kwargs.kwargs.patience, the epochs without improvement that make a plateau")
    if not hasattr(config, "distillation_kwargs"):
        return lines
    kwargs, dropout = config.distillation_kwargs, config.model_arch.dropout
    fields = type(kwargs).model_fields
    lines += [f"distillation_kwargs.{fields[key].alias or key} has no effect: {reason}"
              for key, reason in unused_keys(kwargs).items() if getattr(kwargs, key) != fields[key].default]
    if kwargs.method == "policy_gradient" and dropout:
        lines.append(f"model_arch.dropout is {dropout}: with policy_gradient the student's probabilities then differ "
                     "between sampling and loss; null or 0 is better")
    return lines


def unused_keys(kwargs) -> dict[str, str]:
    """{key of distillation_kwargs: why it has no effect}."""
    unused: dict[str, str] = {}
    if kwargs.method == "divergence":
        unused |= dict.fromkeys(POLICY_KEYS, "only policy_gradient uses it")
        unused |= {key: f"it is a parameter of kl_div {' and '.join(names)}, and kl_div is {kwargs.kl_div}"
                   for key, names in OWNERS.items() if kwargs.kl_div not in names}
        if kwargs.kd_weight == 0:
            unused |= dict.fromkeys(("temperature", "on_policy_fraction"), "kd_weight is 0")
        if kwargs.on_policy_fraction == 0:
            unused |= dict.fromkeys(SAMPLING_KEYS, "nothing is sampled with on_policy_fraction 0")
        return unused
    unused |= dict.fromkeys(("kl_div", "kd_weight", *PARAMETERS), "only method divergence uses it")
    if kwargs.rollout != "mixed":
        unused["alpha"] = f"rollout is {kwargs.rollout}, not mixed"
    if kwargs.rollout == "labels":
        unused |= dict.fromkeys((*SAMPLING_KEYS, "importance_weight"), "nothing is sampled with rollout labels")
    if not kwargs.penalty:
        unused |= dict.fromkeys(PENALTY_KEYS, "penalty is false")
    if kwargs.lm_weight == 1:
        keys = ("temperature", *POLICY_KEYS, *SAMPLING_KEYS)
        unused |= {key: "rollouts have no weight, lm_weight is 1" for key in keys if key != "lm_weight"}
    return unused
