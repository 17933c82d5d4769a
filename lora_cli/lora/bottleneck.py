"""Bottleneck adapters: two small layers with a nonlinearity between, put into every block.

``houlsby`` puts one behind the attention and one behind the feed-forward part of a block (Houlsby
et al. 2019, section 2.1, arXiv:1902.00751), ``pfeiffer`` behind the latter only (Pfeiffer et al.
2020, "AdapterFusion", section 3.4, arXiv:2005.00247), at about half the parameters. Both come right
behind the projection back to the width of the model, before the skip connection.

The function between the small layers is not linear, so neither can be added into a weight.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from lora_cli.errors import Problem, UserError
from lora_cli.lora.blocks import block_of
from lora_cli.lora.kinds import is_linear, linear_sizes

_BERT = (("attention.output.dense",), ("output.dense",))
_LLAMA = (("self_attn.o_proj",), ("mlp.down_proj",))
_T5 = (
    ("layer.*.SelfAttention.o", "layer.*.EncDecAttention.o"),
    ("layer.*.DenseReluDense.wo",),
)
_BART = (("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",))
_VIT = (("attention.o_proj",), ("mlp.fc2",))
_NEOX = (("attention.dense",), ("mlp.dense_4h_to_h",))
_BLOOM = (("self_attention.dense",), ("mlp.dense_4h_to_h",))
_WAV2VEC2 = (("attention.out_proj",), ("feed_forward.output_dense",))

# The last projections of attention and of feed-forward, as globs over the path within a block.
# A family is added as one row; the tests build each and check that every block has both.
SUBLAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "albert": (("albert_layers.*.attention.dense",), ("albert_layers.*.ffn_output",)),
    "audio-spectrogram-transformer": _VIT,
    "bart": _BART,
    "beit": _VIT,
    "bert": _BERT,
    "big_bird": _BERT,
    "bloom": _BLOOM,
    "camembert": _BERT,
    "cohere": _LLAMA,
    "data2vec-text": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "deit": _VIT,
    "dinov2": _VIT,
    "distilbert": (("attention.out_lin",), ("ffn.lin2",)),
    "electra": _BERT,
    "ernie": _BERT,
    "eurobert": _LLAMA,
    "falcon": _BLOOM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": (("attn.c_proj",), ("mlp.c_proj",)),
    "gpt_neo": (("attn.attention.out_proj",), ("mlp.c_proj",)),
    "gpt_neox": _NEOX,
    "gptj": (("attn.out_proj",), ("mlp.fc_out",)),
    "granite": _LLAMA,
    "hubert": _WAV2VEC2,
    "layoutlm": _BERT,
    "llama": _LLAMA,
    "m2m_100": _BART,
    "marian": _BART,
    "mbart": _BART,
    "megatron-bert": _BERT,
    "mistral": _LLAMA,
    "modernbert": (("attn.Wo",), ("mlp.Wo",)),
    "mpnet": (("attention.attn.o",), ("output.dense",)),
    "mt5": _T5,
    "nomic_bert": _LLAMA,
    "olmo2": _LLAMA,
    "opt": _BART,
    "pegasus": _BART,
    "phi": (("self_attn.dense",), ("mlp.fc2",)),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "rembert": _BERT,
    "roberta": _BERT,
    "roformer": _BERT,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": (("self_attn.o_proj",), ("mlp.c_proj",)),
    "swin": (("blocks.*.attention.o_proj",), ("blocks.*.mlp.fc2",)),
    "t5": _T5,
    "umt5": _T5,
    "vit": _VIT,
    "wav2vec2": _WAV2VEC2,
    "whisper": _BART,
    "xlm-roberta": _BERT,
}


class BottleneckLayer(nn.Module):
    r"""A frozen linear layer with a trained bottleneck behind it.

    Computes, for an input ``x`` of shape ``(..., in_features)``::

        h = base(x)
        y = h + up(gelu(down(h)))

    and returns ``y`` of shape ``(..., out_features)``, in the dtype of ``h``; the sum is taken in
    float32. ``up`` starts at zero, so that a new layer returns exactly ``base(x)``; ``down`` starts
    as `nn.Linear` does, from torch's global generator. The papers leave the nonlinearity open;
    GELU is what the first authors' code uses, and what most of these models have inside.

    ===============  ====================  =======  ========
    name             shape                 trained  dtype
    ===============  ====================  =======  ========
    ``base_layer``   as given              no       as given
    ``down.weight``  (size, out_features)  yes      float32
    ``down.bias``    (size,)               yes      float32
    ``up.weight``    (out_features, size)  yes      float32
    ``up.bias``      (out_features,)       yes      float32
    ===============  ====================  =======  ========

    Args:
        base: A linear layer of any kind. It is kept, not copied, and frozen in place.
        size: Width of the bottleneck.

    Raises:
        ValueError: If `size` is below 1.
    """

    base_layer: Any  # of many kinds, whose attributes differ

    def __init__(self, base: nn.Module, *, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, but is {size}.")
        _, width = linear_sizes(base)
        device = next(base.parameters()).device
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Linear(width, size, device=device, dtype=torch.float32)
        self.up = nn.Linear(size, width, device=device, dtype=torch.float32)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.train(base.training)

    # T5 looks at the dtype of the weight of `wo` before it calls it.
    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``h + up(gelu(down(h)))`` with ``h = base(x)``."""
        h: torch.Tensor = self.base_layer(x)
        update: torch.Tensor = self.up(functional.gelu(self.down(h.to(self.down.weight.dtype))))
        return (h + update).to(h.dtype)


def put_bottlenecks(
    model: nn.Module, *, size: int, placement: Literal["houlsby", "pfeiffer"]
) -> tuple[str, ...]:
    """Put a bottleneck behind the parts of every block, in place, and return where.

    Args:
        model: A model of transformers.
        size: Width of the bottleneck.
        placement: Behind attention and feed-forward part, or behind the latter only.

    Returns:
        Paths of the layers that got one, in module order.

    Raises:
        UserError: If the family of the model is not in the table; nothing is changed then.
    """
    names = bottleneck_names(model, placement)
    layers = {name: BottleneckLayer(model.get_submodule(name), size=size) for name in names}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return names


def bottleneck_names(
    model: nn.Module, placement: Literal["houlsby", "pfeiffer"]
) -> tuple[str, ...]:
    """Return the paths of the layers that get a bottleneck; see `put_bottlenecks`."""
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    attention, feed_forward = SUBLAYERS.get(family, ((), ()))
    patterns = attention + feed_forward if placement == "houlsby" else feed_forward
    names = tuple(
        name
        for name, module in model.named_modules()
        if is_linear(module) and _is_among(name, patterns)
    )
    if not names:
        raise UserError(
            Problem(
                id="strategy.unknown-family",
                message="`strategy=adapter` must know the parts of a block, but does not for "
                f'the model family "{family}".',
                key="strategy",
                allowed=", ".join(SUBLAYERS),
                fix="strategy=lora, which works with any model",
            )
        )
    return names


def _is_among(name: str, patterns: Iterable[str]) -> bool:
    block = block_of(name)
    if block is None:
        return False
    within = name.removeprefix(f"{block.stack}.{block.index}.")
    return any(fnmatchcase(within, pattern) for pattern in patterns)
