"""Where a run stands: all of it that is neither weights, optimizer nor random generators, as plain JSON values."""

import math
from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """Counters and decisions of a run. A checkpoint holds them, so a resumed run decides as the uninterrupted one.

    step: optimizer steps done. epoch: of the next step, from 0. step_in_epoch: steps done in it.
    micro_batches: done in all; micro_batches_in_epoch: in this epoch.
    accumulation: micro-batches a step (doubled on a plateau). loss_scale, baseline: adaptive loss scaling.
    best_score, best_step: best validation; reference_score, evaluations_without_gain: early stopping.
    epoch_loss, epoch_tokens: sums of this epoch. evaluation_pending: the epoch's validation is still to be done;
    scaling_pending: a score of adaptive loss scaling is. skipped_steps: steps that were left out because they were not
    finite; they count as steps.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    micro_batches: int = 0
    accumulation: int = 1
    loss_scale: float = 1.0
    baseline: float = 0.15
    best_score: float | None = None
    best_step: int | None = None
    reference_score: float | None = None
    evaluations_without_gain: int = 0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    evaluation_pending: bool = False
    scaling_pending: bool = False
    stopped_early: bool = False
    skipped_steps: int = 0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "TrainState":
        """Raises ValueError for a value that no run has."""
        found = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for field in fields(cls):
            if not is_of_run(found.get(field.name, field.default), field.default, field.name):
                raise ValueError(f"{field.name} is {str(found[field.name])[:80]!r}")
        return cls(**found)

    # -- decisions -----------------------------------------------------------------------------------------------

    def update_best(self, score: float, mode: str, threshold: float) -> bool:
        """Take note of a validation score; True where it is the best so far.

        mode: "max" or "min". A gain of `threshold` or less over the last real gain does not reset the patience. A score
        that is not finite (a perplexity that overflows) is no gain.
        """
        if not math.isfinite(score):
            self.evaluations_without_gain += 1
            return False
        sign = 1.0 if mode == "max" else -1.0
        if self.reference_score is None or sign * (score - self.reference_score) > threshold:
            self.reference_score, self.evaluations_without_gain = score, 0
        else:
            self.evaluations_without_gain += 1
        if self.best_score is None or sign * (score - self.best_score) > 0:
            self.best_score, self.best_step = score, self.step
            return True
        return False

    def reset_best(self, before: dict, now: dict, baseline: float) -> list[str]:
        """Forget scores that those to come are not comparable with; returns notices.

        before, now: what they are of, as `meanings` has it. baseline: of the config.
        """
        notices = []
        if before["judged_by"] != now["judged_by"]:
            if self.best_score is not None:
                notices.append(f"best was by {before['judged_by']}, now by {now['judged_by']}: judged anew")
            self.best_score = self.best_step = self.reference_score = None
            self.evaluations_without_gain = 0
        if before["scaled_by"] not in (None, now["scaled_by"]):
            self.baseline = baseline
            notices.append(f"the loss was scaled by {before['scaled_by']}, now by {now['scaled_by']}: baseline anew")
        return notices

    def on_plateau(self, patience: int | None, increase_batch_size: bool, most: int) -> str | None:
        """What to do when `patience` evaluations brought no gain: "stop", "increase" (accumulation doubled) or None.

        most: micro-batches in an epoch; once a step holds that many, doubling changes nothing more and the run stops.
        """
        if patience is None or self.evaluations_without_gain < max(1, patience):
            return None
        if increase_batch_size and self.accumulation < most:
            self.accumulation *= 2
            self.evaluations_without_gain = 0
            return "increase"
        self.stopped_early = True
        return "stop"

    def scale_loss(self, score: float, metric: str) -> None:
        """Adaptive loss scaling: sigmoid(baseline - score), and a better score becomes the baseline.

        With metric "perplexity" (where score is the perplexity) the scale is sigmoid(perplexity).
        """
        difference = score if metric == "perplexity" else self.baseline - score
        self.loss_scale = 1.0 / (1.0 + math.exp(-min(difference, 700.0)))
        if metric != "perplexity":
            self.baseline = max(self.baseline, score)


def is_of_run(value, default, name: str) -> bool:
    """Whether a value can be that of the field `name`: counts, finite numbers, or yes and no."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if default is None and value is None:
        return True
    if isinstance(default, int) or name.endswith("_step"):
        return type(value) is int and 0 <= value < 1 << 53
    return type(value) in (int, float) and math.isfinite(value)
