"""The formats of adapters that are recognised on reading, and how a file is told to be of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_cli.artifacts import foreign_kohya, foreign_loralib, foreign_mlx, foreign_torchtune
from lora_cli.artifacts.foreign_file import ForeignFile, Found
from lora_cli.artifacts.peft_config import CONFIG_FILE
from lora_cli.errors import Problem, UserError

# All that PEFT writes is below it, those adapters whose tensors end as loralib's do included.
_PEFT = "base_model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a file of one program is told, and read.

    Attributes:
        name: Of the program.
        prefix: What the names of the tensors begin with.
        leaves: What some end in; empty where that does not matter.
        keys: What the config beside it must have; empty where there need be none.
        states_scale: Whether the file says how strong the update is.
        read: Takes the file, `base` and `alpha`; None for PEFT, whose module reads folders.
    """

    name: str
    prefix: str = ""
    leaves: Sequence[str] = ()
    keys: Sequence[str] = ()
    states_scale: bool = True
    read: Callable[..., Found] | None = None

    def lacking(self, file: ForeignFile) -> list[str]:
        """Return what a file would have to have to be of this format."""
        names = [
            name
            for name in file.tensors
            if name.startswith(self.prefix) and (self.prefix or not name.startswith(_PEFT))
        ]
        missing = []
        if not any(not self.leaves or name.endswith(tuple(self.leaves)) for name in names):
            what = f"end in {' or '.join(self.leaves)}" if self.leaves else f"begin {self.prefix}"
            missing.append(f"tensors whose names {what}")
        known = file.config or {}
        return missing + [f"{key} in {CONFIG_FILE}" for key in self.keys if key not in known]


FORMATS = (
    Format(name="PEFT", prefix=_PEFT, keys=("target_modules",)),
    Format(
        name="mlx-lm",
        leaves=foreign_mlx.LEAVES,
        keys=(foreign_mlx.PARAMETERS,),
        read=foreign_mlx.read_mlx,
    ),
    Format(
        name="torchtune",
        leaves=foreign_torchtune.LEAVES,
        keys=foreign_torchtune.KEYS,
        read=foreign_torchtune.read_torchtune,
    ),
    Format(name="kohya", leaves=foreign_kohya.LEAVES, read=foreign_kohya.read_kohya),
    Format(
        name="loralib",
        leaves=foreign_loralib.LEAVES,
        states_scale=False,
        read=foreign_loralib.read_loralib,
    ),
)


def detect_format(file: ForeignFile) -> Format:
    """Return the one format that a file can be of.

    Raises:
        UserError: If it lacks something of each, or could be of several.
    """
    lacking = {form.name: form.lacking(file) for form in FORMATS}
    fitting = [form for form in FORMATS if not lacking[form.name]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        found = f"could be of {' and of '.join(form.name for form in fitting)}"
    else:
        missing = (f"{name} (no {', no '.join(lacks)})" for name, lacks in lacking.items())
        found = f"is of none of them: {', '.join(missing)}"
    raise UserError(
        Problem(
            id="convert.unclear",
            message=f"`adapter` must be of a format that is known, but {file.path.name} {found}.",
            key="adapter",
            where=str(file.path),
            allowed=", ".join(form.name for form in FORMATS),
            fix=f"give the folder as the program wrote it, with its {CONFIG_FILE}",
        )
    )
