"""State dicts of loralib: ``PATH.lora_A`` (r, inputs) and ``PATH.lora_B`` (outputs, r).

The scale is lora_alpha / r, and neither number is in the file (microsoft/LoRA, loralib/layers.py,
`Linear` and `Embedding`; loralib/utils.py, `lora_state_dict`). `MergedLinear`, which updates some
of the parts of a fused layer, and `Conv2d`, whose factors are of another shape, cannot be told from
a damaged file by their tensors: they come out as wrong shapes, and are refused.
"""

from lora_cli.artifacts.foreign_file import Base, ForeignFile, Found, split_pairs
from lora_cli.errors import Problem, UserError
from lora_cli.lora.factors import Factors

LEAVES = (".lora_A", ".lora_B")


def read_loralib(file: ForeignFile, *, base: Base | None, alpha: float | None) -> Found:
    """Return the updates of a state dict.

    Args:
        file: What was read.
        base: Tells embeddings from linear layers.
        alpha: The lora_alpha of training.

    Raises:
        UserError: If there is no base or alpha, or a pair lacks a half.
    """
    lacking = {"base": base, "alpha": alpha}
    problems = [
        Problem(
            id="convert.no-base" if key == "base" else "convert.no-scale",
            message=f"`{key}` must be given, since a state dict of loralib does not say it, but is "
            "null.",
            key=key,
            where=str(file.path),
            fix="base=DIR" if key == "base" else "alpha=NUMBER, as lora_alpha was in training",
        )
        for key, value in lacking.items()
        if value is None
    ]
    pairs = split_pairs(file, *LEAVES)
    if base is None or alpha is None:
        raise UserError(problems)
    embeddings = {name for name, layer in base.layers.items() if layer.kind == "embedding"}
    return Found(
        layers={
            name: Factors(
                A=a.float(),
                B=b.float(),
                scale=alpha / max(a.shape[0], 1),
                is_embedding=name in embeddings,
            )
            for name, (a, b) in pairs.items()
        }
    )
