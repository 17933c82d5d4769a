"""What a run that failed leaves behind, said in its error."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.lock import LOCK
from lora_cli.artifacts.run_dir import clear_run_dir
from lora_cli.artifacts.run_state import NOT_FINITE
from lora_cli.errors import LoraCliError, Problem
from lora_cli.training.memory import OUT_OF_MEMORY

# Errors by which a run does not begin, though its directory does.
_REFUSALS = frozenset(("trainer.max-time", "io.no-room"))


@contextmanager
def refusal_cleared(path: Path, *, is_resumed: bool, had_folder: bool) -> Iterator[None]:
    """Remove what a start has written that was refused before anything of value was there.

    Args:
        path: The run directory, locked by this process.
        is_resumed: Whether the run had begun before; then nothing is removed.
        had_folder: Whether the directory was there before; then it stays, empty.
    """
    try:
        yield
    except LoraCliError as error:
        is_refusal = all(problem.id in _REFUSALS for problem in error.problems)
        if is_refusal and not is_resumed:
            # What is wrong is told by the error; a file that cannot be removed is no more to say.
            with suppress(OSError):
                _clear(path, keep_folder=had_folder)
        raise


def _clear(path: Path, *, keep_folder: bool) -> None:
    if list_checkpoints(path / "checkpoints") or (path / "adapter").exists():
        return
    clear_run_dir(path)
    # Beside anything else the lock stays: it tells the next start that this is no stranger's.
    if [entry.name for entry in path.iterdir()] == [LOCK]:
        (path / LOCK).unlink()
        if not keep_folder:
            path.rmdir()


def add_what_is_saved(error: LoraCliError, path: Path) -> None:
    """Say in the problems of a run that diverged or ran out of memory what of it is saved.

    Args:
        error: What ended the run; its problems are changed.
        path: The run directory.
    """
    steps = list_checkpoints(path / "checkpoints")
    has_adapter = (path / "adapter").is_dir()
    error.problems = tuple(
        _with_saved(problem, path, step=max(steps, default=0), has_adapter=has_adapter)
        for problem in error.problems
    )


def _with_saved(problem: Problem, path: Path, *, step: int, has_adapter: bool) -> Problem:
    if problem.id not in (OUT_OF_MEMORY, NOT_FINITE):
        return problem
    texts = [problem.fix] if problem.fix else []
    if step == 0 and not has_adapter:
        texts.append("nothing was saved yet")
    # The same settings would diverge again, so there is nothing to resume.
    if step > 0:
        how = ", from where --resume goes on" if problem.id == OUT_OF_MEMORY else ""
        texts.append(f"the checkpoint of step {step} is intact{how}")
    if has_adapter:
        texts.append(f"the best adapter so far is intact, and adapter={path} starts from it")
    return replace(problem, fix="; ".join(texts))
