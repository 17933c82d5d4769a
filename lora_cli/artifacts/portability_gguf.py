"""Rules of llama.cpp's `convert_lora_to_gguf.py`, read at commit 0b03adaa and not run.

llama.cpp scales by alpha over the rank of the stored factor (`get_scale` in `src/llama-adapter.h`,
commit d66c5cd4). Whether the converter has the architecture of the base is not told.
"""

import math
from collections.abc import Iterator

from lora_cli.artifacts.inspection import Inspected, is_number
from lora_cli.artifacts.portability import GGUF, Found, Rule, listed
from lora_cli.artifacts.portability_common import fused
from lora_cli.artifacts.portability_peft import missing_features

_FEATURES = ("layer_replication", "use_bdlora", "use_qalora")
# Its converter passes over the first, and takes norms as they are.
_TAKEN = (".base_layer.weight", "_layernorm", ".norm")
_MERGE = "merge the adapter and convert the merged model: lora-cli merge"


def _kind(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind != "LORA":
        yield Found(f"only LoRA is converted, and peft_type is {adapter.kind}", _MERGE)


def _no_alpha(adapter: Inspected) -> Iterator[Found]:
    if "lora_alpha" not in adapter.config and not adapter.config_fault and adapter.kind == "LORA":
        yield Found(
            "adapter_config.json must name lora_alpha, for which the converter has no default",
            'write "lora_alpha": 8, which is PEFT\'s default',
        )


def _rslora(adapter: Inspected) -> Iterator[Found]:
    alpha, ranks = adapter.config.get("lora_alpha", 8), _ranks(adapter)
    if not adapter.config.get("use_rslora") or ranks == {1}:
        return
    fix = _MERGE
    if len(ranks) == 1 and is_number(alpha) and not adapter.config.get("alpha_pattern"):
        same = float(alpha) * math.sqrt(next(iter(ranks)))
        fix = f'in a copy write "use_rslora": false and "lora_alpha": {same:g}, which is the same'
    yield Found(
        "rsLoRA is not read: llama.cpp would scale by alpha / r instead of alpha / sqrt(r)", fix
    )


def _ranks(adapter: Inspected) -> set[int]:
    pairs = adapter.pairs.values()
    return {pair.A.shape[0] for pair in pairs if pair.A is not None and pair.A.shape}


def _alphas(adapter: Inspected) -> Iterator[Found]:
    usual = adapter.config.get("lora_alpha", 8)
    alphas = {name: adapter.alpha_of(name) for name in adapter.pairs}
    other = [name for name, alpha in alphas.items() if alpha is not None and alpha != usual]
    if other:
        yield Found(
            f"alpha_pattern is not read: lora_alpha would be {usual} for {listed(other)} too",
            _MERGE,
        )


def _dora(adapter: Inspected) -> Iterator[Found]:
    if adapter.config.get("use_dora") or adapter.named("magnitude"):
        yield Found("the converter stops at DoRA's magnitudes", _MERGE)


def _whole(adapter: Inspected) -> Iterator[Found]:
    leaves = ("lora_bias", "tokens", "")
    names = [
        key.text
        for key in adapter.keys
        if key.leaf in leaves and not any(part in key.text for part in _TAKEN)
    ]
    if names and adapter.kind == "LORA":
        yield Found(f"the converter stops at tensors that are no factors: {listed(names)}", _MERGE)


def _features(adapter: Inspected) -> Iterator[Found]:
    yield from missing_features(adapter, _FEATURES, fix=_MERGE)


def _experts(adapter: Inspected) -> Iterator[Found]:
    if names := fused(adapter):
        yield Found(f"updates of fused experts have no name there: {listed(names)}", _MERGE)


def _convolutions(adapter: Inspected) -> Iterator[Found]:
    names = [name for name, pair in adapter.pairs.items() if pair.A and len(pair.A.shape) > 2]
    if names:
        yield Found(f"the converter takes matrices only: {listed(names)}", _MERGE)


def _tied_head(adapter: Inspected) -> Iterator[Found]:
    if adapter.base is None:
        return
    names = [name for name in adapter.pairs if name == "lm_head" and name in adapter.base.tied]
    if names:
        yield Found(
            "lm_head is adapted, and in this base it is the embedding, which the converter leaves "
            "out: it stops",
            "merge the adapter, which unties the two, and convert the merged model",
        )


_SCRIPT = "convert_lora_to_gguf.py"
_TENSORS = f"{_SCRIPT} get_tensors"
_SCALE = f"{_SCRIPT} set_gguf_parameters; src/llama-adapter.h get_scale"
RULES = (
    Rule("llama.cpp.kind", (GGUF,), "error", _TENSORS, _kind),
    Rule("llama.cpp.alpha", (GGUF,), "error", _SCRIPT, _no_alpha),
    Rule("llama.cpp.rslora", (GGUF,), "error", _SCALE, _rslora),
    Rule("llama.cpp.alpha-pattern", (GGUF,), "error", _SCALE, _alphas),
    Rule("llama.cpp.dora", (GGUF,), "error", _TENSORS, _dora),
    Rule("llama.cpp.whole", (GGUF,), "error", _TENSORS, _whole),
    Rule("llama.cpp.features", (GGUF,), "error", _SCRIPT, _features),
    Rule("llama.cpp.experts", (GGUF,), "error", _TENSORS, _experts),
    Rule("llama.cpp.layers", (GGUF,), "error", f"{_SCRIPT} LoraTorchTensor", _convolutions),
    Rule("llama.cpp.tied-head", (GGUF,), "error", f"{_SCRIPT} modify_tensors", _tied_head),
)
