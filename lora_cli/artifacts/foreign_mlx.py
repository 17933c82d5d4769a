"""Adapters of mlx-lm: ``adapters.safetensors`` and ``adapter_config.json``.

A layer computes ``y + scale * (x @ lora_a) @ lora_b`` with lora_a (inputs, r) and lora_b
(r, outputs), so that ``A = lora_a^T`` and ``B = lora_b^T``; of an embedding likewise, with the
number of tokens for inputs (ml-explore/mlx-lm, mlx_lm/tuner/lora.py, `LoRALinear` and
`LoRAEmbedding`). `scale` is a number of its own, which no rank divides; one `scale` and one rank
belong to all layers (mlx_lm/tuner/utils.py, `linear_to_lora_layers`). The names of the layers are
those of transformers.
"""

from typing import Any

from lora_cli.artifacts.foreign_file import (
    Base,
    ForeignFile,
    Found,
    is_strength,
    split_pairs,
    unsupported,
)
from lora_cli.lora.factors import Factors, few

LEAVES = (".lora_a", ".lora_b")
PARAMETERS = "lora_parameters"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


def read_mlx(file: ForeignFile, *, base: Base | None, alpha: float | None) -> Found:
    """Return the updates of an adapter that mlx-lm trained.

    Args:
        file: With a config.
        base: Where it is known, it tells which layers are embeddings.
        alpha: Not used: the file states its scale.

    Raises:
        UserError: If a pair lacks a half, there is no one scale, or it is DoRA or no adapter.
    """
    del alpha
    config = file.config or {}
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise unsupported(file, "hold low-rank updates", f'its "fine_tune_type" is {kind!r:.80}')
    scale, r = _scale(file, config.get(PARAMETERS)), config[PARAMETERS].get("rank")
    layers = {}
    for name, (a, b) in split_pairs(file, *LEAVES).items():
        if a.ndim != 2 or b.ndim != 2:
            raise unsupported(
                file, "hold updates of matrices", f"{name} is fused, as of several experts"
            )
        known = None if base is None else base.layers.get(name)
        is_embedding = (
            name.rpartition(".")[2] in _EMBEDDINGS if known is None else known.kind == "embedding"
        )
        layers[name] = Factors(
            A=a.float().T.contiguous(),
            B=b.float().T.contiguous(),
            scale=scale,
            is_embedding=is_embedding,
        )
    if wrong := [name for name, factors in layers.items() if r not in (None, factors.r)]:
        found = f"{few(wrong)} has {layers[wrong[0]].r}"
        raise unsupported(file, f"be of the rank that its config names, {r!r:.80}", found)
    model = config.get("model")
    return Found(layers=layers, base_name=model if isinstance(model, str) and model else None)


def _scale(file: ForeignFile, parameters: Any) -> float:
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_strength(scale):
        found = f"that is {scale!r:.80}"
        raise unsupported(file, f'have a number above 0 as "{PARAMETERS}.scale"', found)
    if "alpha" in parameters:
        # Of the first versions, whose layers multiplied by scale * alpha / rank; later ones
        # dropped it without a word.
        raise unsupported(
            file,
            f'have one factor as "{PARAMETERS}.scale"',
            'there is an "alpha" besides, by which some versions of mlx-lm multiplied, as '
            '"scale" * "alpha" / "rank", and some did not: write the product there, and take '
            '"alpha" out',
        )
    return float(scale)
