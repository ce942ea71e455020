"""Progress of a run: everything that is neither weights, optimizer nor random generators, as plain JSON values."""

import math
from dataclasses import dataclass, fields

# Of checkpoints written by earlier versions.
FORMER_NAMES = {"reference_score": "patience_score", "evaluations_without_gain": "num_bad_evals"}


@dataclass
class TrainState:
    """Counters and decisions of a run. A checkpoint holds them, so a resumed run decides as an uninterrupted one.

    step: optimizer steps done, skipped ones included. epoch: of the next step, from 0. step_in_epoch: steps done in it.
    micro_batches: done in all. accumulation: micro-batches per step (doubled on a plateau). loss_scale, baseline:
    adaptive loss scaling. best_score, best_step: best validation. patience_score, num_bad_evals: early stopping.
    epoch_loss, epoch_tokens: sums of this epoch. evaluation_pending: the epoch's validation has not been done yet;
    scaling_pending: nor has the score of adaptive loss scaling. skipped_steps: skipped because they were not finite.
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
    patience_score: float | None = None
    num_bad_evals: int = 0
    epoch_loss: float = 0.0
    epoch_tokens: int = 0
    evaluation_pending: bool = False
    scaling_pending: bool = False
    stopped_early: bool = False
    skipped_steps: int = 0

    @classmethod
    def from_json(cls, values: dict) -> "TrainState":
        values = {FORMER_NAMES.get(key, key): value for key, value in values.items()}
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    # -- decisions -----------------------------------------------------------------------------------------------

    def update_best(self, score: float, mode: str, threshold: float) -> bool:
        """Record a validation score; returns whether it is the best so far.

        mode: "max" or "min". The patience is reset only by a gain of more than `threshold` over the score that reset it
        last. A score that is not finite (a perplexity that overflows) is no gain.
        """
        if not math.isfinite(score):
            self.num_bad_evals += 1
            return False
        sign = 1.0 if mode == "max" else -1.0
        if self.patience_score is None or sign * (score - self.patience_score) > threshold:
            self.patience_score, self.num_bad_evals = score, 0
        else:
            self.num_bad_evals += 1
        if self.best_score is None or sign * (score - self.best_score) > 0:
            self.best_score, self.best_step = score, self.step
            return True
        return False

    def reset_best(self, before: dict, now: dict, baseline: float) -> list[str]:
        """Reset best score and scaling baseline if metric or data changed since the checkpoint; returns notices.

        before, now: what the scores are of ("judged_by", "scaled_by"). baseline: the config's.
        """
        notices = []
        if before["judged_by"] != now["judged_by"]:
            if self.best_score is not None:
                notices.append(f"best was by {before['judged_by']}, now by {now['judged_by']}: the best score is reset")
            self.best_score = self.best_step = self.patience_score = None
            self.num_bad_evals = 0
        if before["scaled_by"] not in (None, now["scaled_by"]):
            self.baseline = baseline
            notices.append(f"the loss was scaled by {before['scaled_by']}, now by {now['scaled_by']}: baseline reset")
        return notices

    def scale_loss(self, score: float, metric: str) -> None:
        """Adaptive loss scaling: sigmoid(baseline - score), and a better score becomes the baseline.

        With metric "perplexity" the scale is sigmoid(perplexity).
        """
        difference = score if metric == "perplexity" else self.baseline - score
        self.loss_scale = 1.0 / (1.0 + math.exp(-min(difference, 700.0)))
        if metric != "perplexity":
            self.baseline = max(self.baseline, score)

