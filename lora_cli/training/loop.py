"""The one training loop.

Every number has one definition. The loss of an optimizer step is the sum of the loss over its
supervised items divided by their count, over all micro-batches and processes; micro-batches add up
gradients of sums, and one division follows. Which rows a step trains on and what dropout draws are
functions of the seed and the step, so the loop keeps no random state.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.lora.inject import trainable_parameters
from lora_cli.lora.method import StepMethod
from lora_cli.lora.state import adapter_state
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.descent import Descent
from lora_cli.training.evaluation import Evaluation, EvaluationStopped, evaluate_rows
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
from lora_cli.training.forward import change_forward
from lora_cli.training.gradients import (
    add_penalty,
    check_finite,
    check_weights,
    clip_gradients,
    scale_gradients,
)
from lora_cli.training.memory import BatchSizes, fitted, memory_checked
from lora_cli.training.meter import Meter
from lora_cli.training.order import cut_by_length, step_rows
from lora_cli.training.plan import Plan
from lora_cli.training.runtime import Runtime, move_to, seed_step
from lora_cli.training.schedule import lr_factor
from lora_cli.training.selection import judge, tensors_sha256
from lora_cli.training.sharding import shared_passes, without_trace
from lora_cli.training.watch import LAST_STEP, AdapterWatch


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
        should_stop: Polled after every step and within evaluations; true ends the run with a
            checkpoint.
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
        self._group = runtime.group
        change_forward(model, plan.trainer)
        self._model = runtime.prepare(model)
        self._group.share_parameters(self.parameters.values())
        self._descent = Descent(
            plan.optimizer, self.parameters, runtime=runtime, ema_decay=plan.trainer.ema_decay
        )
        self.sizes = BatchSizes(
            plan.trainer, num_processes=self._group.size, couples_rows=task.couples_rows
        )
        self._listeners = tuple(listeners)
        self._should_stop = should_stop
        self._method = method
        self._watch: AdapterWatch | None = None
        self._meter = Meter()
        self._counted_until = 0.0

    def resume(self, state: TrainState) -> None:
        """Continue from a checkpoint; the adapter tensors are in the model already."""
        self.progress = self._meter.resume(state.progress)
        self._descent.resume(state)
        self.sizes.resume(self.progress)
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
        was_due = self.progress.evaluation_due
        if self.progress.step == 0 or was_due:
            self._evaluate()
        if was_due and not self.progress.evaluation_due:
            self._tell(CheckpointDue(self.state()))
        reason = self._reason_to_end()
        while self.progress.step < plan.total_steps and reason == "finished":
            self._train_step()
            best = self.progress.best_step
            if plan.is_due(plan.trainer.eval_steps, self.progress.step):
                self._evaluate()
            reason = self._reason_to_end()
            is_due = plan.is_due(plan.trainer.save_steps, self.progress.step)
            # The best can be written again, or gone back to, only if it has a checkpoint.
            if is_due or reason != "finished" or self.progress.best_step != best:
                self._count_time()
                self._tell(CheckpointDue(self.state()))
                # A request that came meanwhile finds everything saved.
                reason = self._reason_to_end()
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
        state = TrainState(
            progress=self._meter.noted(self._descent.noted(self.sizes.noted(self.progress))),
            adapter=self.adapter(),
            optimizer=self._descent.state(),
            method={} if self._method is None else self._method.state(),
        )
        check_weights({**state.adapter, **state.optimizer}, step=self.progress.step)
        return state

    def adapter(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained tensors by name."""
        return adapter_state(self._plain_model, self._saved_modules)

    def averaged_adapter(self) -> dict[str, torch.Tensor]:
        """Return a copy of what is evaluated and saved, which may be an average."""
        with self._descent.averaged():
            return self.adapter()

    def evaluate(self) -> Evaluation:
        """Run the model, as it is now, over the validation rows.

        Raises:
            EvaluationStopped: If a stop is requested meanwhile.
        """

        def evaluate() -> Evaluation:
            return evaluate_rows(
                self.task,
                self._model,
                self.plan.validation,
                batch_size=self.sizes.evaluation,
                device=self.runtime.device,
                on_rows=lambda rows: self._tell(EvalProgress(rows)),
                group=self._group,
                should_stop=self._should_stop,
            )

        return fitted(self.sizes, "eval", evaluate, step=self.progress.step, tell=self._tell)

    def _tell(self, event: Event) -> None:
        # What listeners may write at every step or batch is too little to wait for each other.
        is_small = isinstance(event, EvalProgress | EvalStarted | StepDone)
        with nullcontext() if is_small else self._group.together():
            for listener in self._listeners:
                listener(event)

    def _count_time(self) -> None:
        """Add the wall time since the last call, or since the session began."""
        now = time.monotonic()
        seconds = self.progress.seconds + now - self._counted_until
        self.progress, self._counted_until = replace(self.progress, seconds=seconds), now

    def _reason_to_end(self) -> str:
        patience = self.plan.trainer.early_stopping.patience
        if patience is not None and self.progress.evaluations_without_improvement >= patience:
            return "early stopping"
        # A request that arrives during the last step has nothing left to stop.
        is_over = self.progress.step == self.plan.total_steps
        if self.progress.evaluation_due or (not is_over and self._group.any(self._should_stop())):
            return "stopped"
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
        rows = [plan.train[index] for index in indices]
        ids = [row["id"] for row in rows]
        loss_sum, count = fitted(
            self.sizes, "train", lambda: self._backward(rows), step=step, tell=self._tell
        )
        grad_norm = self._scale_gradients(count)
        scale = self.runtime.loss_scale()
        check_finite(loss_sum, grad_norm, step=step + 1, ids=ids, loss_scale=scale)
        if self._descent.step(lr):
            self._after_step(step + 1)
        self._descent.clear()

        seconds = time.monotonic() - began
        self.progress = replace(
            self.progress,
            step=step + 1,
            samples=self.progress.samples + len(indices),
            train_seconds=self.progress.train_seconds + seconds,
        )
        self._meter.add(loss_sum, count, rows=len(indices), seconds=seconds)
        self._report_step(lr, grad_norm, ids)

    def _backward(self, window: Sequence[Features]) -> tuple[float, float]:
        """Add up gradients of the summed loss; return the sum and the count over all processes."""
        # The last rows of an epoch may leave this process without any.
        share = window[self._group.rank :: self._group.size]
        size = self.sizes.train
        batches = cut_by_length(share, [row["length"] for row in share], size=size)
        self._descent.clear()
        seed_step(self.plan.seed, step=self.progress.step, rank=self._group.rank)
        totals = torch.zeros(2, dtype=torch.float64)
        self._model.train()
        given = self.plan.batch_extras(self.progress.step)
        with self._group.together(), memory_checked(size, "training"):
            for features in batches:
                totals += self._pass(features, given)
            with without_trace(self.parameters.values()):
                for rows in shared_passes(self._model, window, size, group=self._group):
                    self._pass(rows, given)
        self._group.add_gradients(self.parameters.values())
        loss_sum, count = self._group.add(totals).tolist()
        return loss_sum, count

    def _pass(self, features: Sequence[Features], given: Mapping[str, Any]) -> torch.Tensor:
        """Add up gradients of the summed loss of a micro-batch; return the sum and the count."""
        batch = move_to(self.task.collate(features), self.runtime.device)
        output = self.task.forward(self._model, {**batch, **given})
        self.runtime.backward(output.loss_sum)
        return torch.tensor([output.loss_sum.item(), output.count], dtype=torch.float64)

    def _scale_gradients(self, count: float) -> float:
        """Divide the summed gradients by the count, clip them, and return their length before."""
        self._descent.unscale()
        scale_gradients(self.parameters.values(), 1.0 / count if count else 0.0)
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
        self._descent.average(step)

    def _report_step(self, lr: float, grad_norm: float, ids: Sequence[str]) -> None:
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
                ids=ids,
            )
        )
        if log:
            self._meter.start_window()

    def _evaluate(self) -> None:
        """Evaluate, and update best value and patience."""
        step, name = self.progress.step, self.task.metric
        self._tell(EvalStarted(step=step, rows=len(self.plan.validation)))
        check_weights(self.parameters, step=step)
        with self._descent.averaged():
            try:
                metrics = self.evaluate().metrics(self.task)
            except EvaluationStopped:
                self.progress = replace(self.progress, evaluation_due=True)
                return
            self.progress, is_best = judge(
                replace(self.progress, evaluation_due=False),
                metrics[name],
                greater_is_better=self.task.greater_is_better,
                threshold=self.plan.trainer.early_stopping.threshold,
            )
            adapter = self.adapter() if is_best else {}
        if is_best:
            self.progress = replace(self.progress, best_sha256=tensors_sha256(adapter))
        self._tell(
            EvalDone(step=step, metrics=metrics, metric=name, is_best=is_best, adapter=adapter)
        )
