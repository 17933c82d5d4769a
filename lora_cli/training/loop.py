"""The one training loop.

Every number has one definition. The loss of an optimizer step is the sum of the loss over its
supervised items divided by their count, over all micro-batches and processes; micro-batches add up
gradients of sums, and one division follows. Which rows a step trains on and what dropout draws are
functions of the seed and the step, so the loop keeps no random state.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_cli.config.optim import OptimizerConfig, SchedulerConfig
from lora_cli.config.sections import TrainerConfig
from lora_cli.lora.inject import trainable_parameters
from lora_cli.lora.method import StepMethod
from lora_cli.lora.state import adapter_state
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.evaluation import Evaluation, evaluate_rows
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    Listener,
    Progress,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)
from lora_cli.training.gradients import (
    add_penalty,
    check_finite,
    clip_gradients,
    scale_gradients,
)
from lora_cli.training.meter import Meter
from lora_cli.training.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)
from lora_cli.training.order import cut_by_length, step_rows, steps_per_epoch, total_steps
from lora_cli.training.runtime import Runtime, move_to, seed_step
from lora_cli.training.schedule import lr_factor
from lora_cli.training.watch import LAST_STEP, AdapterWatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to train on and how; plain values from the configuration.

    Attributes:
        train: Encoded training rows.
        validation: Encoded rows that select the best checkpoint.
        trainer: Length, batches, evaluation and saving.
        optimizer: Optimizer and peak learning rate.
        scheduler: Learning rate over the run.
        seed: Decides order and dropout.
        may_be_unused: Saved modules that the loss may leave out; see `AdapterWatch`.
    """

    train: Sequence[Features]
    validation: Sequence[Features]
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    seed: int
    may_be_unused: Sequence[str] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows."""
        return steps_per_epoch(len(self.train), global_batch_size=self.trainer.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.trainer, len(self.train))


class Trainer:
    """Trains the named parameters of a model on the rows of a plan.

    Args:
        task: Turns rows into batches and batches into a loss.
        model: Frozen base with adapters in place; trained in place.
        saved_modules: Modules that are trained whole, besides the adapters.
        plan: Rows and settings.
        runtime: Device, processes, number format.
        method: What the adapters' variant does at each step, if anything.
        listeners: Told of every event.
        should_stop: Polled after every step; true ends the run with a checkpoint.
    """

    def __init__(
        self,
        *,
        task: Task,
        model: nn.Module,
        saved_modules: Sequence[str],
        plan: Plan,
        runtime: Runtime,
        method: StepMethod | None = None,
        listeners: Iterable[Listener] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.task = task
        self.plan = plan
        self.runtime = runtime
        self.parameters = trainable_parameters(model)
        self.progress = Progress()
        self._plain_model = model
        self._saved_modules = tuple(saved_modules)
        self._model = runtime.prepare(model)
        self._plain_optimizer = build_optimizer(plan.optimizer, self.parameters)
        self._optimizer = runtime.prepare_optimizer(self._plain_optimizer)
        self._listeners = tuple(listeners)
        self._should_stop = should_stop
        self._method = method
        self._watch: AdapterWatch | None = None
        self._meter = Meter()
        self._counted_until = 0.0

    def resume(self, state: TrainState) -> None:
        """Continue from a checkpoint; the adapter tensors are in the model already."""
        self.progress = state.progress
        load_optimizer_state(self._plain_optimizer, self.parameters, state.optimizer)
        if self._method is not None:
            self._method.load_state(state.method)

    def run(self) -> RunEnded:
        """Train to the end of the plan, or until early stopping or a stop request.

        Raises:
            RunFailedError: If the loss or the gradient is not finite, in which case the adapter is
                left as it was before the faulty step; or if a part of it is cut off from the loss.
        """
        self._counted_until = time.monotonic()
        self._start_watch()
        plan = self.plan
        self._tell(
            RunStarted(
                first_step=self.progress.step,
                total_steps=plan.total_steps,
                steps_per_epoch=plan.steps_per_epoch,
                train_rows=len(plan.train),
            )
        )
        if self.progress.step == 0:
            self._evaluate()
        reason = self._reason_to_end()
        while self.progress.step < plan.total_steps and reason == "finished":
            self._train_step()
            if self._is_due(plan.trainer.eval_steps):
                self._evaluate()
            reason = self._reason_to_end()
            if self._is_due(plan.trainer.save_steps) or reason != "finished":
                self._count_time()
                self._tell(CheckpointDue(self.state()))
        if self._watch is not None:
            self._watch.close()
        self._count_time()
        done = self.progress
        rate = done.samples / done.train_seconds if done.train_seconds else 0.0
        ended = RunEnded(done.step, reason, done.seconds, rate)
        self._tell(ended)
        return ended

    def state(self) -> TrainState:
        """Return a copy of everything that resuming needs."""
        return TrainState(
            progress=self.progress,
            adapter=self.adapter(),
            optimizer=optimizer_state(self._plain_optimizer, self.parameters),
            method={} if self._method is None else self._method.state(),
        )

    def adapter(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained tensors by name."""
        return adapter_state(self._plain_model, self._saved_modules)

    def evaluate(self) -> Evaluation:
        """Run the model, as it is now, over the validation rows."""
        return evaluate_rows(
            self.task,
            self._model,
            self.plan.validation,
            batch_size=self.plan.trainer.eval_batch_size,
            device=self.runtime.device,
            on_rows=lambda rows: self._tell(EvalProgress(rows)),
        )

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    def _count_time(self) -> None:
        """Add the wall time since the last call, or since the session began."""
        now = time.monotonic()
        seconds = self.progress.seconds + now - self._counted_until
        self.progress, self._counted_until = replace(self.progress, seconds=seconds), now

    def _is_due(self, every: int | str) -> bool:
        step = self.progress.step
        period = every if isinstance(every, int) else self.plan.steps_per_epoch
        return step % period == 0 or step == self.plan.total_steps

    def _reason_to_end(self) -> str:
        patience = self.plan.trainer.early_stopping.patience
        if patience is not None and self.progress.evaluations_without_improvement >= patience:
            return "early stopping"
        # A request that arrives during the last step has nothing left to stop.
        if self.progress.step < self.plan.total_steps and self._should_stop():
            return "stopped on request"
        return "finished"

    def _train_step(self) -> None:
        """Run one optimizer step over the rows that the order gives it."""
        plan, step, began = self.plan, self.progress.step, time.monotonic()
        _, indices = step_rows(
            len(plan.train),
            seed=plan.seed,
            global_batch_size=plan.trainer.global_batch_size,
            step=step,
        )
        lr = plan.optimizer.lr * lr_factor(plan.scheduler, step=step, total_steps=plan.total_steps)
        set_lr(self._plain_optimizer, lr)
        seed_step(plan.seed, step=step, rank=self.runtime.rank)
        loss_sum, count = self._backward([plan.train[index] for index in indices])
        grad_norm = self._scale_gradients(count)
        check_finite(
            loss_sum,
            grad_norm,
            step=step + 1,
            ids=[plan.train[index]["id"] for index in indices],
            # A loss scaler skips a step whose gradient overflowed, and lowers its scale.
            scaled=plan.trainer.precision == "fp16",
        )
        self._optimizer.step()
        if lr > 0 and not self.runtime.was_skipped(self._optimizer):
            self._after_step(step + 1)
        self._optimizer.zero_grad()

        seconds = time.monotonic() - began
        self.progress = replace(
            self.progress,
            step=step + 1,
            samples=self.progress.samples + len(indices),
            train_seconds=self.progress.train_seconds + seconds,
        )
        self._meter.add(loss_sum, count, rows=len(indices), seconds=seconds)
        self._report_step(lr, grad_norm)

    def _backward(self, window: Sequence[Features]) -> tuple[float, float]:
        """Add up gradients of the summed loss; return the sum and the count over all processes."""
        share = window[self.runtime.rank :: self.runtime.world_size]
        size = self.plan.trainer.micro_batch_size or len(share)
        batches = cut_by_length(share, [row["length"] for row in share], size=size)
        totals = torch.zeros(2, dtype=torch.float64)
        self._model.train()
        for number, features in enumerate(batches, start=1):
            batch = move_to(self.task.collate(features), self.runtime.device)
            with self.runtime.accumulating(self._model, last=number == len(batches)):
                output = self.task.forward(self._model, batch)
                self.runtime.backward(output.loss_sum)
            totals += torch.tensor([output.loss_sum.item(), output.count], dtype=torch.float64)
        loss_sum, count = self.runtime.total(totals).tolist()
        return loss_sum, count

    def _scale_gradients(self, count: float) -> float:
        """Divide the summed gradients by the count, clip them, and return their length before.

        Data-parallel wrappers average over processes, hence the factor of the world size.
        """
        self.runtime.unscale(self._optimizer)
        scale_gradients(self.parameters.values(), self.runtime.world_size / count)
        if self._watch is not None:
            self._watch.look()
        penalty = None if self._method is None else self._method.penalty()
        if penalty is not None:
            add_penalty(self.parameters.values(), penalty)
        return clip_gradients(self.parameters.values(), self.plan.trainer.max_grad_norm)

    def _start_watch(self) -> None:
        if self.progress.step < LAST_STEP:
            self._watch = AdapterWatch(
                self._plain_model, self._saved_modules, may_be_unused=self.plan.may_be_unused
            )

    def _after_step(self, step: int) -> None:
        """Act on a step that changed the parameters, while its gradients still exist."""
        if self._watch is not None and self._watch.confirm(last=step == self.plan.total_steps):
            self._watch = None
        if self._method is not None:
            self._method.after_step(step)

    def _report_step(self, lr: float, grad_norm: float) -> None:
        step, every = self.progress.step, self.plan.trainer.log_steps
        log = step % every == 0 or step in (1, self.plan.total_steps)
        self._tell(
            StepDone(
                step=step,
                epoch=step / self.plan.steps_per_epoch,
                loss=self._meter.loss(),
                lr=lr,
                grad_norm=grad_norm,
                samples_per_second=self._meter.samples_per_second(),
                log=log,
            )
        )
        if log:
            self._meter.start_window()

    def _evaluate(self) -> None:
        """Evaluate, and update best value and patience."""
        step, before = self.progress.step, self.progress
        self._tell(EvalStarted(step=step, rows=len(self.plan.validation)))
        metrics = self.evaluate().metrics(self.task)
        value = metrics[self.task.metric]
        gain = math.inf
        if before.best_metric is not None:
            sign = 1 if self.task.greater_is_better else -1
            gain = sign * (value - before.best_metric)
        # The untrained model at step 0 is shown, but cannot be the best checkpoint.
        is_best = step > 0 and gain > 0
        if is_best:
            self.progress = replace(self.progress, best_metric=value, best_step=step)
        if step > 0:
            improved = gain > self.plan.trainer.early_stopping.threshold
            waited = 0 if improved else before.evaluations_without_improvement + 1
            self.progress = replace(self.progress, evaluations_without_improvement=waited)
        self._tell(
            EvalDone(
                step=step,
                metrics=metrics,
                metric=self.task.metric,
                is_best=is_best,
                adapter=self.adapter() if is_best else {},
            )
        )
