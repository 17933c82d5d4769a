"""An adapter folder of any program, read without trust in it: nothing here raises for bad files.

Of the weights the headers are read, and values one tensor at a time; a pickle is never opened.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.artifacts.adapter import RECORD
from lora_cli.artifacts.peft_config import CONFIG_FILE, read_json
from lora_cli.artifacts.peft_tensors import PREFIX, WEIGHTS_FILE
from lora_cli.artifacts.tensor_files import Stored, read_header, read_tensor
from lora_cli.errors import UserError
from lora_cli.lora.settings import scale_of

_MAX_RECORD_BYTES = 1 << 22
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_[AB])(\.(?P<name>[^.]+))?\.(weight|bias)")
_PARAMETER = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_embedding_[AB]|lora_magnitude_vector)(\.(?P<name>[^.]+))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# A name that means itself as a regular expression, but for its dots.
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")


class Key(NamedTuple):
    """The name of a tensor, taken apart.

    Attributes:
        text: The whole name.
        module: Path of the module in the base model; of `leaf` "" that of the tensor.
        leaf: lora_A, lora_B, lora_bias, lora_embedding_A, lora_embedding_B, magnitude or tokens;
            "stray" for what looks like one of them and is none, "" for a tensor of the base.
        adapter: Name of the adapter where the program has left it in, else "".
    """

    text: str
    module: str
    leaf: str
    adapter: str


class Pair(NamedTuple):
    """The two factors of a layer, either of which may be missing."""

    A: Stored | None
    B: Stored | None
    is_embedding: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseShapes:
    """What of a base model is compared.

    Attributes:
        modules: Paths of all its modules.
        sizes: Inputs and outputs of its layers, by path; of an embedding its rows and columns.
        weights: Shapes of its parameters by name.
        tied: Paths of embeddings and output layers that share one weight; empty where none do.
        prefix: What the paths within its body begin with, and a dot.
    """

    modules: frozenset[str]
    sizes: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    prefix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspected:
    """What is in an adapter folder.

    Attributes:
        folder: The folder.
        files: Names of its files.
        config: What adapter_config.json says; empty where it cannot be read.
        config_fault: Why it cannot, else "".
        tensors: Headers by name; empty where there is no whole safetensors file.
        tensors_fault: Why there is none, else "".
        keys: The names, taken apart.
        not_finite: Names of tensors with NaN or infinity in them.
        zero: Names of tensors that are zero throughout.
        labels: Label names that lora-cli wrote beside PEFT's files.
        base: The base model, where one was named.
    """

    folder: Path
    files: frozenset[str]
    config: Mapping[str, Any]
    config_fault: str
    tensors: Mapping[str, Stored]
    tensors_fault: str
    keys: tuple[Key, ...]
    not_finite: tuple[str, ...]
    zero: frozenset[str]
    labels: tuple[str, ...]
    base: BaseShapes | None = None
    pairs: Mapping[str, Pair] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", _pairs(self.keys, self.tensors))

    @property
    def kind(self) -> str:
        """PEFT's name of the method; LORA where the file does not say."""
        return str(self.config.get("peft_type", "LORA"))

    @property
    def saved(self) -> tuple[str, ...]:
        """What modules_to_save lists."""
        return names_of(self.config.get("modules_to_save"))

    @property
    def whole(self) -> tuple[Key, ...]:
        """Tensors of the base model itself: heads, embeddings, biases."""
        return tuple(key for key in self.keys if not key.leaf)

    def named(self, leaf: str) -> tuple[str, ...]:
        """Return the names of the tensors of a leaf."""
        return tuple(key.text for key in self.keys if key.leaf == leaf)

    def rank_of(self, layer: str) -> int | None:
        """Return the rank that the config gives a layer, or None where that cannot be told."""
        r = lookup(self.config.get("rank_pattern"), layer, self.config.get("r", 8))
        return r if isinstance(r, int) and not isinstance(r, bool) and r > 0 else None

    def alpha_of(self, layer: str) -> float | None:
        """Return the strength that the config gives a layer, or None where that is not told."""
        alpha = lookup(self.config.get("alpha_pattern"), layer, self.config.get("lora_alpha", 8))
        return float(str(alpha)) if is_number(alpha) else None

    def scale_of(self, layer: str) -> float | None:
        """Return what PEFT multiplies the update of a layer with, or None."""
        r, alpha = self.rank_of(layer), self.alpha_of(layer)
        if r is None or alpha is None:
            return None
        return scale_of(r, alpha, rslora=bool(self.config.get("use_rslora")))


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def names_of(value: object) -> tuple[str, ...]:
    """Return the texts of a list from a stranger's file; nothing where it is no list."""
    items = value if isinstance(value, list | tuple) else ()
    return tuple(item for item in items if isinstance(item, str))


def lookup(patterns: object, name: str, default: object) -> object:
    """Return the value of the first pattern that PEFT would match with a path.

    PEFT's patterns are regular expressions, which a stranger's file could make endless: those that
    are more than names are not tried, and the answer is None.
    """
    if not isinstance(patterns, Mapping) or not patterns:
        return default
    if not all(isinstance(pattern, str) and _PLAIN.fullmatch(pattern) for pattern in patterns):
        return None
    for pattern, value in patterns.items():
        if name == pattern or name.endswith(f".{pattern}"):
            return value
    return default


def inspect_adapter(folder: Path) -> Inspected:
    """Read what is in an adapter folder."""
    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    config, config_fault = _config(folder)
    tensors, tensors_fault = _tensors(folder)
    not_finite, zero = [], set()
    for name, stored in tensors.items():
        if stored.dtype is not None:
            tensor = read_tensor(stored)
            if not bool(torch.isfinite(tensor).all()):
                not_finite.append(name)
            elif not bool(tensor.any()):
                zero.add(name)
    return Inspected(
        folder=folder,
        files=files,
        config=config,
        config_fault=config_fault,
        tensors=tensors,
        tensors_fault=tensors_fault,
        keys=tuple(parse_key(name) for name in sorted(tensors)),
        not_finite=tuple(not_finite),
        zero=frozenset(zero),
        labels=_labels(folder / RECORD),
    )


def parse_key(text: str) -> Key:
    """Take the name of a tensor apart.

    >>> parse_key("base_model.model.query.lora_A.default.weight")[1:]
    ('query', 'lora_A', 'default')
    """
    path = text.removeprefix(PREFIX)
    if found := _FACTOR.fullmatch(path):
        leaf = found["factor"]
        if path.endswith(".bias"):
            leaf = "lora_bias" if leaf == "lora_B" else "stray"
        return Key(text, found["module"], leaf, found["name"] or "")
    if found := _PARAMETER.fullmatch(path):
        is_magnitude, name = found["factor"] == "lora_magnitude_vector", found["name"] or ""
        if name == "weight":
            # PEFT reads a magnitude so, and nothing else.
            return Key(text, found["module"], "magnitude" if is_magnitude else "stray", "")
        return Key(text, found["module"], "magnitude" if is_magnitude else found["factor"], name)
    if found := _TOKENS.fullmatch(path):
        return Key(text, found["module"], "tokens", "")
    return Key(text, path, "stray" if "lora" in path.lower() else "", "")


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    if not (folder / CONFIG_FILE).is_file():
        return {}, f"there is no {CONFIG_FILE}"
    try:
        return read_json(folder / CONFIG_FILE), ""
    except UserError as error:
        return {}, error.problems[0].message


def _tensors(folder: Path) -> tuple[dict[str, Stored], str]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return {}, f"there is no {WEIGHTS_FILE}"
    try:
        return {stored.name: stored for stored in read_header(path)[1]}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{WEIGHTS_FILE} is damaged: {error}"


def _labels(path: Path) -> tuple[str, ...]:
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            return ()
        document = json.loads(path.read_text(encoding="utf-8"))
        return names_of(document["state"]["labels"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def _pairs(keys: tuple[Key, ...], tensors: Mapping[str, Stored]) -> dict[str, Pair]:
    sides: dict[str, dict[str, Stored]] = {}
    for key in keys:
        if key.leaf[:-1] in ("lora_", "lora_embedding_"):
            sides.setdefault(key.module, {})[key.leaf] = tensors[key.text]
    return {
        module: Pair(
            found.get("lora_A", found.get("lora_embedding_A")),
            found.get("lora_B", found.get("lora_embedding_B")),
            is_embedding=any("embedding" in leaf for leaf in found),
        )
        for module, found in sides.items()
    }
