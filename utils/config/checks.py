"""Keys that cannot both be meant, of the sections that the configs of both training scripts have."""


def monitored_metric(stopping) -> str:
    """The validation metric that decides about best and about stopping, of `callbacks_kwargs.kwargs`."""
    return stopping.metric or ("rougeL" if stopping.mode == "max" else "loss")


def contradictions(config) -> list[str]:
    """One line for each pair of keys that cannot both be meant, of the sections that both configs have."""
    return [*dataset_contradictions(config), *stopping_contradictions(config), *scaling_contradictions(config)]


def dataset_contradictions(config) -> list[str]:
    trainer, data = config.trainer_kwargs, config.dataset_kwargs
    lines = []
    for monitor, dataset in (("monitor_val", "validation_dataset"), ("monitor_test", "test_dataset")):
        if getattr(trainer, monitor) and getattr(data, dataset) is None:
            lines.append(f"trainer_kwargs.{monitor} is true but dataset_kwargs.{dataset} is null: name its CSV, or set "
                         f"{monitor} to false")
    return lines


def stopping_contradictions(config) -> list[str]:
    trainer, stopping = config.trainer_kwargs, config.callbacks_kwargs.kwargs
    metric, lines = monitored_metric(stopping), []
    better = "max" if metric.startswith("rouge") else "min"
    if stopping.mode != better:
        direction, remedy = ("higher", "loss") if better == "max" else ("lower", "rougeL")
        lines.append(f'callbacks_kwargs.kwargs.mode is "{stopping.mode}" but callbacks_kwargs.kwargs.metric is '
                     f'"{metric}", which is better when {direction}: set mode to "{better}", or metric to "{remedy}"')
    if stopping.patience is not None and not trainer.monitor_val:
        lines.append(f"callbacks_kwargs.kwargs.patience is {stopping.patience} but trainer_kwargs.monitor_val is "
                     "false: set monitor_val to true, or patience to null (no early stopping)")
    if config.lr_scheduler_kwargs.increase_batch_size_on_plateau and not trainer.monitor_val:
        lines.append("lr_scheduler_kwargs.increase_batch_size_on_plateau is true but trainer_kwargs.monitor_val is "
                     "false: set monitor_val to true, or increase_batch_size_on_plateau to false")
    if trainer.monitor_val and metric.startswith("rouge") and "rouge" not in trainer.metrics:
        key = "metric" if stopping.metric else "mode"
        lines.append(f'callbacks_kwargs.kwargs.{key} is "{stopping.metric or stopping.mode}" (so {metric} is '
                     'monitored) but trainer_kwargs.metrics does not hold "rouge": add it, or set mode to "min" and '
                     'metric to "loss"')
    return lines


def scaling_contradictions(config) -> list[str]:
    trainer, data = config.trainer_kwargs, config.dataset_kwargs
    if not trainer.adaptive_loss_scaling:
        return []
    start, end = "trainer_kwargs.adaptive_loss_scaling is true but", "or adaptive_loss_scaling to false"
    if not trainer.monitor_val:
        return [f"{start} trainer_kwargs.monitor_val is false: set monitor_val to true, {end}"]
    if data.validation_dataset is None:
        return [f"{start} dataset_kwargs.validation_dataset is null: set it to a CSV, {end}"]
    lines, by_rouge = [], trainer.scaling_metric.startswith("rouge")
    if by_rouge and "rouge" not in trainer.metrics:
        lines.append(f'{start} trainer_kwargs.metrics does not hold "rouge": add it, set adaptive_loss_metric to '
                     f'"perplexity", {end}')
    if by_rouge and trainer.scaling_baseline > 1:
        lines.append(f"trainer_kwargs.baseline_threshold is {trainer.scaling_baseline:g} but "
                     f'trainer_kwargs.adaptive_loss_metric is "{trainer.scaling_metric}", a score from 0 to 1: write '
                     "such as 0.15")
    return lines
