"""Rules that compare an adapter with the layers of its base, and the layers themselves."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lora_cli.artifacts.inspection import BaseShapes, Inspected
from lora_cli.artifacts.portability import (
    EVERY,
    GGUF,
    PEFT,
    TRANSFORMERS,
    TRIED,
    VLLM,
    Found,
    Rule,
    listed,
)
from lora_cli.artifacts.portability_common import fused
from lora_cli.lora.kinds import is_conv1d, is_linear

_READ = f"{TRIED}; vllm/lora/lora_model.py; convert_lora_to_gguf.py"


def describe_base(model: Any) -> BaseShapes:
    """Return what of a model is compared; it may be one without numbers."""
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            sizes[name] = (module.num_embeddings, module.embedding_dim)
        elif is_linear(module):
            rows, columns = module.weight.shape
            sizes[name] = (rows, columns) if is_conv1d(module) else (columns, rows)
    weights = model.named_parameters(remove_duplicate=False)
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules() if name}
    return BaseShapes(
        # Of a body that was built alone, paths may lack the name that it has within a whole model.
        modules=frozenset(modules | ({prefix + name for name in modules})),
        sizes=sizes | {prefix + name: size for name, size in sizes.items()},
        weights={name: tuple(tensor.shape) for name, tensor in weights},
        tied=_tied(model),
        prefix=prefix,
    )


def _tied(model: Any) -> frozenset[str]:
    config = model.config.get_text_config()
    if not getattr(config, "tie_word_embeddings", False):
        return frozenset()
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if None in ends:
        return frozenset()
    return frozenset(name for name, module in model.named_modules() if module in ends)


def _no_layer(adapter: Inspected) -> Iterator[Found]:
    yield from _lost_layers(adapter, prefixes=("",))


def _no_layer_by_its_end(adapter: Inspected) -> Iterator[Found]:
    """Paths within the body do as well: transformers puts the rest before them."""
    yield from _lost_layers(adapter, prefixes=("", adapter.base.prefix if adapter.base else ""))


def _lost_layers(adapter: Inspected, prefixes: tuple[str, ...]) -> Iterator[Found]:
    base = adapter.base
    if base is None:
        return
    layers = [name for name in adapter.pairs if not _is_renamed(name)]
    lost = [n for n in layers if not any(prefix + n in base.modules for prefix in prefixes)]
    if lost:
        yield Found(
            f"{len(lost)} of {len(layers)} adapted layers are not in the base: {listed(lost)}",
            "name the base that the adapter was trained on, or rename the tensors",
        )


def _is_renamed(name: str) -> bool:
    """Whether a layer may have another name in the file than in the model."""
    return ".base_layer" in name or ".experts." in f"{name}."


def _shapes(adapter: Inspected) -> Iterator[Found]:
    base = adapter.base
    if base is None or adapter.kind != "LORA" or fused(adapter):
        return
    wrong = []
    for name, (A, B, _) in adapter.pairs.items():
        size = base.sizes.get(name)
        if size is None or A is None or B is None or len(A.shape) != 2 or len(B.shape) != 2:
            continue
        if (A.shape[1], B.shape[0]) != size:
            wrong.append(
                f"{name} ({A.shape[1]} to {B.shape[0]}, in the base {size[0]} to {size[1]})"
            )
    if wrong:
        yield Found(
            f"factors are of other sizes than the layers: {listed(wrong)}",
            "name the base that the adapter was trained on; with added tokens, resize its "
            "embeddings first",
        )


def _vocabulary(adapter: Inspected) -> Iterator[Found]:
    if adapter.base is None:
        return
    for key in adapter.whole:
        name = key.module.replace(".base_layer", "")
        found, own = adapter.tensors[key.text].shape, adapter.base.weights.get(name)
        if own is not None and found != own and len(found) == len(own):
            yield Found(
                f"{name} is {found} in the adapter and {own} in the base",
                f"call resize_token_embeddings({found[0]}) of the base first"
                if len(own) > 1 and found[1:] == own[1:]
                else "name the base, with the head, that the adapter was trained on",
            )


def _tied_layers(adapter: Inspected) -> Iterator[Found]:
    base = adapter.base
    if base is None or not base.tied:
        return
    adapted = {*adapter.pairs, *(key.module.rpartition(".")[0] for key in adapter.whole)}
    if names := sorted(adapted & base.tied):
        yield Found(
            f"{listed(names)} is adapted, and shares its weight with {listed(base.tied - adapted)}"
            if base.tied - adapted
            else f"{listed(names)} share one weight in the base",
            "merge with lora-cli merge, which unties them where they come to differ",
        )


def _saved_nothing(adapter: Inspected) -> Iterator[Found]:
    if adapter.base is None:
        return
    lost = [
        name
        for name in adapter.saved
        if name not in ("classifier", "score")
        and not any(path.endswith(name) for path in adapter.base.modules)
    ]
    if lost:
        yield Found(
            f"modules_to_save names what the base does not have: {listed(lost)}",
            "take it out of the config",
        )


RULES = (
    Rule("base.layers", (PEFT, VLLM), "error", _READ, _no_layer),
    Rule("base.layers-by-end", (TRANSFORMERS, GGUF), "error", _READ, _no_layer_by_its_end),
    Rule("base.sizes", EVERY, "error", _READ, _shapes),
    Rule("base.resized", (PEFT, TRANSFORMERS), "error", TRIED, _vocabulary),
    Rule("base.tied", (PEFT, TRANSFORMERS, VLLM, GGUF), "warning", "peft#2018", _tied_layers),
    Rule("base.saved", (PEFT, TRANSFORMERS), "warning", TRIED, _saved_nothing),
)
