"""Adapters in the names of kohya's scripts, as image generators share them.

A layer is ``PREFIX_PATH``, where PREFIX is lora_unet, lora_te or the like and the dots of the path
are underscores. It has ``lora_down.weight`` (r, inputs), ``lora_up.weight`` (outputs, r), both with
a kernel for convolutions, and one number ``alpha``; the scale is alpha / r. Without an alpha, or
with an alpha of 0, the scale is 1 (kohya-ss/sd-scripts, networks/lora.py, `LoRAModule` and
`create_network_from_weights`).
"""

import re

from lora_cli.artifacts.foreign_file import Base, ForeignFile, Found, split_pairs, unsupported
from lora_cli.errors import Problem, UserError, nearest_name
from lora_cli.lora.factors import Factors, few

LEAVES = (".lora_down.weight", ".lora_up.weight")
_ALPHA = ".alpha"
_PREFIX = re.compile(r"lora_[a-z]+\d*_")


def read_kohya(file: ForeignFile, *, base: Base | None, alpha: float | None) -> Found:
    """Return the updates of an adapter in kohya's names.

    Args:
        file: What was read.
        base: Its paths tell which underscores are dots.
        alpha: Not used: the file states it for each layer.

    Raises:
        UserError: If there is no base, a pair lacks a half, or a name means no layer, several
            layers or a layer of several models.
    """
    del alpha
    if base is None:
        raise UserError(
            Problem(
                id="convert.no-base",
                message="`base` must name the model, whose paths tell which underscores are dots "
                "in the names of this file, but is null.",
                key="base",
                where=str(file.path),
                fix="base=DIR",
            )
        )
    alphas = [n for n in file.tensors if n.endswith(_ALPHA) and file.tensors[n].numel() == 1]
    pairs = split_pairs(file, *LEAVES, others=alphas)
    if lone := [name for name in alphas if name.removesuffix(_ALPHA) not in pairs]:
        raise unsupported(file, "have factors for each alpha", f"it has none for {few(lone)}")
    paths = _resolve(file, list(pairs), base)
    layers, without = {}, 0
    for name, (down, up) in pairs.items():
        stored = file.tensors.get(name + _ALPHA)
        strength = 0.0 if stored is None else float(stored)
        without += stored is None
        if strength < 0:
            raise unsupported(file, "have alphas of at least 0", f"that of {name} is {strength:g}")
        layers[paths[name]] = Factors(
            A=down.float(), B=up.float(), scale=strength / down.shape[0] if strength else 1.0
        )
    notes = f"{without} layers have no alpha: their scale is 1, as kohya's scripts take it"
    return Found(layers=layers, notes=(notes,) if without else ())


def _resolve(file: ForeignFile, names: list[str], base: Base) -> dict[str, str]:
    """Return the path in the base of each name."""
    spelled: dict[str, list[str]] = {}
    for path in base.layers:
        spelled.setdefault(path.replace(".", "_"), []).append(path)
    found: dict[str, str] = {}
    unknown: list[str] = []
    several: list[str] = []
    prefixes = set[str]()
    for name in names:
        match = _PREFIX.match(name)
        rest = name if match is None else name[match.end() :]
        prefixes.add("" if match is None else match[0])
        paths = spelled.get(rest, [])
        if len(paths) == 1:
            found[name] = paths[0]
        else:
            (several if paths else unknown).append(name)
    problems = []
    if unknown:
        near = nearest_name(_PREFIX.sub("", unknown[0]), spelled)
        more = f", whose prefixes are {', '.join(sorted(prefixes))}" if len(prefixes) > 1 else ""
        problems.append(
            Problem(
                id="convert.unknown-layer",
                message=f"`adapter` must belong to {base.name}, but that has no layer "
                f"{few(unknown)}{more}.",
                key="adapter",
                where=str(file.path),
                allowed=near and f"names such as {near}, for {spelled[near][0]}",
                fix="base=DIR with the model that the adapter was trained on; a file for several "
                "models is to be cut into one for each first",
            )
        )
    if several or len(set(found.values())) < len(found):
        names = several or sorted(found)
        problems.append(
            Problem(
                id="convert.unknown-layer",
                message=f"`adapter` must name one layer of {base.name} each, but several are "
                f"called {few(names)}.",
                key="adapter",
                where=str(file.path),
            )
        )
    if problems:
        raise UserError(problems)
    return found
