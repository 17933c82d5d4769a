"""What a run that failed leaves behind, said in its error."""

from dataclasses import replace
from pathlib import Path

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.run_state import NOT_FINITE
from lora_cli.errors import LoraCliError, Problem
from lora_cli.training.memory import OUT_OF_MEMORY


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
