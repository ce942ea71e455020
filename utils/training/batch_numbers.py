"""The same optimizer steps in other micro-batches: the keys to change together.

The rows of a step depend on train_batch_size x gradient_accumulation_steps alone (`data/batches.py`), so a smaller
batch with as much more accumulation trains on the same rows in the same steps.
"""

from utils.config.fine_tune import FineTuneConfig

BATCH, ACCUMULATION = "dataset_kwargs.train_batch_size", "trainer_kwargs.gradient_accumulation_steps"
TOKENS, BOUND = "dataset_kwargs.tokens_per_batch", "trainer_kwargs.ckpt_training_batch"


def rows_of_step(config: FineTuneConfig) -> int:
    return config.dataset_kwargs.train_batch_size * config.trainer_kwargs.accumulation_steps


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, but at least 1."""
    return next(size for size in range(max(1, min(number, most)), 0, -1) if number % size == 0)


def with_batch_size(config: FineTuneConfig, batch_size: int) -> dict[str, int]:
    """The keys to set for the same steps in micro-batches of `batch_size` rows, a divisor of the rows of a step.

    Keys that count micro-batches are scaled too, so that they keep meaning the same number of rows.
    """
    options = config.trainer_kwargs
    before = config.dataset_kwargs.train_batch_size
    values = {BATCH: batch_size, ACCUMULATION: rows_of_step(config) // batch_size}
    counted = {"n_batch_ckpt_save": options.checkpoint_every, "ckpt_training_batch": options.batches_per_epoch,
               "loss_scaling_batch": options.loss_scaling_interval if options.adaptive_loss_scaling else None}
    for key, count in counted.items():
        if count is not None and batch_size != before:
            values[f"trainer_kwargs.{key}"] = max(1, round(count * before / batch_size))
    return values


def instead(config: FineTuneConfig, values: dict[str, int]) -> str:
    """`dataset_kwargs.train_batch_size 4 (now 8) and ...`, for keys as in `with_batch_size`."""
    parts = []
    for key, value in values.items():
        section, name = key.split(".")
        now = getattr(getattr(config, section), name)
        parts.append(f"{key} {value} (now {'null' if now is None else now})")
    return " and ".join(parts)
