"""Settings of rows other than those that an adapter was trained and validated on."""

from dataclasses import fields

from lora_cli.config.tasks import DataConfig
from lora_cli.errors import Problem, UserError


def check_new_rows(data: DataConfig, family: str) -> None:
    """Refuse what does nothing for rows that are not trained on, or not read by the family.

    Args:
        data: Where the rows are.
        family: Name of the task family of the adapter.

    Raises:
        UserError: If there is such a setting.
    """
    _check_no_roles(data)
    _check_columns(data, family)


def check_no_new_rows(data: DataConfig) -> None:
    """Refuse settings of new rows where no new rows are named.

    Raises:
        UserError: If there is one.
    """
    changed = _changed(data)
    if changed:
        raise UserError([_no_path(name) for name in changed])


def _changed(data: DataConfig) -> list[str]:
    plain = DataConfig()
    return [
        item.name for item in fields(data) if getattr(data, item.name) != getattr(plain, item.name)
    ]


def _no_path(name: str) -> Problem:
    """A setting of new rows where no new rows are named, so that it would do nothing."""
    return Problem(
        id="data.no-path",
        message=f"`task.data.{name}` must come with `task.data.path`, which names the rows that "
        "it is about, but that is not set.",
        key=f"task.data.{name}",
        fix="add task.data.path=FILE, or leave it out",
    )


def _check_no_roles(data: DataConfig) -> None:
    """Refuse roles of splits for rows that are not trained on, since they would do nothing."""
    roles = ("train_split", "validation_split", "test_split")
    changed = [name for name in _changed(data) if name in roles]
    if changed:
        raise UserError(
            [
                Problem(
                    id="data.no-role",
                    message=f"`task.data.{name}` must be left out where nothing is trained, "
                    f"but is {getattr(data, name)}.",
                    key=f"task.data.{name}",
                    fix="`lora-cli eval` chooses a split with split=NAME",
                )
                for name in changed
            ]
        )


def _check_columns(data: DataConfig, family: str) -> None:
    """Refuse names of columns that rows of this family do not have."""
    readers = {item.name: item.metadata.get("only", {}) for item in fields(data)}
    unread = {
        name: readers[name]["task.family"]
        for name in _changed(data)
        if family not in readers[name].get("task.family", (family,))
    }
    if unread:
        raise UserError(
            [
                Problem(
                    id="config.not-read",
                    message=f"`task.data.{name}` must be left out with an adapter for {family}, "
                    "which reads no such column.",
                    key=f"task.data.{name}",
                    allowed=f"with an adapter for {' or '.join(families)}",
                )
                for name, families in unread.items()
            ]
        )
