"""The configuration that an adapter was trained with, as its run and its own folder tell it."""

from dataclasses import replace
from typing import Any

from lora_cli.artifacts.adapter import RECORD, AdapterRecord, Subject
from lora_cli.artifacts.run_dir import read_config
from lora_cli.config.commands import TrainConfig
from lora_cli.config.decode import decode
from lora_cli.config.schema import flatten, show, to_plain
from lora_cli.errors import Problem, UserError

# What an adapter depends on; other settings may be changed when a run is resumed.
_SECTIONS = ("task.", "lora.", "strategy.", "seed")
# Left out of the adapter's own folder, which is shared with others.
_PLACES = ("task.data.path",)


def training_config(record: AdapterRecord, subject: Subject) -> TrainConfig:
    """Return the configuration of the adapter; a run's own copy knows where its data is.

    Raises:
        UserError: If it cannot be read, or the run says something else than the adapter, which
            carries a hash.
    """
    recorded = _decode(record.config, str(subject.adapter / RECORD))
    if subject.run is None:
        return recorded
    where = str(subject.run / "config.yaml")
    config = _decode(read_config(subject.run / "config.yaml"), where)
    ours, theirs = flatten(to_plain(recorded)), flatten(to_plain(config))
    changed = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name.startswith(_SECTIONS) and name not in _PLACES and ours.get(name) != theirs.get(name)
    ]
    if changed:
        raise UserError([_changed(name, theirs, ours, where) for name in changed])
    return config


def _decode(plain: Any, where: str) -> TrainConfig:
    config, problems = decode(TrainConfig, dict(plain))
    if config is None:
        raise UserError([replace(problem, where=where) for problem in problems])
    trained: TrainConfig = config
    return trained


def _changed(name: str, found: Any, trained: Any, where: str) -> Problem:
    return Problem(
        id="run.changed-config",
        message=f"`{name}` must be what the adapter was trained with, "
        f"{show(trained.get(name))}, but is {show(found.get(name))}.",
        key=name,
        where=where,
        fix=f"set it back to {show(trained.get(name))}; a new run is needed for another value",
    )
