"""Rows in memory at once, and what happens when they do not fit.

How rows are put into micro-batches does not change the gradient, so a run that runs out of memory
can go on with smaller ones: the step begins anew, from cleared gradients and its own seed. Where
the loss compares rows with each other it does change, and runs end instead.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import Problem, RunFailedError
from lora_cli.training.events import BatchHalved, Listener, Progress

OUT_OF_MEMORY = "train.out-of-memory"

# What the allocators of torch say; that of the CPU has no exception of its own. The last is all
# that oneDNN says when it cannot have memory for the code that it generates.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a primitive",
)

Kind = Literal["train", "eval"]
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def memory_checked(rows: int, doing: str) -> Iterator[None]:
    """Turn the want of memory into an error that people can read.

    Args:
        rows: How many were to be in memory at once.
        doing: "training" or "evaluating".

    Raises:
        RunFailedError: If there was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailedError(
            Problem(
                id=OUT_OF_MEMORY,
                message=f"The rows in memory at once must fit into it, but {rows} do not when"
                f" {doing}.",
                fix="take fewer rows at once, or cut them shorter with task.max_length",
            )
        ) from error


class BatchSizes:
    """How many rows a process has in memory at once, which may shrink during a run.

    Args:
        config: What the user asked for.
        num_processes: Processes of the run.
        couples_rows: Whether the loss of a row depends on the others of its micro-batch.

    Attributes:
        train: Rows of a micro-batch.
        evaluation: Rows of a batch in evaluation.
    """

    def __init__(
        self, config: TrainerConfig, *, num_processes: int, couples_rows: bool = False
    ) -> None:
        self._config = config
        self._num_processes, self._couples_rows = num_processes, couples_rows
        share = -(-config.global_batch_size // num_processes)
        self._first = min(config.micro_batch_size or share, share)
        self.train: int = self._first
        self.evaluation: int = config.eval_batch_size

    def resume(self, progress: Progress) -> None:
        """Go on with the sizes that were found before."""
        self.train = min(progress.micro_batch_size or self.train, self.train)
        self.evaluation = min(progress.eval_batch_size or self.evaluation, self.evaluation)

    def halved(self) -> dict[str, int]:
        """Return the sizes that were halved, by the names of their settings; mostly nothing."""
        sizes = {}
        if self.train < self._first:
            sizes["micro_batch_size"] = self.train
        if self.evaluation < self._config.eval_batch_size:
            sizes["eval_batch_size"] = self.evaluation
        return sizes

    def noted(self, progress: Progress) -> Progress:
        """Return progress with the sizes that were halved."""
        sizes = self.halved()
        return replace(
            progress,
            micro_batch_size=sizes.get("micro_batch_size"),
            eval_batch_size=sizes.get("eval_batch_size"),
        )

    def halve(self, kind: Kind) -> bool:
        """Take about half as many rows, if the user allows it and there is more than one."""
        rows = self._smaller(kind)
        if not self._config.auto_micro_batch or rows == 0:
            return False
        if kind == "train":
            self.train = rows
        else:
            self.evaluation = rows
        return True

    def explained(self, kind: Kind) -> RunFailedError:
        """Return the error that says which smaller size leaves the run as it is."""
        rows = self._smaller(kind)
        doing, now = (
            ("training", self.train) if kind == "train" else ("evaluating", self.evaluation)
        )
        key = "trainer.micro_batch_size" if kind == "train" else "trainer.eval_batch_size"
        if rows == 0:
            fix = "set a smaller task.max_length, trainer.gradient_checkpointing=true,"
            fix += " trainer.precision=bf16, or model.quantization=nf4"
        elif kind == "train" and self._couples_rows:
            fix = "set trainer.gradient_checkpointing=true, trainer.precision=bf16, or"
            fix += f" {key}={rows}, which compares each row with fewer others"
        elif kind == "train":
            parts = -(-self._config.global_batch_size // (rows * self._num_processes))
            fix = f"set {key}={rows}: {parts} micro-batches per step, same gradients;"
            fix += " or trainer.auto_micro_batch=true"
        else:
            fix = f"set {key}={rows}: same results; or trainer.auto_micro_batch=true"
        few = "1 row does" if now == 1 else f"{now} rows do"
        return RunFailedError(
            Problem(
                id=OUT_OF_MEMORY,
                message=f"`{key}` must be so small that the rows fit into memory, but {few} not"
                f" when {doing}.",
                key=key,
                fix=fix,
            )
        )

    def _smaller(self, kind: Kind) -> int:
        """Return the next smaller size; 0 where there is none."""
        if kind == "eval":
            return self.evaluation // 2
        # One that a user could set as well: it divides what a process gets of a batch.
        whole, parts = self._config.global_batch_size, self._num_processes
        sizes = range(1, self.train // 2 + 1)
        return max((n for n in sizes if whole % (n * parts) == 0), default=0)


def fitted(
    sizes: BatchSizes,
    kind: Kind,
    act: Callable[[], Result],
    *,
    step: int,
    tell: Listener,
) -> Result:
    """Act, and again with fewer rows for as long as there is not enough memory.

    Every process must act: where one runs out of memory, all of them must have an error that says
    so.

    Args:
        sizes: What is halved.
        kind: Which of them.
        act: Called once for each size; starts from the beginning.
        step: Optimizer steps done.
        tell: Told when something was halved.

    Raises:
        RunFailedError: If there is not enough memory, and nothing may or can be halved.
    """
    while True:
        try:
            return act()
        except RunFailedError as error:
            if error.problems[0].id != OUT_OF_MEMORY:
                raise
            cause = error.__cause__
            if not sizes.halve(kind):
                raise sizes.explained(kind) from cause
        del cause
        # The traceback holds the tensors of the failed pass, and other references may hold it.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = sizes.train if kind == "train" else sizes.evaluation
        tell(BatchHalved(step, kind, rows))
