"""Whether and how a trained adapter writes texts, where that is to be other than in training."""

from dataclasses import replace
from typing import Any, TypeVar

from lora_cli.config.audio import SpeechRecognitionSeq2SeqConfig
from lora_cli.config.generation import GenerationConfig, GenerationOverrides, check_generation
from lora_cli.config.language import Seq2SeqConfig
from lora_cli.config.task_families import TASKS, TaskConfig
from lora_cli.errors import Problem, UserError

Settings = TypeVar("Settings", bound=TaskConfig)


def with_generation(task: Settings, wanted: GenerationOverrides) -> Settings:
    """Return the settings of a task with some about generation changed.

    Args:
        task: As the adapter was trained.
        wanted: What is to be changed.

    Raises:
        UserError: If the family writes no texts, or settings contradict each other.
    """
    given = wanted.given()
    if not given:
        return task
    own = getattr(task, "generation", None)
    if not isinstance(own, GenerationConfig):
        raise UserError(_no_generation(task.family, next(iter(given))))
    found = wanted.applied_to(own)
    names = frozenset(given)
    if problems := list(check_generation(found, section="generation", given=names)):
        raise UserError(problems)
    changed: dict[str, Any] = {"generation": found}
    return replace(task, **changed)


def for_evaluation(
    task: Settings, *, generate: bool | None, generation: GenerationOverrides
) -> Settings:
    """Return the settings of a task with other ones about the texts of an evaluation.

    Args:
        task: As the adapter was trained.
        generate: Whether texts are written and compared; None leaves it as it was.
        generation: How they are written.

    Raises:
        UserError: If evaluations of the family never write texts, these will not, or settings
            contradict each other.
    """
    own = getattr(task, "generate_in_eval", None)
    if own is None and generate is not None:
        raise UserError(_no_texts("generate", task.family, fix="leave generate out"))
    wanted = own if generate is None else generate
    if not wanted and (given := generation.given()):
        fix = "leave it out" if own is None else "add generate=true"
        raise UserError(_no_texts(f"generation.{next(iter(given))}", task.family, fix=fix))
    if wanted != own:
        changed: dict[str, Any] = {"generate_in_eval": wanted}
        # It selected a checkpoint, and selects nothing any more.
        if not wanted:
            has_loss = isinstance(task, Seq2SeqConfig | SpeechRecognitionSeq2SeqConfig)
            changed["metric"] = "loss" if has_loss else "perplexity"
        task = replace(task, **changed)
    return with_generation(task, generation)


def _no_generation(family: str, name: str) -> Problem:
    writing = [name for name, kind in TASKS.items() if "generation" in kind.__dataclass_fields__]
    return Problem(
        id="predict.no-generation",
        message=f"`generation.{name}` must be left out with an adapter for task={family}, which "
        "writes no texts.",
        key=f"generation.{name}",
        allowed=f"with an adapter for {' or '.join(writing)}",
        fix=f"leave generation.{name} out",
    )


def _no_texts(key: str, family: str, *, fix: str) -> Problem:
    names = [
        name for name, kind in TASKS.items() if "generate_in_eval" in kind.__dataclass_fields__
    ]
    return Problem(
        id="eval.no-texts",
        message=f"`{key}` must be left out where no texts are written, as in this evaluation "
        f"with an adapter for task={family}.",
        key=key,
        allowed=f"with generate=true and an adapter for {' or '.join(names)}",
        fix=fix,
    )
