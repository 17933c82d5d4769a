"""An adapter file of another program, read as data: tensors, and the config file beside them."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lora_cli.artifacts.peft_config import CONFIG_FILE
from lora_cli.artifacts.tuned import read_safetensors
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors, few

_MAX_CONFIG_BYTES = 1 << 20
_SUFFIX = ".safetensors"
# What torch.save and numpy write: opening the first kind may run code.
_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz")
_TO_SAFETENSORS = (
    'where you trust it: python -c "import torch, safetensors.torch as s; s.save_file('
    "{k: v.contiguous() for k, v in torch.load('FILE', weights_only=True).items()}, "
    "'adapter.safetensors')\""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignFile:
    """What is on disk.

    Attributes:
        path: The file of tensors.
        tensors: By the names that they have there.
        config: What `adapter_config.json` beside it says; None where there is none.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    config: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseLayer:
    """A layer that may be adapted.

    Attributes:
        kind: As `lora_cli.lora.kinds.kind_of` says.
        a: The shape of A without its rank: (in_features,), (num_embeddings,) or (in, *kernel).
        b: The first size of B: out_features, embedding_dim or out_channels.
        groups: Groups of a convolution.
    """

    kind: str
    a: tuple[int, ...]
    b: int
    groups: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What is known of a base model without its numbers.

    Attributes:
        name: As the user named it.
        layers: Its layers by path.
        settings: Its config.json.
    """

    name: str
    layers: Mapping[str, BaseLayer]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An adapter of another program.

    Attributes:
        layers: Updates by path of the layer in the base model.
        base_name: What the file calls its base; None if it says nothing.
        notes: What a person should know, in sentences.
    """

    layers: Mapping[str, Factors]
    base_name: str | None = None
    notes: tuple[str, ...] = ()


def read_foreign(path: Path) -> ForeignFile:
    """Read a file, or the only file of tensors in a folder, and the config beside it.

    Raises:
        UserError: If there is none or there are several, it is damaged, a pickle, or not finite.
    """
    file = _find_file(path)
    tensors = read_safetensors(file)
    bad = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise UserError(
            Problem(
                id="convert.not-finite",
                message="`adapter` must hold finite numbers, but NaN or infinity is in "
                f"{few(bad)}.",
                key="adapter",
                where=str(file),
                fix="take an earlier checkpoint of that training",
            )
        )
    return ForeignFile(path=file, tensors=tensors, config=_read_config(file.parent / CONFIG_FILE))


def _find_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == _SUFFIX)
        if len(files) == 1:
            return files[0]
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in _OTHER_SUFFIXES)
        if not files and pickled:
            raise _pickled(path / pickled[0])
        found = f"{path} has {few([p.name for p in files]) or 'none'}"
        fix = "adapter=FOLDER/FILE.safetensors names one" if files else "name another folder"
        raise _no_file(f"be or have one {_SUFFIX} file", found, fix)
    if not path.is_file():
        raise _no_file("name a folder or file", f"there is no {path}", "adapter=DIR")
    if path.suffix != _SUFFIX:
        raise _pickled(path)
    return path


def _no_file(rule: str, found: str, fix: str) -> UserError:
    return UserError(
        Problem(
            id="convert.no-file",
            message=f"`adapter` must {rule}, but {found}.",
            key="adapter",
            fix=fix,
        )
    )


def _pickled(path: Path) -> UserError:
    return UserError(
        Problem(
            id="convert.pickle",
            message="`adapter` must be a safetensors file, since others may run code when they "
            f"are opened, but is {path.name}.",
            key="adapter",
            where=str(path),
            fix=_TO_SAFETENSORS.replace("FILE", path.name),
        )
    )


def _read_config(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("it is larger than 1 MiB")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            Problem(
                id="adapter.bad-config",
                message=f"{CONFIG_FILE} must be a JSON file of at most 1 MiB, but reading it "
                f"gave: {error}.",
                where=str(path),
            )
        ) from None
    return config


def split_pairs(
    file: ForeignFile, leaf_a: str, leaf_b: str, *, others: Collection[str] = ()
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B as the file has them, by layer; every tensor has its place or is named.

    Args:
        file: What was read.
        leaf_a: End of the names of A, with its dot.
        leaf_b: Likewise of B.
        others: Names of tensors that the caller reads.

    Raises:
        UserError: If a pair lacks a half, or a tensor is of neither kind.
    """
    halves = [{n.removesuffix(leaf) for n in file.tensors if n.endswith(leaf)} for leaf in
              (leaf_a, leaf_b)]  # fmt: skip
    layers = sorted(halves[0] & halves[1])
    lone = [f"{name}{leaf_b}" for name in sorted(halves[0] - halves[1])]
    lone += [f"{name}{leaf_a}" for name in sorted(halves[1] - halves[0])]
    known = {f"{n}{leaf}" for half in halves for n in half for leaf in (leaf_a, leaf_b)}
    stray = sorted(set(file.tensors) - known - set(others))
    faults = {
        "both factors of each update, but lacks": lone,
        "factors of low-rank updates and nothing else, but also holds": stray,
    }
    problems = [
        Problem(
            id="convert.tensors",
            message=f"`adapter` must hold {rule} {few(names)}.",
            key="adapter",
            where=str(file.path),
            fix="copy the file again"
            if names is lone
            else "merge the adapter with the program that made it, and use `lora-cli extract`",
        )
        for rule, names in faults.items()
        if names
    ]
    if problems:
        raise UserError(problems)
    return {n: (file.tensors[n + leaf_a], file.tensors[n + leaf_b]) for n in layers}


def is_strength(value: object) -> TypeGuard[float]:
    """Whether a value of a config is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf


def unsupported(file: ForeignFile, rule: str, found: str) -> UserError:
    """Return the error of an adapter that cannot be converted without changing what it says."""
    return UserError(
        Problem(
            id="convert.unsupported",
            message=f"`adapter` must {rule}, but {found}.",
            key="adapter",
            where=str(file.path),
            fix="merge the adapter with the program that made it, and use `lora-cli extract`",
        )
    )
