"""The training loop: epochs of optimizer steps, validation after each epoch, checkpoints on the way."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain

import torch

from data.batches import Step, load_batches, plan_epoch
from data.tokenized import TokenizedDataset
from model.objective import Objective, ObjectiveError
from utils.config.fine_tune import FineTuneConfig
from utils.errors import TrainingError, describe
from utils.progress import progress_bar
from utils.training.distributed import DistributedContext
from utils.training.nonfinite import NonFiniteHandler, NotFinite
from utils.training.optimization import LRSchedule, make_schedule, restore_optimizer, schedule_notices
from utils.training.out_of_memory import BATCH, OutOfMemory, evaluation_remedy, out_of_memory_remedy
from utils.training.random_state import random_state, seed_everything, set_random_state
from utils.training.signals import Interrupted, StopRequest
from utils.training.state import TrainState
from utils.training.step import StepMetrics, optimizer_step


class Trainer:
    """Trains an objective's language model.

    It knows nothing of teachers; objectives know nothing of optimizers. validation, log, checkpoints: a `Validation`,
    the `RunLog` and the `Checkpoints` of the run. fingerprint: what a resumed run must have in common with this one.
    score_identities: the metric and data of the stored scores ("judged_by", "scaled_by"); None if not measured.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, config: FineTuneConfig, table: TokenizedDataset,
        validation, context: DistributedContext, log, checkpoints, stop: StopRequest, fingerprint: dict,
        score_identities: dict[str, str | None],
    ):
        self.objective, self.language_model, self.optimizer = objective, objective.language_model, optimizer
        self.config, self.table, self.validation, self.context = config, table, validation, context
        self.log, self.checkpoints, self.stop = log, checkpoints, stop
        self.fingerprint, self.score_identities = fingerprint, score_identities
        self.options = config.trainer_kwargs
        self.state = TrainState(accumulation=self.options.gradient_accumulation_steps,
                                baseline=self.options.baseline_threshold)
        self.saved: dict | None = None  # the state in the newest checkpoint
        self.nonfinite = NonFiniteHandler(
            objective, table, context, log, self.options.skip_nonfinite_steps, lambda: self.saved is not None
        )
        seed_everything((self.options.seed + context.rank) % 2**32)  # dropout differs between processes

    # -- resume --------------------------------------------------------------------------------------------------

    def restore(self, state: dict, tensors: dict) -> None:
        """Continue from a checkpoint's state."""
        self.state = TrainState.from_json(state)
        # The rows of a step are the same as before, perhaps in other micro-batches.
        batch_size = self.config.dataset_kwargs.train_batch_size
        self.state.accumulation = self.state.accumulation * state["identity"].get(BATCH, batch_size) // batch_size
        before = {"judged_by": state["judged_by"], "scaled_by": state.get("scaled_by")}
        self.score_identities = {key: name or before[key] for key, name in self.score_identities.items()}
        self.saved = self.checkpoint_state()
        for line in self.state.reset_best(before, self.score_identities, self.options.baseline_threshold):
            self.log.info(line)
        restore_optimizer(self.optimizer, tensors["optimizer"])
        patience = self.config.callbacks_kwargs.kwargs.patience
        self.state.stopped_early &= patience is not None and self.state.num_bad_evals >= max(1, patience)
        self.report_learning_rate(state.get("next_learning_rate"))
        generators = tensors["random"]
        same_size = len(generators) == self.context.world_size
        if extra_states := tensors.get("objective"):  # if the number of processes has changed, rank 0's
            self.objective.set_extra_state(extra_states[self.context.rank if same_size else 0])
        if not (same_size and set_random_state(generators[self.context.rank])):
            self.log.info("the checkpoint was written with another number of processes or GPUs: dropout will differ")

    def ended_by(self) -> str | None:
        """The key that ends the run here, or None if it continues."""
        if self.state.evaluation_pending:
            return None
        if self.state.stopped_early:
            return "callbacks_kwargs.kwargs.patience"
        if self.options.max_steps is not None and self.state.step >= self.options.max_steps:
            return "trainer_kwargs.max_steps"
        return "trainer_kwargs.epochs" if self.state.epoch >= self.options.epochs else None

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end. The last weights are in `model_checkpoints/last`.

        Raises:
            TrainingError: a loss or gradient is not finite, and no (further) step may be skipped; the weights are as
                before that step.
            Stopped: a signal asked to stop; a checkpoint has been written.
        """
        steps = len(self.plan())
        for line in schedule_notices(self.schedule(steps), self.total_steps(steps)):
            self.log.info(line)
        while not self.ended_by():
            if not self.state.evaluation_pending:
                self.train_epoch()
            self.finish_epoch()
        if problem := self.log.flush():
            raise TrainingError(f"{problem}; the training is finished and saved, the last lines of its log are missing")

    def train_epoch(self) -> None:
        """The rest of the epoch's optimizer steps."""
        state, options = self.state, self.options
        plan = self.plan()
        schedule = self.schedule(len(plan))
        remaining = plan[state.step_in_epoch :]
        if options.max_steps is not None:
            remaining = remaining[: options.max_steps - state.step]
        self.objective.train()
        steps = self.iter_steps(remaining)
        self.rescale_loss()
        start, tokens = time.perf_counter(), 0
        title = f"epoch {state.epoch + 1}/{options.epochs}"
        with progress_bar(title, len(plan), "step", state.step_in_epoch, self.context.is_main) as bar:
            for step in remaining:
                metrics = self.train_step(step, steps, schedule.learning_rate(state.step))
                tokens += int(self.table.lengths[list(chain(*step))].sum())
                bar.update()
                last = step is remaining[-1]
                if (state.step == 1 or state.step % options.log_every == 0 or last) and not metrics.skipped:
                    now = time.perf_counter()
                    self.record(metrics, tokens / (now - start))
                    bar.set_postfix_str(f"loss {metrics.losses['loss']:.3f}, lr {metrics.learning_rate:.2e}, "
                                        f"{tokens / (now - start):,.0f} tokens/s", refresh=False)
                    start, tokens = now, 0
                if options.adaptive_loss_scaling and self.crossed_multiple(options.loss_scaling_batch, len(step)):
                    state.scaling_pending = True
                    self.rescale_loss()
                if last:
                    break  # finish_epoch saves, and stops if asked to
                if metrics.stop_requested or self.crossed_multiple(options.n_batch_ckpt_save, len(step)):
                    self.save()
                if metrics.stop_requested:
                    self.stop.raise_stopped(state.step)
        if state.step_in_epoch == len(plan):
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
        state.evaluation_pending = True

    def train_step(self, step: Step, steps: Iterator[Iterable[tuple]], learning_rate: float) -> StepMetrics:
        """One optimizer step over the micro-batches of `step`; `steps` is the objective's `iter_steps`.

        Raises:
            TrainingError: the step is not finite and may not be skipped, or the objective cannot continue.
        """
        state = self.state
        try:
            micro_batches = next(steps)
        except ObjectiveError as error:
            self.save()
            raise TrainingError(f"optimizer step {state.step + 1}: {error}; the weights before that step are in "
                                "model_checkpoints/last") from error
        metrics = optimizer_step(
            self.objective, micro_batches, self.optimizer, self.context,
            label_tokens=int(self.table.label_counts[list(chain(*step))].sum()), learning_rate=learning_rate,
            clip_norm=self.options.gradient_clipping,
            loss_scale=state.loss_scale if self.options.adaptive_loss_scaling else 1.0,
            stop_requested=self.stop.requested,
        )
        if metrics.skipped:
            own = self.local_micro_batches(step)
            self.nonfinite.skip_step(state, metrics, step, [own[index] for index in metrics.bad_micro_batches])
        else:
            state.epoch_loss += metrics.losses["loss"] * metrics.label_tokens
            state.epoch_tokens += metrics.label_tokens
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        state.micro_batches += len(step)
        return metrics

    def finish_epoch(self) -> None:
        """Validate, decide about stopping, save."""
        state, callbacks = self.state, self.config.callbacks_kwargs.kwargs
        epoch = state.epoch if state.step_in_epoch else state.epoch - 1
        best = False
        if self.options.monitor_train and state.epoch_tokens:
            self.log.record("train_epoch", state.step, epoch=epoch, loss=state.epoch_loss / state.epoch_tokens)
        if epoch >= self.options.first_val_epoch:
            metrics = self.evaluate(lambda interrupted: self.validation.run(state.step, epoch, interrupted))
            score = metrics.get(self.config.monitored_metric)
            if score is not None:
                best = state.update_best(score, callbacks.mode, callbacks.threshold)
                self.check_plateau(callbacks)
        state.evaluation_pending, state.epoch_loss, state.epoch_tokens = False, 0.0, 0
        if best or callbacks.save_final_model or state.best_step is None or not self.ended_by():
            self.save(best)
            self.note_weights()
        if self.context.any(self.stop.requested) and not self.ended_by():
            self.stop.raise_stopped(state.step)

    # -- the plan of an epoch ------------------------------------------------------------------------------------

    def plan(self) -> list[Step]:
        """All optimizer steps of the epoch."""
        data = self.config.dataset_kwargs
        return plan_epoch(
            self.table.lengths, data.train_batch_size, self.state.accumulation, self.options.seed, self.state.epoch,
            data.tokens_per_batch, self.options.ckpt_training_batch, self.objective.passes,
        )

    def local_micro_batches(self, step: Step) -> Step:
        """The micro-batches of a step that this process computes."""
        return step[self.context.rank :: self.context.world_size]

    def iter_steps(self, steps: list[Step]) -> Iterator[Iterable[tuple]]:
        """For each step the arguments of the objective for this process's micro-batches."""
        own = [self.local_micro_batches(step) for step in steps]
        batches = load_batches(
            self.table, list(chain(*own)), self.language_model.tokenizer.pad_token_id,
            self.config.dataset_kwargs.num_workers, pin_memory=self.context.device.type == "cuda",
        )
        return self.objective.iter_steps(self.table, batches, list(map(len, own)))

    def total_steps(self, steps_in_epoch: int) -> int:
        """Optimizer steps of the run: those before this epoch, and this and all later epochs at its length."""
        state = self.state
        total = state.step - state.step_in_epoch + steps_in_epoch * (self.options.epochs - state.epoch)
        return total if self.options.max_steps is None else min(total, self.options.max_steps)

    def schedule(self, steps_in_epoch: int) -> LRSchedule:
        """The learning rates in this epoch."""
        return make_schedule(self.config.lr_scheduler_kwargs, self.config.optimizer_kwargs.lm_lr,
                             self.total_steps(steps_in_epoch))

    def next_learning_rate(self) -> float:
        return self.schedule(len(self.plan())).learning_rate(self.state.step)

    def report_learning_rate(self, before: float | None) -> None:
        """A line if the schedule has changed (more epochs, say). before: the next rate when the checkpoint was written;
        None: of an earlier version."""
        schedule = self.schedule(len(self.plan()))
        after = schedule.learning_rate(self.state.step)
        if before is not None and not math.isclose(before, after, rel_tol=1e-6) and not self.ended_by():
            self.log.info(f"learning rate: {after:.2e} at the next step, {before:.2e} when the checkpoint was written: "
                          f"the schedule now covers {schedule.total} steps from lm_lr {schedule.peak:.2e}; set "
                          "optimizer_kwargs.lm_lr or lr_scheduler_kwargs for other rates")

    # -- between steps -------------------------------------------------------------------------------------------

    def record(self, metrics: StepMetrics, tokens_per_second: float) -> None:
        extra = {"loss_scale": self.state.loss_scale} if self.options.adaptive_loss_scaling else {}
        self.log.record(
            "train", self.state.step, epoch=self.state.epoch, **metrics.losses, learning_rate=metrics.learning_rate,
            grad_norm=metrics.grad_norm, label_tokens=metrics.label_tokens, tokens_per_second=tokens_per_second,
            **extra,
        )

    def crossed_multiple(self, every: int | None, micro_batches: int) -> bool:
        """Whether the last step, of `micro_batches` micro-batches, passed a multiple of `every` micro-batches."""
        done = self.state.micro_batches
        return every is not None and done // every > (done - micro_batches) // every

    def evaluate(self, measure):
        """`measure(interrupted)`, an evaluation. The work since the last checkpoint is saved if it is interrupted, runs
        out of memory or cannot write its results."""
        # In a group a process that stops alone would leave the others waiting: it neither stops nor saves.
        alone, problem, result = self.context.world_size == 1, None, None
        try:
            with out_of_memory_remedy(evaluation_remedy(self.config)):
                result = measure(lambda: alone and self.stop.requested)
        except NotFinite as error:
            self.nonfinite.stop(error, self.state.step)
        except Interrupted:
            self.save()
            self.stop.raise_stopped(self.state.step)
        except OutOfMemory:
            if alone:
                self.save()
            raise
        except OSError as error:  # of the results, which the main process writes last
            problem = describe(error)
        if problem := self.context.broadcast_object(problem):
            self.save()
            raise TrainingError(f"{problem}; {self.where_stopped()}")
        return result

    def where_stopped(self) -> str:
        return f"stopped at optimizer step {self.state.step}, checkpoint written; {self.stop.resume_hint}"

    def rescale_loss(self) -> None:
        """Adaptive loss scaling: measure the score if one is due. A run that is stopped in it will do it again."""
        if not self.state.scaling_pending or not self.options.adaptive_loss_scaling:
            return
        score = self.evaluate(lambda interrupted: self.validation.score(self.options.adaptive_loss_metric, interrupted))
        self.state.scaling_pending = False
        self.state.scale_loss(score, self.options.adaptive_loss_metric)
        self.log.record("loss_scaling", self.state.step, score=score, loss_scale=self.state.loss_scale)

    def check_plateau(self, callbacks) -> None:
        """After `patience` evaluations without gain: double the accumulation, if asked to and possible, or stop."""
        state, patience = self.state, callbacks.patience
        # If max_steps ended the epoch early, a later run may continue its plan.
        if patience is None or state.num_bad_evals < max(1, patience) or state.step_in_epoch:
            return
        increase = self.config.lr_scheduler_kwargs.increase_batch_size_on_plateau
        # Not beyond one step per epoch.
        if increase and state.accumulation * self.config.dataset_kwargs.train_batch_size < len(self.table):
            state.accumulation, state.num_bad_evals = 2 * state.accumulation, 0
            self.log.info(f"no gain in {patience} evaluations: accumulation is now {state.accumulation}")
        else:
            state.stopped_early = True
            self.log.info(f"no gain in {patience} evaluations: stopped early; the best was step {state.best_step}")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict:
        return {**asdict(self.state), "next_learning_rate": self.next_learning_rate(), "identity": self.fingerprint,
                **self.score_identities}

    def save(self, best: bool = False) -> None:
        """Write `step-N`, unless this state is saved already."""
        state = self.checkpoint_state()
        if state == self.saved and not best:
            return
        self.nonfinite.check_before_saving(self.optimizer, self.state.step)
        generators, extra_states = zip(
            *self.context.all_gather_object((random_state(), self.objective.get_extra_state())), strict=True
        )
        if self.context.is_main:
            problem = self.log.flush()  # first: no checkpoint is newer than its log
            tensors = {"optimizer": self.optimizer.state_dict(), "random": list(generators),
                       "objective": list(extra_states)}
            self.checkpoints.save(self.state.step, self.language_model.save, state, tensors, best)
            if problem:
                raise TrainingError(f"{problem}; {self.where_stopped()}")
        self.saved = state
        self.context.barrier()

    def note_weights(self) -> None:
        """Let the scores of this step name the weights that they are of, once those are saved."""
        if self.context.is_main:
            self.validation.note_weights(self.checkpoints.root / f"step-{self.state.step}")
