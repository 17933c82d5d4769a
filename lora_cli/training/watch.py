"""The dead-adapter alarm: whatever is trained gets a gradient and moves, or the run stops early.

An adapter that is cut off from the loss trains without any error and saves what it started with.
The classic cause is reentrant gradient checkpointing over frozen inputs.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_cli.errors import Problem, RunFailedError
from lora_cli.log import logger
from lora_cli.lora.bottleneck import BottleneckLayer
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.prefix import Prefix
from lora_cli.models.heads import head_names

# A layer that runs and gets no gradient in three steps will get none in the fourth either.
CONNECTED_AFTER = 3
# Layers that are dropped at random, or experts that few rows reach, need some more.
LAST_STEP = 20
_LISTED = 20


@dataclass
class _Watched:
    """One adapted layer, saved module or other trained module, and what has been seen of it."""

    parameters: dict[str, nn.Parameter]
    rows: bool  # Of an embedding: a row has no gradient until its token occurs.
    ran: bool = False
    connected: bool = False
    # Names of parameters that had a gradient other than zero, and of those that then moved.
    reached: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)

    def is_alive(self) -> bool:
        return bool(self.reached) and self.moved >= self.reached

    def is_done(self) -> bool:
        return self.moved >= self.parameters.keys()


@dataclass(frozen=True)
class _Probe:
    """The entry of a parameter whose gradient is largest, before the step."""

    owner: _Watched
    name: str
    parameter: nn.Parameter
    index: torch.Tensor
    before: torch.Tensor
    size: torch.Tensor


class AdapterWatch:
    """Watches the first optimizer steps of a run.

    Each step is looked at twice: `look` after the backward passes and `confirm` after the
    optimizer. The cost is a pass over the gradients of what has not moved yet, which after two
    steps is nothing in nearly every run.

    Every adapter must get a gradient and move, and so must every tensor of the head. Of another
    module that is trained whole something must. Single weights of the base that are trained beside
    them, such as biases, are looked at together: tasks leave parts of a base out, and the gradient
    of some biases is zero but for rounding.

    Args:
        model: With adapters in place.
        saved_modules: Exact paths of the modules that are trained whole.
        may_be_unused: Those of them that the loss may leave out, since nobody asked for them: the
            base came without their weights. That is told, and an error only if the loss leaves out
            every saved module.
    """

    def __init__(
        self,
        model: nn.Module,
        saved_modules: Collection[str],
        *,
        may_be_unused: Collection[str] = (),
    ) -> None:
        self._adapters: dict[str, _Watched] = {}
        self._saved: dict[str, _Watched] = {}
        self._heads: dict[str, _Watched] = {}
        self._others: dict[str, _Watched] = {}
        self._may_be_unused = frozenset(may_be_unused)
        self._hooks: list[RemovableHandle] = []
        self._probes: list[_Probe] = []
        self._steps = 0
        self._is_lora = any(isinstance(module, AdapterLayer) for module in model.modules())
        heads = head_names(model)
        for name, module in model.named_modules():
            if isinstance(module, AdapterLayer):
                own = module.own_tensors().items()
                self._watch(self._adapters, name, module, own, rows=_has_rows(module))
            elif isinstance(module, BottleneckLayer | Prefix):
                self._watch(self._adapters, name, module, module.named_parameters())
            elif name in saved_modules:
                self._watch(self._saved, name, module, module.named_parameters())
                if name in self._saved and is_inside(name, heads):
                    self._heads[name] = self._saved[name]
        seen = {id(p) for w in self._all() for p in w.parameters.values()}
        for name, module in model.named_modules():
            own = module.named_parameters(recurse=False)
            self._watch(self._others, name, module, [(n, p) for n, p in own if id(p) not in seen])

    def _all(self) -> tuple[_Watched, ...]:
        groups = (self._adapters, self._saved, self._others)
        return tuple(watched for group in groups for watched in group.values())

    def _watch(
        self,
        group: dict[str, _Watched],
        name: str,
        module: nn.Module,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        rows: bool = False,
    ) -> None:
        trained = {n: p for n, p in tensors if isinstance(p, nn.Parameter) and p.requires_grad}
        if not trained:
            return
        watched = _Watched(trained, rows)

        def note(module: nn.Module, *_: Any) -> None:
            watched.ran = watched.ran or module.training

        # A prefix is asked for its keys and values, and never called.
        watched.ran = isinstance(module, Prefix)
        group[name] = watched
        self._hooks.append(module.register_forward_hook(note))

    @torch.no_grad()
    def look(self) -> None:
        """Note which parameters have a gradient of the loss, before anything is added to it."""
        self._probes = []
        for watched in self._all():
            for name, parameter in watched.parameters.items():
                if parameter.grad is None or name in watched.moved:
                    continue
                sizes = parameter.grad.abs().flatten()
                index = sizes.argmax()
                before = parameter.flatten()[index].clone()
                self._probes.append(_Probe(watched, name, parameter, index, before, sizes[index]))

    @torch.no_grad()
    def confirm(self, *, last: bool) -> bool:
        """Note which parameters the optimizer moved, and return whether the watch is over.

        Left out for a step that changed nothing on purpose: one that a loss scaler skipped.

        Args:
            last: Whether the run ends with this step.

        Raises:
            RunFailedError: If something that is trained is cut off from the loss, or does not
                move. Each is named.
        """
        self._steps += 1
        if self._probes:
            after = torch.stack([p.parameter.flatten()[p.index] for p in self._probes])
            before = torch.stack([p.before for p in self._probes])
            sizes = torch.stack([p.size for p in self._probes])
            flags = zip((sizes != 0).tolist(), (after != before).tolist(), strict=True)
            for probe, (has_gradient, has_moved) in zip(self._probes, flags, strict=True):
                probe.owner.connected = True
                if has_gradient:
                    probe.owner.reached.add(probe.name)
                if has_gradient and has_moved:
                    probe.owner.moved.add(probe.name)
            self._probes = []
        done = all(watched.is_done() for watched in self._all())
        if not done:
            self._raise_if_dead(last=last)
        done = done or last or self._steps >= LAST_STEP
        if done:
            self.close()
        return done

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _raise_if_dead(self, *, last: bool) -> None:
        problems = []
        if self._steps == CONNECTED_AFTER or last or self._steps == LAST_STEP:
            problems = self._cut_off()
        if self._steps == LAST_STEP or (last and self._steps >= CONNECTED_AFTER):
            problems += self._without_effect()
        if problems:
            self.close()
            raise RunFailedError(problems)

    def _cut_off(self) -> list[Problem]:
        """Report what ran and is no part of what the loss was computed from."""
        names = [n for n, w in self._adapters.items() if w.ran and not w.connected]
        saved = [n for n, w in self._saved.items() if w.ran and not w.connected]
        problems = []
        if names:
            problems.append(
                self._problem(
                    names,
                    f"but {len(names)} of {len(self._adapters)} ran without the loss depending on "
                    f"them in {self._count()}",
                    fix="gradient checkpointing over frozen inputs does that: use "
                    f"use_reentrant=False. {self._leave_out(names)}",
                )
            )
        return problems + self._saved_problems(saved)

    def _without_effect(self) -> list[Problem]:
        """Report what never ran, what had no gradient but zero, and what did not move."""
        still = {n: w for n, w in self._adapters.items() if not w.is_alive()}
        idle = [n for n, w in still.items() if not w.connected and not w.ran]
        zero = [n for n, w in still.items() if w.connected and not w.reached and not w.rows]
        stuck = [n for n, w in still.items() if w.reached]
        # Dropping layers at random, or routing, can leave one out of a few steps.
        if self._steps < LAST_STEP:
            idle = []
        total, steps = len(self._adapters), self._count()
        problems = [
            self._problem(names, f"but {len(names)} of {total} {what} {steps}", fix=fix)
            for names, what, fix in (
                (idle, "never ran in", self._leave_out(idle)),
                (zero, "had a gradient of zero throughout", self._leave_out(zero)),
                (stuck, "stayed as they were, in spite of a gradient, in", "raise optimizer.lr"),
            )
            if names
        ]
        never = [n for n, w in self._saved.items() if not w.connected and not w.ran]
        problems += self._head_problems() + self._other_problems()
        return problems + self._saved_problems(never if self._steps == LAST_STEP else [])

    def _head_problems(self) -> list[Problem]:
        """Report tensors of heads, and whole other modules, that have not moved."""
        connected = {n: w for n, w in self._saved.items() if w.connected}
        without, stuck = [], []
        for name, watched in connected.items():
            if name in self._heads:
                missing = sorted(watched.parameters.keys() - watched.reached)
                without += [f"{name}.{leaf}" for leaf in missing]
            elif not watched.reached:
                without.append(name)
            if name in self._heads or not watched.moved:
                stuck += [f"{name}.{leaf}" for leaf in sorted(watched.reached - watched.moved)]
        total = sum(len(watched.parameters) for watched in connected.values())
        problems = []
        if without:
            problems.append(
                self._tensor_problem(
                    without,
                    f"but {len(without)} of {total} had none but zero throughout {self._count()}",
                    key="task",
                    fix="report this: a head should have no tensor that its loss does not use",
                )
            )
        return problems + self._stuck_problems(stuck)

    def _other_problems(self) -> list[Problem]:
        """Report that no weight of the base that is trained has moved."""
        if not self._others or any(watched.moved for watched in self._others.values()):
            return []
        reached = [f"{n}.{leaf}" for n, w in self._others.items() for leaf in sorted(w.reached)]
        if reached:
            return self._stuck_problems(reached)
        names = [f"{n}.{leaf}" for n, w in self._others.items() for leaf in w.parameters]
        what = f"but all {len(names)} beside the head had none in {self._count()}"
        fix = "gradient checkpointing over frozen inputs does that: use use_reentrant=False"
        return [self._tensor_problem(names, what, key="strategy", fix=fix)]

    def _stuck_problems(self, names: Sequence[str]) -> list[Problem]:
        if not names:
            return []
        what = f"but {len(names)} stayed as they were, in spite of one, in {self._count()}"
        return [self._tensor_problem(names, what, key="optimizer.lr", fix="raise optimizer.lr")]

    def _tensor_problem(self, names: Sequence[str], what: str, *, key: str, fix: str) -> Problem:
        return Problem(
            id="train.dead-adapter",
            message="Every trained tensor must get a gradient and move in the first steps, "
            f"{what}: {_listed(names)}.",
            key=key,
            fix=fix,
        )

    def _saved_problems(self, unused: Sequence[str]) -> list[Problem]:
        """Report modules that the loss leaves out; tell of those for which that is allowed."""
        used = any(watched.connected for watched in self._saved.values())
        dead = [name for name in unused if not used or name not in self._may_be_unused]
        for name in unused:
            if name not in dead:
                del self._saved[name]
                logger.warning(
                    "note: the loss does not depend on %s, whose weights the base lacks: it is "
                    "saved as it started",
                    name,
                )
        if not dead:
            return []
        return [
            Problem(
                id="train.dead-adapter",
                message="Every module that is trained whole must get a gradient in the first "
                f"steps, but {len(dead)} of {len(self._saved)} got none in {self._count()}: "
                f"{_listed(dead)}.",
                key="lora.modules_to_save",
                fix="leave out of lora.modules_to_save what this task does not use",
            )
        ]

    def _problem(self, names: Sequence[str], what: str, *, fix: str) -> Problem:
        return Problem(
            id="train.dead-adapter",
            message=f"Every adapter must learn from the first steps on, {what}: {_listed(names)}.",
            key="lora.targets" if self._is_lora else "strategy",
            fix=fix,
        )

    def _leave_out(self, names: Sequence[str]) -> str:
        """Say how to train without layers; strategies that put theirs everywhere cannot."""
        if not self._is_lora:
            return "This task does not use them: strategy=lora can leave layers out"
        more = ",..." if len(names) > _LISTED else ""
        shown = ",".join(names[:_LISTED])
        return f"Layers that this task does not use are left out with lora.exclude=[{shown}{more}]"

    def _count(self) -> str:
        return "the first step" if self._steps == 1 else f"the first {self._steps} steps"


def _has_rows(layer: AdapterLayer) -> bool:
    base = layer.base_layer
    while isinstance(base, AdapterLayer):
        base = base.base_layer
    return isinstance(base, nn.Embedding)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
