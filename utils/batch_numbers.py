"""Another number of rows in a micro-batch with the same optimizer steps: what to write into a config for it.

The rows of a step depend on train_batch_size x accumulation alone (`data/batches.py`), so a smaller batch with as much
more accumulation trains on the same rows in the same steps.
"""

from utils.config import FineTuneConfig

BATCH, ACCUMULATION = "dataset_kwargs.train_batch_size", "trainer_kwargs.gradient_accumulation_steps"
TOKENS, BOUND = "dataset_kwargs.tokens_per_batch", "trainer_kwargs.ckpt_training_batch"


def rows_of_step(config: FineTuneConfig) -> int:
    return config.dataset_kwargs.train_batch_size * config.trainer_kwargs.accumulation_steps


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most` (at least 1)."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def smaller_batch(batch_size: int, rows: int) -> int:
    """The largest number of rows that divides `batch_size` and is less than `rows`: half, where both are the same power
    of two."""
    return largest_divisor(batch_size, max(1, rows - 1))


def with_batch_size(config: FineTuneConfig, batch_size: int) -> dict[str, int]:
    """The keys to set, with their values, for the same steps in micro-batches of `batch_size` rows, which must divide
    the rows of a step. Keys that count micro-batches keep the rows between them, rounded where they must be."""
    options = config.trainer_kwargs
    before = config.dataset_kwargs.train_batch_size
    values = {BATCH: batch_size, ACCUMULATION: rows_of_step(config) // batch_size}
    counted = {"n_batch_ckpt_save": options.checkpoint_every, "ckpt_training_batch": options.batches_per_epoch,
               "loss_scaling_batch": options.loss_scaling_interval if options.adaptive_loss_scaling else None}
    for key, count in counted.items():
        if count is not None and batch_size != before:
            values[f"trainer_kwargs.{key}"] = max(1, round(count * before / batch_size))
    return values


def instead(config: FineTuneConfig, values: dict[str, object]) -> str:
    """`key 4 (now 8) and key 2 (now 1)`; keys as in `with_batch_size`."""
    parts = [f"{key} {value} (now {shown(value_of(config, key))})" for key, value in values.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def value_of(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def shown(value) -> str:
    return "null" if value is None else str(value)
