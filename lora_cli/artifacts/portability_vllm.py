"""Rules of vLLM, read and not run.

Read were `vllm/lora/peft_helper.py` at commit e745baff and after vllm-project/vllm#53555 (August
2026, later than 0.26.0), which takes heads and patterns, `lora_model.py` at 0306474e,
`vllm/config/lora.py` at 01230b40, and `lora_weights.py` and `utils.py` of that time. Whether vLLM
has a model at all, and with LoRA, is not told.
"""

from collections.abc import Iterator

from lora_cli.artifacts.inspection import Inspected, Key
from lora_cli.artifacts.portability import VLLM, Found, Rule, listed
from lora_cli.artifacts.portability_common import fused, whole_modules
from lora_cli.artifacts.portability_peft import missing_features

# `MaxLoRARanks` of vllm/config/lora.py, and the default of `max_lora_rank`.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16
_HEADS = ("classifier", "score")
# Dropped without a word at e745baff, refused after #53555.
_FEATURES = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
# `is_base_embedding_weights` passes over these.
_PASSED_OVER = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_MERGE = "merge the adapter and serve the merged model: lora-cli merge"


def _kind(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind != "LORA":
        yield Found(f"only LoRA is read, and peft_type is {adapter.kind}", _MERGE)


def _required(adapter: Inspected) -> Iterator[Found]:
    needed = ("r", "lora_alpha", "target_modules")
    absent = [name for name in needed if name not in adapter.config]
    if absent and not adapter.config_fault and adapter.kind == "LORA":
        yield Found(
            f"adapter_config.json must name {listed(absent)}, for which vLLM takes no default",
            "write them into the config: PEFT's defaults are r 8 and lora_alpha 8",
        )


def largest_rank(adapter: Inspected) -> int:
    """Return the largest rank that the config or a factor has."""
    ranks = [pair.A.shape[0] for pair in adapter.pairs.values() if pair.A and pair.A.shape]
    r = adapter.config.get("r")
    return max([*ranks, r if isinstance(r, int) else 0], default=0)


def _rank_too_large(adapter: Inspected) -> Iterator[Found]:
    r = largest_rank(adapter)
    if r > MAX_RANKS[-1] and not fused(adapter):
        yield Found(
            f"the rank is {r}, and the largest that vLLM can be started for is {MAX_RANKS[-1]}",
            _MERGE,
        )


def _rank_to_ask_for(adapter: Inspected) -> Iterator[Found]:
    r = largest_rank(adapter)
    if _DEFAULT_RANK < r <= MAX_RANKS[-1] and not fused(adapter):
        wanted = next(size for size in MAX_RANKS if size >= r)
        yield Found(
            f"the rank is {r}, and vLLM loads up to {_DEFAULT_RANK} unless it is told",
            f"start vLLM with --max-lora-rank {wanted}",
        )


def _has_whole(adapter: Inspected) -> bool:
    return adapter.kind == "LORA" and bool(adapter.saved or _refused(adapter))


def _heads_alone(adapter: Inspected) -> bool:
    return all(name in _HEADS for name in adapter.saved) and all(
        key.module.rpartition(".")[0].rpartition(".")[2] in _HEADS for key in _refused(adapter)
    )


def _refused(adapter: Inspected) -> list[Key]:
    return [key for key in adapter.whole if not key.text.endswith(_PASSED_OVER)]


def _whole(adapter: Inspected) -> Iterator[Found]:
    if _has_whole(adapter) and not _heads_alone(adapter):
        names = listed(whole_modules(adapter))
        yield Found(f"modules or tensors that were trained whole are refused: {names}", _MERGE)


def _head(adapter: Inspected) -> Iterator[Found]:
    if _has_whole(adapter) and _heads_alone(adapter):
        names = listed(whole_modules(adapter))
        yield Found(
            f"a head of its own is refused before #53555, so up to 0.26.0: {names}",
            "take a vLLM with vllm-project/vllm#53555, or merge the adapter",
        )


def _dora(adapter: Inspected) -> Iterator[Found]:
    if adapter.config.get("use_dora") or adapter.named("magnitude"):
        yield Found("DoRA is refused", _MERGE)


def _bias(adapter: Inspected) -> Iterator[Found]:
    trained = adapter.config.get("bias", "none") != "none"
    if trained or adapter.config.get("lora_bias") or adapter.named("lora_bias"):
        yield Found("trained biases are refused (bias, lora_bias)", _MERGE)


def _tokens(adapter: Inspected) -> Iterator[Found]:
    if names := adapter.named("tokens"):
        yield Found(f"rows of trained tokens are refused: {listed(names)}", _MERGE)


def _patterns(adapter: Inspected) -> Iterator[Found]:
    r, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r <= 0:
        return
    usual = alpha / (r**0.5 if adapter.config.get("use_rslora") else r)
    scales = {name: adapter.scale_of(name) for name in adapter.pairs}
    other = [name for name, scale in scales.items() if scale is not None and scale != usual]
    if other:
        yield Found(
            f"older versions do not read rank_pattern and alpha_pattern, and would scale by "
            f"{usual:g} what has another scale: {listed(other)}",
            "take a vLLM whose PEFTHelper reads rank_pattern, or merge the adapter",
        )


def _features(adapter: Inspected) -> Iterator[Found]:
    yield from missing_features(adapter, _FEATURES, fix=_MERGE)


def _experts(adapter: Inspected) -> Iterator[Found]:
    if names := fused(adapter):
        yield Found(
            f"fused experts are read for the models whose mixture layers take LoRA: "
            f"{listed(names)}",
            "try it, and compare an answer with the merged model",
        )


def _embeddings(adapter: Inspected) -> Iterator[Found]:
    names = [
        name
        for name, pair in adapter.pairs.items()
        if pair.is_embedding or name.rpartition(".")[2] in _EMBEDDINGS
    ]
    if names:
        yield Found(
            f"updates of embeddings are read for models that list them as embedding_modules, and "
            f"of a vocabulary of the same size: {listed(names)}",
            "try it, or merge the adapter",
        )


def _convolutions(adapter: Inspected) -> Iterator[Found]:
    names = [name for name, pair in adapter.pairs.items() if pair.A and len(pair.A.shape) > 2]
    if names:
        yield Found(f"only linear layers and embeddings are read: {listed(names)}", _MERGE)


_CHECKS = "vllm/lora/peft_helper.py validate_legal"
_NAMES = "vllm/lora/lora_model.py, vllm/lora/utils.py parse_fine_tuned_lora_name"
_SIZES = "vllm/config/lora.py MaxLoRARanks; vllm/lora/peft_helper.py validate_legal"
_PULL = f"{_CHECKS}; vllm-project/vllm#53555"
RULES = (
    Rule("vllm.kind", (VLLM,), "error", _NAMES, _kind),
    Rule("vllm.required", (VLLM,), "error", "vllm/lora/peft_helper.py from_dict", _required),
    Rule("vllm.rank", (VLLM,), "error", _SIZES, _rank_too_large),
    Rule("vllm.max-lora-rank", (VLLM,), "warning", _SIZES, _rank_to_ask_for),
    Rule("vllm.whole", (VLLM,), "error", _PULL, _whole),
    Rule("vllm.head", (VLLM,), "error", _PULL, _head),
    Rule("vllm.dora", (VLLM,), "error", _CHECKS, _dora),
    Rule("vllm.bias", (VLLM,), "error", _CHECKS, _bias),
    Rule("vllm.tokens", (VLLM,), "error", _NAMES, _tokens),
    Rule("vllm.patterns", (VLLM,), "error", "vllm/lora/lora_weights.py from_config", _patterns),
    Rule("vllm.features", (VLLM,), "error", _CHECKS, _features),
    Rule("vllm.experts", (VLLM,), "warning", _NAMES, _experts),
    Rule("vllm.embeddings", (VLLM,), "warning", "vllm/lora/utils.py", _embeddings),
    Rule("vllm.layers", (VLLM,), "error", "vllm/lora/utils.py", _convolutions),
)
