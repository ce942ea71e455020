"""The loop: epochs of optimizer steps, validation after each, checkpoints on the way.

Micro-batches back-propagate SUMS over label tokens; each optimizer step divides its gradients once by the label tokens
of all its micro-batches on all processes. So a step is the same whatever the micro-batch size, the accumulation and
the number of processes.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from data.batches import Step, load_batches, plan_epoch
from data.tokenized import TokenizedDataset
from model.language_model import LanguageModel
from model.objective import ObjectiveError
from utils.config.fine_tune import FineTuneConfig
from utils.evaluation.evaluate import Interrupted, NotFinite, never
from utils.evaluation.validation import Validation
from utils.runs.checkpoint import Checkpoints
from utils.runs.run_folder import meanings
from utils.runs.run_log import RunLog, progress_bar
from utils.training.batch_numbers import BATCH
from utils.training.distributed import DistributedContext
from utils.training.nonfinite import NonFiniteHandler, check_before_saving
from utils.training.optimization import LRSchedule, make_schedule, restore_optimizer, schedule_notices
from utils.training.out_of_memory import OutOfMemory, evaluation_remedy, out_of_memory_remedy
from utils.training.random_state import random_state, seed_everything, set_random_state
from utils.training.signals import StopRequest
from utils.training.state import TrainState
from utils.training.step import TrainingError, accumulate_gradients, add_up, is_finite, update
from utils.training.step_result import StepMetrics


class Trainer:
    """Trains `objective` (an `nn.Module` returning `LossTerms`) and keeps `language_model`, which is part of it.

    It knows nothing of teachers; objectives know nothing of optimizers.
    """

    def __init__(
        self,
        objective: nn.Module,
        language_model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        config: FineTuneConfig,
        table: TokenizedDataset,
        validation: Validation,
        context: DistributedContext,
        log: RunLog,
        checkpoints: Checkpoints,
        stop: StopRequest,
        identity: dict,
    ):
        self.objective, self.language_model, self.optimizer = objective, language_model, optimizer
        self.config, self.table, self.validation = config, table, validation
        self.context, self.log, self.checkpoints, self.stop, self.identity = context, log, checkpoints, stop, identity
        self.options = config.trainer_kwargs
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.state = TrainState(
            accumulation=self.options.accumulation_steps, baseline=self.options.scaling_baseline
        )
        self.saved: dict | None = None
        self.meanings = meanings(config, validation)
        pad_id, most = language_model.tokenizer.pad_token_id, self.options.skip_nonfinite_steps
        self.guard = NonFiniteHandler(objective, pad_id, context, log, most, lambda: self.saved is not None)
        seed_everything((self.options.seed + context.rank) % 2**32)  # dropout differs between processes

    # -- whole runs ----------------------------------------------------------------------------------------------

    def restore(self, state: dict, tensors: dict) -> list[str]:
        """Go on from a checkpoint's state; returns notices."""
        self.state = TrainState.from_json(state)
        # The rows of a step are what they were, in other micro-batches perhaps.
        now = self.config.dataset_kwargs.train_batch_size
        self.state.accumulation = self.state.accumulation * state["identity"].get(BATCH, now) // now
        before = {"judged_by": state["judged_by"], "scaled_by": state.get("scaled_by")}
        self.meanings = {key: meaning or before[key] for key, meaning in self.meanings.items()}
        self.saved = self.checkpoint_state()
        notices = self.state.reset_best(before, self.meanings, self.options.scaling_baseline)
        restore_optimizer(self.optimizer, tensors["optimizer"])
        patience = self.config.callbacks_kwargs.kwargs.patience
        self.state.stopped_early &= patience is not None and self.state.evaluations_without_gain >= max(1, patience)
        notices += self.change_of_rate()
        generators = tensors["random"]
        same = len(generators) == self.context.world_size
        if of_objective := tensors.get("objective"):  # what is not of the process alone is the same in all
            self.objective.set_extra_state(of_objective[self.context.rank if same else 0])
        self.note_weights()  # a kill may have come before it
        if not same:
            return [*notices, f"the checkpoint was made by {len(generators)} processes, now there are "
                    f"{self.context.world_size}: dropout will not repeat number for number"]
        return notices + set_random_state(generators[self.context.rank])

    def what_ended(self) -> str | None:
        """The key that ends the run here, or None where it goes on."""
        if self.state.evaluation_pending:
            return None
        if self.state.stopped_early:
            return "callbacks_kwargs.kwargs.patience"
        if self.options.max_steps is not None and self.state.step >= self.options.max_steps:
            return "trainer_kwargs.max_steps"
        return "trainer_kwargs.epochs" if self.state.epoch >= self.options.epochs else None

    def finished(self) -> bool:
        return self.what_ended() is not None

    def fit(self) -> None:
        """Train to the end. The last weights are in `model_checkpoints/last`.

        Raises:
            TrainingError: a loss or gradient that is not finite, and no such step may be left out (any more); the
                weights are as before that step.
            Stopped: a signal asked to stop; a checkpoint has been written.
        """
        steps = self.total_steps(len(self.plan()), self.state)
        for line in schedule_notices(self.config.lr_scheduler_kwargs, self.config.optimizer_kwargs.lm_lr, steps):
            self.log.info(line)
        while not self.finished():
            (self.finish_epoch if self.state.evaluation_pending else self.train_epoch)()
        if self.saved is None:
            self.save()
        if refusal := self.log.settle():
            raise TrainingError(f"{refusal}; the training is finished and saved, its last lines are missing there")

    # -- an epoch ------------------------------------------------------------------------------------------------

    def plan(self, state: TrainState | None = None) -> list[Step]:
        """All steps of the epoch of a state; None is that of now."""
        data, state = self.config.dataset_kwargs, state or self.state
        return plan_epoch(
            self.table.lengths, data.train_batch_size, state.accumulation, self.options.seed, state.epoch,
            data.tokens_per_batch, self.options.batches_per_epoch, self.objective.passes,
        )

    def total_steps(self, steps_in_epoch: int, state: TrainState) -> int:
        """Optimizer steps of the run: those done before a state's epoch, and those that are to come at its length."""
        total = state.step - state.step_in_epoch + steps_in_epoch * (self.options.epochs - state.epoch)
        return total if self.options.max_steps is None else min(total, self.options.max_steps)

    def schedule(self, steps_in_epoch: int, state: TrainState | None = None) -> LRSchedule:
        """The learning rates in the epoch of a state; None is that of now."""
        total = self.total_steps(steps_in_epoch, state or self.state)
        return make_schedule(self.config.lr_scheduler_kwargs, self.config.optimizer_kwargs.lm_lr, total)

    def change_of_rate(self) -> list[str]:
        """A line where the learning rates do not go on from those that led to a checkpoint, as with more epochs."""
        state, held = self.state, self.optimizer.param_groups[0]["lr"]
        taken = state.step - state.skipped_steps
        if self.finished() or not taken:
            return []
        # Of a step that was left out the optimizer does not hold the rate.
        steps = range(taken - 1, state.step)
        if any(math.isclose(schedule.learning_rate(step), held, rel_tol=1e-6)
               for schedule in self.schedules_before() for step in steps):
            return []
        now = self.schedule(len(self.plan()))
        return [f"learning rate: {held:.2e} at the checkpoint's last step, {now.learning_rate(state.step):.2e} at the "
                f"next: the schedule is not that of before, it now covers {now.total} steps from lm_lr {now.peak:.2e}; "
                "set optimizer_kwargs.lm_lr or lr_scheduler_kwargs for other rates"]

    def schedules_before(self) -> Iterator[LRSchedule]:
        """What today's config would have given for the last step: where it ended its epoch, at the length of that."""
        state = self.state
        if state.step_in_epoch:
            yield self.schedule(len(self.plan()))
            return
        for accumulation in {state.accumulation, state.accumulation // 2 or 1}:  # a plateau may have doubled it since
            epoch = replace(state, epoch=state.epoch - 1, accumulation=accumulation)
            epoch.step_in_epoch = len(self.plan(epoch))
            yield self.schedule(epoch.step_in_epoch, epoch)

    def train_epoch(self) -> None:
        plan = self.plan()
        schedule = self.schedule(len(plan))
        most = self.options.max_steps
        remaining = plan[self.state.step_in_epoch :]
        if most is not None:
            remaining = remaining[: most - self.state.step]
        shares = [self.local_micro_batches(step) for step in remaining]
        self.objective.train()
        steps = self.objective.iter_steps(self.table, load_batches(
            self.table, list(chain(*shares)), self.language_model.tokenizer.pad_token_id,
            self.config.dataset_kwargs.num_workers, pin_memory=self.context.device.type == "cuda",
        ), list(map(len, shares)))
        bar = progress_bar(
            f"epoch {self.state.epoch + 1}/{self.options.epochs}", len(plan), "step", self.state.step_in_epoch,
            self.context.is_main,
        )
        self.rescale_loss()
        clock, tokens = time.perf_counter(), 0
        with bar:
            for step in remaining:
                result = self.train_step(step, steps, schedule.learning_rate(self.state.step))
                self.count(step, result)
                tokens += int(self.table.lengths[list(chain(*step))].sum())
                bar.update()
                logged = self.state.step == 1 or self.state.step % self.options.log_every == 0
                if (logged or step is remaining[-1]) and not result.skipped:
                    now = time.perf_counter()
                    self.record(result, tokens / (now - clock))
                    bar.set_postfix_str(f"loss {result.losses['loss']:.3f}, lr {result.learning_rate:.2e}, "
                                        f"{tokens / (now - clock):,.0f} tokens/s", refresh=False)
                    clock, tokens = now, 0
                if self.options.adaptive_loss_scaling and self.passed(self.options.loss_scaling_interval, len(step)):
                    self.state.scaling_pending = True
                    self.rescale_loss()
                if step is not remaining[-1]:
                    self.checkpoint_on_the_way(len(step))
        if self.state.step_in_epoch == len(plan):
            self.state.epoch, self.state.step_in_epoch = self.state.epoch + 1, 0
        self.state.evaluation_pending = True

    def local_micro_batches(self, step: Step) -> Step:
        """The micro-batches of a step that this process does."""
        return step[self.context.rank :: self.context.world_size]

    def count(self, step: Step, result: StepMetrics) -> None:
        self.state.step += 1
        self.state.step_in_epoch += 1
        self.state.micro_batches += len(step)
        if not result.skipped:
            self.state.epoch_loss += result.losses["loss"] * result.label_tokens
            self.state.epoch_tokens += result.label_tokens

    # -- a step --------------------------------------------------------------------------------------------------

    def train_step(self, step: Step, steps: Iterator[Iterator], learning_rate: float) -> StepMetrics:
        """One optimizer step over the micro-batches of `step`; `steps` is what the objective's `ahead` gives.

        A step that is not finite is left out as often as the config allows it, else raises TrainingError; either way
        weights and optimizer are as before.
        """
        scale = self.state.loss_scale if self.options.adaptive_loss_scaling else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        losses, sums = accumulate_gradients(self.objective, self.arguments_of_step(steps), self.context, scale)
        tokens = int(self.table.label_counts[list(chain(*step))].sum())
        result = add_up(self.parameters, sums, tokens, learning_rate, self.context)
        if is_finite(result):
            update(self.optimizer, self.parameters, result, self.options.clip_norm)
        else:
            own = zip(self.local_micro_batches(step), losses, strict=True)
            bad = [rows for rows, loss in own if not math.isfinite(loss.item())]
            self.guard.skip_step(self.state, result, self.table, step, bad)
        return result

    def arguments_of_step(self, steps: Iterator[Iterator]) -> Iterator:
        """Raises TrainingError where the objective cannot go on; the weights of before are saved."""
        try:
            return next(steps)
        except ObjectiveError as error:
            self.save()
            raise TrainingError(f"optimizer step {self.state.step + 1}: {error}; the weights of before that step are "
                                "in model_checkpoints/last") from error

    def record(self, result: StepMetrics, tokens_per_second: float) -> None:
        extra = {"loss_scale": self.state.loss_scale} if self.options.adaptive_loss_scaling else {}
        self.log.record(
            "train", self.state.step, epoch=self.state.epoch, **result.losses, learning_rate=result.learning_rate,
            grad_norm=result.grad_norm, label_tokens=result.label_tokens, tokens_per_second=tokens_per_second, **extra,
        )

    # -- between steps -------------------------------------------------------------------------------------------

    def passed(self, every: int | None, micro_batches: int) -> bool:
        """Whether the step just done, of so many micro-batches, passed a multiple of `every` micro-batches."""
        done = self.state.micro_batches
        return every is not None and done // every > (done - micro_batches) // every

    def rescale_loss(self) -> None:
        """The score of adaptive loss scaling, where one is due; a run stopped in it is to do it again."""
        if not self.state.scaling_pending or not self.options.adaptive_loss_scaling:
            return
        try:
            with out_of_memory_remedy(evaluation_remedy(self.config)):
                score = self.validation.score(self.options.scaling_metric, self.interruption())
        except Interrupted:
            self.save()
            self.stop.leave(self.state.step)
        except NotFinite as error:
            self.guard.refuse(error, self.state.step)
        except OutOfMemory:
            self.save_after_full_memory()
            raise
        self.state.scaling_pending = False
        if score is not None:
            self.state.scale_loss(score, self.options.scaling_metric)
            self.log.record("loss_scaling", self.state.step, score=score, loss_scale=self.state.loss_scale)

    def checkpoint_on_the_way(self, micro_batches: int) -> None:
        stopping = any(self.context.all_gather_object(self.stop.requested))
        if stopping or self.passed(self.options.checkpoint_every, micro_batches):
            self.save()
        if stopping:
            self.stop.leave(self.state.step)

    def save_after_full_memory(self) -> None:
        """When an evaluation fills the memory, the weights are good, and so is the work since the last checkpoint."""
        if self.context.world_size == 1:  # in a group the others wait elsewhere
            self.save()

    def interruption(self):
        """Evaluations stop at once on a signal, but not in a group, where the others would wait for ever."""
        return (lambda: self.stop.requested) if self.context.world_size == 1 else never

    def finish_epoch(self) -> None:
        """Validate, decide about stopping, save."""
        state, callbacks = self.state, self.config.callbacks_kwargs.kwargs
        epoch = state.epoch if state.step_in_epoch else state.epoch - 1
        best = False
        try:
            if self.options.monitor_train and state.epoch_tokens:
                self.log.record("train_epoch", state.step, epoch=epoch, loss=state.epoch_loss / state.epoch_tokens)
            if epoch >= self.options.first_val_epoch:
                with out_of_memory_remedy(evaluation_remedy(self.config)):
                    metrics = self.validation.run(state.step, epoch, self.interruption())
                self.check_written(self.validation.refusals)
                score = metrics.get(self.config.monitored_metric)
                if score is not None:
                    best = state.update_best(score, callbacks.mode, callbacks.threshold)
                    self.decide(callbacks)
        except Interrupted:
            self.save()
            self.stop.leave(state.step)
        except NotFinite as error:
            self.guard.refuse(error, self.state.step)
        except OutOfMemory:
            self.save_after_full_memory()
            raise
        state.evaluation_pending, state.epoch_loss, state.epoch_tokens = False, 0.0, 0
        if best or callbacks.save_final_model or state.best_step is None or not self.finished():
            self.save(best)
            self.note_weights()
            self.check_written(self.validation.refusals)
        if any(self.context.all_gather_object(self.stop.requested)) and not self.finished():
            self.stop.leave(state.step)

    def note_weights(self) -> None:
        """The scores of this step say which weights they are of, where those have been saved."""
        if self.context.is_main:
            self.validation.note_weights(self.checkpoints.root / f"step-{self.state.step}")

    def check_written(self, refusals: list[str]) -> None:
        """Results that could not be written end the run, but not before the weights that they are of are safe."""
        if of_all := [each for of_process in self.context.all_gather_object(refusals) for each in of_process]:
            self.save()
            raise TrainingError(f"{of_all[0]}; {self.where_saved()}")

    def where_saved(self) -> str:
        return f"stopped at optimizer step {self.state.step}, checkpoint written; {self.stop.how_to_go_on}"

    def decide(self, callbacks) -> None:
        if self.state.step_in_epoch:  # max_steps ended the epoch early: its plan may still be gone on with
            return
        most = math.ceil(len(self.table) / self.config.dataset_kwargs.train_batch_size)
        increase = self.config.lr_scheduler_kwargs.increase_batch_size_on_plateau
        decision = self.state.on_plateau(callbacks.patience, increase, most)
        if decision == "increase":
            self.log.info(f"no gain in {callbacks.patience} evaluations: accumulation is now {self.state.accumulation}")
        elif decision == "stop":
            best = self.state.best_step
            self.log.info(f"no gain in {callbacks.patience} evaluations: stopped early; the best was step {best}")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict:
        return {**self.state.to_json(), "identity": self.identity, **self.meanings}

    def save(self, best: bool = False) -> None:
        """Write `step-N`, unless just this state is saved already."""
        generators, of_objective = (self.context.all_gather_object(each) for each in
                                    (random_state(), self.objective.get_extra_state()))
        state = self.checkpoint_state()
        if state == self.saved and not best:
            return
        check_before_saving(self.objective, self.optimizer, self.state.step, self.saved is not None)
        if self.context.is_main:
            refusal = self.log.settle()  # first: no checkpoint is newer than its log
            tensors = {"optimizer": self.optimizer.state_dict(), "random": generators, "objective": of_objective}
            self.checkpoints.save(self.state.step, self.language_model.save, state, tensors, best)
            if refusal is not None:
                raise TrainingError(f"{refusal}; {self.where_saved()}")
        self.saved = state
        self.context.barrier()
