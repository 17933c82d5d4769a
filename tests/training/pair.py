"""One of two processes that try out what processes do together; `test_group.py` starts both.

Each writes what it has seen as JSON: `python pair.py OUT MODEL DATA`.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.errors import LoraCliError, RunFailedError, UserError
from lora_cli.lora.state import load_adapter_state
from lora_cli.tasks.contract import StepOutput
from lora_cli.training.evaluation import EvaluationStopped, evaluate_rows
from lora_cli.training.events import CheckpointDue, StepDone
from lora_cli.training.group import ALONE, Group, join_group

_spec = importlib.util.spec_from_file_location(
    "pair_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)


class Echo:
    """Predicts a function of row and batch mates, so that other batches would be noticed."""

    def __init__(self) -> None:
        self.forwards = 0

    def collate(self, features: Any) -> dict[str, Any]:
        x = torch.tensor([row["x"] for row in features])
        return {"ids": [row["id"] for row in features], "x": x}

    def forward(self, model: Any, batch: Any) -> StepOutput:
        self.forwards += 1
        x = model(batch["x"])
        mixed = x * 3 + x.mean()
        return StepOutput(mixed.sin().sum(), len(x), {"x": mixed, "n": torch.tensor(len(x))})

    def decode(self, outputs: Any, batch: Any) -> list[Any]:
        count = int(outputs["n"])
        return [
            (i, value, count) for i, value in zip(batch["ids"], outputs["x"].tolist(), strict=True)
        ]


def talk(group: Group) -> dict[str, Any]:
    """Try every way of talking."""
    rank = group.rank
    seen: dict[str, Any] = {
        "sum": group.add(torch.tensor([1.5, rank], dtype=torch.float64)).tolist(),
        "any": [group.any(rank == 1), group.any(False)],
        "first": group.first(lambda: {"rank": rank, "text": "ä", "none": None}),
        "shared": group.share_tensors({"a": torch.full((2,), float(rank))})["a"].tolist(),
        "of_none": group.share_tensors({}),
        "gathered": [
            {name: x.tolist() for name, x in tensors.items()}
            for tensors in group.gather_tensors({f"r{rank}": torch.arange(rank + 1)})
        ],
    }
    parameter = nn.Parameter(torch.full((3,), float(rank)))
    group.share_parameters([parameter])
    seen["parameter"] = parameter.tolist()

    def refuse() -> None:
        from lora_cli.errors import Problem

        raise UserError(Problem(id="x.y", message="`x` must be y, but is z.", fix="do"))

    for name, act in (("user", refuse), ("os", lambda: Path("/nonexistent/a").read_bytes())):
        try:
            group.first(act)
        except (LoraCliError, OSError) as error:
            problems = getattr(error, "problems", ())
            code = getattr(error, "exit_code", None)
            seen[name] = [type(error).__name__, code, [p.message for p in problems]]
    try:
        with group.together():
            if rank == 1:
                raise ValueError("only here")
    except (LoraCliError, ValueError) as error:
        seen["together"] = [type(error).__name__, str(error)]
    seen["met"] = meet(group)
    # They still understand each other afterwards.
    seen["after"] = group.add(torch.tensor(1)).item()
    return seen


def meet(group: Group) -> list[str]:
    """Meet an error while the other process is in the middle of a block, and while it exchanges."""
    seen = []
    try:
        with group.together():
            group.meet()
            if group.rank == 1:
                raise ValueError("in the middle")
            group.meet()
            seen.append("came too far")
    except (LoraCliError, ValueError) as error:
        seen.append(f"{type(error).__name__}: {error}")
    # Of an error in an exchange nobody is told, since they wait for the exchange.
    try:
        if group.rank == 1:
            with group.together():
                group.begin_exchange()
                raise ValueError("alone")
    except ValueError as error:
        seen.append(f"{type(error).__name__}: {error}")
    with group.together():
        group.begin_exchange()
        group.end_exchange()
    return seen


def add_gradients(group: Group) -> list[Any]:
    """Add gradients of which some are missing: everywhere, here, or there."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (group.rank + 1)
    if group.rank == 1:
        parameters[1].grad = torch.tensor([1.0, 1.0, 5.0])
    group.add_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def evaluate_grid(group: Group) -> dict[str, Any]:
    """Compare evaluations by both processes with one alone: rows x batch size."""
    wrong, forwards = [], []
    generator = torch.Generator().manual_seed(0)
    for rows in range(1, 18):
        values = torch.rand(rows, generator=generator).tolist()
        features = [{"id": str(i), "x": x, "length": (i * 7) % 5} for i, x in enumerate(values)]
        for size in range(1, 6):
            found = []
            for who in (group, ALONE):
                task: Any = Echo()
                done: list[int] = []
                evaluation = evaluate_rows(
                    task,
                    nn.Identity(),
                    features,
                    batch_size=size,
                    device=torch.device("cpu"),
                    on_rows=done.append,
                    group=who,
                )
                found.append((evaluation.predictions, evaluation.loss, done[-1]))
                if who is group:
                    count = int(group.add(torch.tensor(task.forwards)).item())
                    forwards.append(count == -(-rows // size))
            if found[0] != found[1]:
                wrong.append([rows, size])
    stopped = []
    polls = iter([False, True, True])
    try:
        evaluate_rows(
            task,
            nn.Identity(),
            features,
            batch_size=1,
            device=torch.device("cpu"),
            group=group,
            should_stop=lambda: group.rank == 1 and next(polls),
        )
    except EvaluationStopped:
        stopped.append(True)
    return {"wrong": wrong, "cells": len(forwards), "once": all(forwards), "stopped": stopped}


def build(model: Path, data: Path, group: Group, **settings: Any) -> Any:
    """Return a trainer for both processes, or for this one alone."""
    from lora_cli.training import runtime as runtimes

    before = runtimes.join_group
    runtimes.join_group = lambda _: group  # type: ignore[assignment]  # a stand-in
    try:
        return support.build_trainer(model, data, **settings)
    finally:
        runtimes.join_group = before


def compare_gradients(group: Group, model: Path, data: Path) -> dict[str, Any]:
    """Return the largest difference between the gradients of both and of one, by window."""
    worst = {}
    for micro in (None, 2):
        both, alone = (
            build(model, data, who, model_dropout=False, micro_batch_size=micro)
            for who in (group, ALONE)
        )
        for rows in (1, 2, 3, 7, 8):
            window = both.plan.train[:rows]
            norms = []
            for trainer in (both, alone):
                norms.append((trainer._backward(window), trainer))
            (loss, first), (expected, second) = norms
            pairs = zip(first.parameters.values(), second.parameters.values(), strict=True)
            difference = max(float((a.grad - b.grad).abs().max()) for a, b in pairs)
            worst[f"{rows}/{micro}"] = [difference, abs(loss[0] - expected[0]), loss[1]]
    return worst


def train(group: Group, model: Path, data: Path) -> dict[str, Any]:
    """Train with both and with one; and again with both from a checkpoint."""
    losses: dict[str, list[float]] = {}
    states: list[Any] = []
    adapters = []
    # 64 rows in steps of 10 leave 4 for the last of an epoch.
    settings: dict[str, Any] = {"global_batch_size": 10, "epochs": 1, "save_steps": 3}
    for name, who, dropout in (
        ("both", group, False),
        ("alone", ALONE, False),
        ("dropout", group, True),
    ):
        events: list[Any] = []
        trainer = build(
            model, data, who, model_dropout=dropout, listeners=[events.append], **settings
        )
        trainer.run()
        losses[name] = [event.loss for event in events if isinstance(event, StepDone)]
        adapters.append(trainer.adapter())
        states = [event.state for event in events if isinstance(event, CheckpointDue)]
    resumed = build(model, data, group, model_dropout=True, **settings)
    load_adapter_state(resumed._plain_model, dict(states[0].adapter), resumed._saved_modules)
    resumed.resume(states[0])
    resumed.run()
    final = resumed.adapter()
    everywhere = group.gather_tensors(adapters[2])
    return {
        "losses": losses,
        "steps": states[0].progress.step,
        "resumed": all(torch.equal(final[key], adapters[2][key]) for key in final),
        "equal": all(torch.equal(everywhere[0][key], everywhere[1][key]) for key in final),
    }


def fail_alone(group: Group, model: Path, data: Path) -> list[Any]:
    """Meet an error in one process while the gradients are computed."""
    trainer = build(model, data, group)
    task = trainer.task
    forward = task.forward

    def broken(model: Any, batch: Any) -> StepOutput:
        from lora_cli.errors import Problem

        if group.rank == 1:
            raise RunFailedError(Problem(id="x.bad-row", message="A row must be good, but is bad."))
        return forward(model, batch)  # type: ignore[no-any-return]  # of the task

    object.__setattr__(task, "forward", broken)
    try:
        trainer._train_step()
    except RunFailedError as error:
        return [error.problems[0].id, error.exit_code]
    return []


def main(out: Path, model: Path, data: Path) -> None:
    """Run everything and write it down."""
    torch.set_num_threads(1)
    group = join_group(60.0)
    seen = {
        "talk": talk(group),
        "gradients": add_gradients(group),
        "evaluation": evaluate_grid(group),
        "windows": compare_gradients(group, model, data),
        "training": train(group, model, data),
        "failure": fail_alone(group, model, data),
    }
    (out / f"{group.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
