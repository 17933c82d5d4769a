"""Two trainers in one run: low-rank updates first, then every weight, from the merged model on.

Each trainer counts its steps from 0. Whoever listens sees one count over both: the second one's
events pass through `shifted`. ``phases.json`` says where the first phase ended, and
``adapter-lora/`` keeps its adapter.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.adapter import Adapter, AdapterRecord, load_adapter, save_adapter
from lora_cli.artifacts.run_dir import write_json
from lora_cli.commands.converting import as_folder
from lora_cli.commands.display import Display
from lora_cli.commands.preparing import Prepared
from lora_cli.config.commands import TrainConfig
from lora_cli.config.strategies import LoraThenFullStrategyConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.inject import saved_modules
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.quantized import restore_weights
from lora_cli.lora.state import load_adapter_state
from lora_cli.lora.strategies import Applied, head_modules, train_all, widen
from lora_cli.lora.tokens import prepare_tokens
from lora_cli.models.base import BaseModel
from lora_cli.models.processors import agree_with, tokenizer_of
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.events import (
    BatchHalved,
    CheckpointDue,
    EvalDone,
    EvalStarted,
    Event,
    Listener,
    Progress,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)
from lora_cli.training.padding_free import PaddingFree

LOG = "phases.json"
LORA_FOLDER = "adapter-lora"


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstPhase:
    """How the phase of low-rank updates ended.

    Attributes:
        steps: Optimizer steps.
        reason: "finished" or "early stopping".
        progress: Where the run stood, as `Progress` says.
        metrics: Metrics of its best adapter on the validation rows.
    """

    steps: int
    reason: str
    progress: Mapping[str, Any]
    metrics: Mapping[str, float]

    def begin(self) -> Progress:
        """Return where the second phase stands before its first step, in its own count."""
        whole = Progress(**self.progress)
        return replace(_moved(whole, -self.steps), evaluations_without_improvement=0)

    def as_json(self, ended: RunEnded) -> dict[str, Any]:
        """Return what result.json says of both phases, given how the run ended."""
        lora = {"strategy": "lora", "steps": self.steps, "reason": self.reason}
        full = {"strategy": "full", "steps": ended.step - self.steps, "reason": ended.reason}
        return {"phases": [lora, full]}


def write_first_phase(path: Path, phase: FirstPhase) -> None:
    """Write how the first phase ended into a run directory."""
    write_json(path / LOG, asdict(phase))


def read_first_phase(path: Path) -> FirstPhase | None:
    """Return how the first phase of a run ended, or None where it has not.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        phase = FirstPhase(**json.loads((path / LOG).read_bytes()))
        phase.begin()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            Problem(
                id="resume.damaged",
                message=f"{LOG} must say where the first phase ended, but cannot be read: {error}.",
                where=str(path / LOG),
                fix="start the run anew with --overwrite",
            )
        ) from None
    return phase


def put_aside(path: Path, *, module_names: Iterable[str]) -> tuple[Adapter, AdapterRecord]:
    """Copy the adapter of the first phase to where the second one leaves it alone; return it.

    Args:
        path: The run directory.
        module_names: Paths of all modules of the base model.
    """
    folder, kept = path / "adapter", path / LORA_FOLDER
    if not kept.exists():
        adapter, record = load_adapter(folder)
        # On its own it is an adapter like any other.
        alone = replace(record, config={**record.config, "strategy": {"name": "lora"}})
        card = (folder / "README.md").read_text(encoding="utf-8")
        save_adapter(kept, adapter, alone, card=card, module_names=module_names)
    return load_adapter(kept)


def second_phase(config: TrainConfig) -> TrainConfig:
    """Return the configuration of the phase in which every weight is trained.

    Raises:
        ValueError: If the run has no such phase.
    """
    strategy = config.strategy
    if not isinstance(strategy, LoraThenFullStrategyConfig):
        raise ValueError(f"strategy={strategy.name} has one phase.")
    return replace(
        config,
        optimizer=replace(config.optimizer, lr=strategy.full_lr, lora_plus_ratio=1.0),
        trainer=replace(config.trainer, epochs=strategy.full_epochs, max_steps=None),
    )


def merged_state(prepared: Prepared, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge an adapter into the model that trained it, in float32, and return all its tensors.

    The model is of no use afterwards.

    Args:
        prepared: The model, and what of it is trained.
        state: Tensors of the adapter.
    """
    load_adapter_state(prepared.model, dict(state), prepared.saved)
    widen(prepared.model)
    merge_lora(prepared.model)
    return prepared.model.state_dict()


def prepare_full(
    prepared: Prepared, config: TrainConfig, merged: Mapping[str, torch.Tensor] | None
) -> Prepared:
    """Return the run with a model of which every weight is trained.

    The model is loaded anew: nothing that the first phase put into it is left.

    Args:
        prepared: The run in its first phase.
        config: Its configuration.
        merged: What `merged_state` gave; None where a checkpoint follows that holds every weight.
    """
    base = load_again(prepared, config)
    model = base.model
    head = head_modules(model, saved_modules(model, base.new_keys, ()))
    train_all(model, prepared.own_frozen)
    if merged is not None:
        # What the first phase has beside the weights, such as random factors, has no name here.
        names = model.state_dict().keys()
        model.load_state_dict({name: merged[name] for name in names})
    if prepared.padding_free:
        PaddingFree(model)
    return replace(
        prepared,
        model=model,
        saved=head,
        applied=Applied(saved=head, text="every weight"),
    )


def give_back_weights(prepared: Prepared, config: TrainConfig, display: Display) -> None:
    """Put the weights as they were before quantization back into a trained model, in place."""
    if config.model.quantization != "none":
        restore_weights(prepared.model, load_again(prepared, config).model)
        display.note("merged into the weights as they were before quantization")


def load_again(prepared: Prepared, config: TrainConfig) -> BaseModel:
    """Load the base model of a run once more, with the tokens that the run has added."""
    family = FAMILIES[config.task.family]
    base = load_with_head(
        as_folder(prepared.source),
        family,
        prepared.splits.state,
        dtype=config.model.dtype,
        seed=config.seed,
    )
    # The tokenizer has the tokens that were added; the model gets room for them again.
    prepare_tokens(
        base.model,
        tokenizer_of(prepared.processor),
        config.lora.trainable_tokens,
        seed=config.seed,
    )
    agree_with(prepared.processor, base.model, prepared.source)
    return base


def shifted(listener: Listener, by: int, *, steps_per_epoch: int) -> Listener:
    """Return a listener to the second trainer that hears of steps since the start of the run."""

    def tell(event: Event) -> None:
        listener(_shift(event, by, by / steps_per_epoch))

    return tell


def shift_state(state: TrainState, by: int) -> TrainState:
    """Return a checkpoint with its steps counted from another start."""
    return replace(state, progress=_moved(state.progress, by))


def _moved(progress: Progress, by: int) -> Progress:
    best = None if progress.best_step is None else progress.best_step + by
    return replace(progress, step=progress.step + by, best_step=best)


def _shift(event: Event, by: int, epochs: float) -> Event:
    match event:
        case RunStarted():
            return replace(
                event, first_step=event.first_step + by, total_steps=event.total_steps + by
            )
        case StepDone():
            return replace(event, step=event.step + by, epoch=event.epoch + epochs)
        case BatchHalved() | EvalStarted() | EvalDone() | RunEnded():
            return replace(event, step=event.step + by)
        case CheckpointDue():
            return CheckpointDue(shift_state(event.state, by))
    return event
