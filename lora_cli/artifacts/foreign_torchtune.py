"""Adapters of torchtune, in its own names.

They are ``layers.N.attn.q_proj.lora_a.weight`` (r, inputs) and ``lora_b.weight`` (outputs, r), and
the scale is alpha / r. Names are turned into those of transformers as torchtune does it, and so are
the rows of B of the queries and keys: torchtune turns pairs of neighbours by one angle in its
rotary embedding, transformers the two halves of a head, so that row ``2 i + j`` of each head
becomes row ``j * head_dim / 2 + i`` (pytorch/torchtune, torchtune/models/convert_weights.py,
`tune_to_peft_adapter_weights`). That holds for Llama and Mistral alone; torchtune's own conversion
does the same to families of whose weights it does not reorder any, which cannot be right, so others
are refused here.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from lora_cli.artifacts.foreign_file import (
    Base,
    ForeignFile,
    Found,
    is_strength,
    split_pairs,
    unsupported,
)
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors, few

LEAVES = (".lora_a.weight", ".lora_b.weight")
KEYS = ("r", "lora_alpha")
_FAMILIES = ("llama", "mistral")
_LAYER = re.compile(r"layers\.(\d+)\.(attn|mlp)\.(\w+)")
_MODULES = {
    ("attn", "q_proj"): "self_attn.q_proj",
    ("attn", "k_proj"): "self_attn.k_proj",
    ("attn", "v_proj"): "self_attn.v_proj",
    ("attn", "output_proj"): "self_attn.o_proj",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w2"): "mlp.down_proj",
    ("mlp", "w3"): "mlp.up_proj",
}
_OTHERS = {"output": "lm_head"}


def read_torchtune(file: ForeignFile, *, base: Base | None, alpha: float | None) -> Found:
    """Return the updates of an adapter that torchtune trained.

    Args:
        file: With a config.
        base: Tells the family and its heads.
        alpha: Not used: the config states it.

    Raises:
        UserError: If there is no base or another family, a pair lacks a half, a layer has no
            counterpart, or the config says another rank or no strength.
    """
    del alpha
    config = file.config or {}
    r, strength = (config.get(key) for key in KEYS)
    if not is_strength(r) or not is_strength(strength):
        found = f"they are {r!r:.80} and {strength!r:.80}"
        raise unsupported(file, 'have numbers above 0 as "r" and "lora_alpha"', found)
    if base is None:
        raise _no_base(file)
    family = base.settings.get("model_type")
    if family not in _FAMILIES:
        found = f"the order of rows in the attention of {family!r:.80} is not known"
        raise unsupported(file, f"belong to a base of {' or '.join(_FAMILIES)}", found)
    pairs = split_pairs(file, *LEAVES)
    names = {name: _hf_name(name) for name in pairs}
    if unknown := [name for name, theirs in names.items() if theirs is None]:
        raise unsupported(file, "have layers that torchtune names", f"it has {few(unknown)}")
    if wrong := [name for name, (a, _) in pairs.items() if a.shape[0] != r]:
        found = f"{few(wrong)} has {pairs[wrong[0]][0].shape[0]}"
        raise unsupported(file, f"be of the rank that its config names, {r}", found)
    layers = {}
    for name, (a, b) in pairs.items():
        theirs = str(names[name])
        heads = _heads(theirs, base.settings)
        layers[theirs] = Factors(
            A=a.float(),
            B=b.float() if heads is None else _reordered(file, name, b.float(), *heads),
            scale=float(strength) / r,
        )
    return Found(layers=layers)


def _hf_name(name: str) -> str | None:
    if name in _OTHERS:
        return _OTHERS[name]
    match = _LAYER.fullmatch(name)
    module = None if match is None else _MODULES.get((match[2], match[3]))
    return module and f"model.layers.{match[1]}.{module}"  # type: ignore[index]


def _heads(name: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the number of heads and their size where the rows of B are by heads, else None."""
    if not name.endswith(("q_proj", "k_proj")):
        return None
    count = settings["num_attention_heads"]
    size = settings.get("head_dim") or settings["hidden_size"] // count
    if name.endswith("k_proj"):
        count = settings.get("num_key_value_heads") or count
    return count, size


def _reordered(
    file: ForeignFile, name: str, b: torch.Tensor, num_heads: int, head_dim: int
) -> torch.Tensor:
    """Bring the rows of B, (heads * head_dim, r), into the order of transformers."""
    if b.ndim != 2 or b.shape[0] != num_heads * head_dim:
        rule = f"have {num_heads} heads of {head_dim} rows, as its base has"
        raise unsupported(file, rule, f"B of {name} is {tuple(b.shape)}")
    rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
    return b[rows.transpose(1, 2).flatten()]


def _no_base(file: ForeignFile) -> UserError:
    return UserError(
        Problem(
            id="convert.no-base",
            message="`base` must name the model, whose heads tell the order of rows in an adapter "
            "of torchtune, but is null.",
            key="base",
            where=str(file.path),
            fix="base=DIR",
        )
    )
