"""Rules of PEFT 0.21 and transformers 5 (`PeftAdapterMixin.load_adapter`), tried by loading.

PEFT drops tensors that have no place without a word (`load_state_dict(strict=False)`), so that most
of what is wrong here gives other outputs and no message.
"""

import re
from collections.abc import Iterable, Iterator

from lora_cli.artifacts.inspection import Inspected, names_of
from lora_cli.artifacts.peft_methods import METHODS
from lora_cli.artifacts.peft_tensors import PREFIX
from lora_cli.artifacts.peft_values import TASK_HEADS
from lora_cli.artifacts.portability import PEFT, TRANSFORMERS, TRIED, Found, Rule, listed
from lora_cli.artifacts.portability_common import fused

_BOTH = (PEFT, TRANSFORMERS)
# Every peft_type of PEFT 0.21.
_KINDS = {
    *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT"),
    *("DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY"),
    *("LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF"),
    *("PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING"),
    *("RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS"),
    *("UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"),
}
# Those that `inject_adapter_in_model` refuses: prompts, and what layers share state in.
_NOT_INJECTED = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "FROD", "MULTITASK_PROMPT_TUNING"),
    *("PREFIX_TUNING", "PROMPT_TUNING", "PVERA", "P_TUNING", "SHADOW", "TINYLORA", "UNILORA"),
    *("VBLORA", "VERA"),
}
# Starts that PEFT computes again from the base when it loads: they change the base's weights.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq")
# A change of the layout, huggingface/peft#3165.
_EXPERTS_SINCE = (0, 19)
# Copies of what PEFT wraps, of which it reads none.
_WRAPPER = re.compile(r"\.(modules_to_save|original_module)\.")
# What PEFT takes out itself, with a warning.
_OTHER_FIELDS = {"runtime_config"}


def changes_base(adapter: Inspected) -> bool:
    """Whether PEFT gives the base other weights when it loads the adapter."""
    start = adapter.config.get("init_lora_weights")
    return isinstance(start, str) and start.lower().startswith(CHANGE_BASE)


def missing_features(adapter: Inspected, features: Iterable[str], *, fix: str) -> Iterator[Found]:
    """Report settings of PEFT's that a program has not, and starts that change the base."""
    found = [name for name in features if adapter.config.get(name)]
    found += ["init_lora_weights"] if changes_base(adapter) else []
    if found:
        yield Found(
            f"the base would be another than in training, or the method is not there: "
            f"{listed(found)}",
            fix,
        )


def _no_type(adapter: Inspected) -> Iterator[Found]:
    if not adapter.config_fault and not isinstance(adapter.config.get("peft_type"), str):
        yield Found('adapter_config.json has no "peft_type"', 'add "peft_type": "LORA"')


def _unknown_fields(adapter: Inspected) -> Iterator[Found]:
    method = METHODS.get(adapter.kind)
    if method is None:
        return
    known = {*method.read, *method.ignored, *method.default_only, *_OTHER_FIELDS}
    if unknown := sorted(set(adapter.config) - known):
        version = adapter.config.get("peft_version")
        yield Found(
            f"PEFT 0.21 drops fields that it does not know: {listed(unknown)}"
            + (f" (written by PEFT {version})" if isinstance(version, str) else ""),
            "update PEFT, or remove the field if it has no effect",
        )


def _prefix(adapter: Inspected) -> Iterator[Found]:
    names = [key.text for key in adapter.keys if not key.text.startswith(PREFIX)]
    if names and adapter.kind == "LORA":
        yield Found(
            f"PEFT drops what does not begin with {PREFIX}: {listed(names)}",
            f"put {PREFIX} before every name",
        )


def _untargeted(adapter: Inspected) -> Iterator[Found]:
    targets = adapter.config.get("target_modules")
    if adapter.kind != "LORA" or isinstance(targets, str) or fused(adapter):
        return
    lost = [name for name in adapter.pairs if not _is_targeted(adapter, name, names_of(targets))]
    if lost and targets is not None:
        yield Found(
            f"PEFT drops the updates of layers that the config does not select: {listed(lost)}",
            "name them in target_modules, and look at exclude_modules and layers_to_transform",
        )


def _is_targeted(adapter: Inspected, name: str, targets: tuple[str, ...]) -> bool:
    """Whether PEFT's lists select a path; its regular expressions are not tried."""

    def is_one_of(names: tuple[str, ...]) -> bool:
        return any(name == other or name.endswith(f".{other}") for other in names)

    # Of attention in one module, PEFT adapts the output projection along with it.
    if ".base_layer" in name:
        return True
    if is_one_of(names_of(adapter.config.get("exclude_modules"))):
        return False
    return name in targets or (is_one_of(targets) and _is_in_layers(adapter, name))


def _is_in_layers(adapter: Inspected, name: str) -> bool:
    layers = adapter.config.get("layers_to_transform")
    # The pattern of lists of layers is a regular expression.
    if layers is None or layers == [] or adapter.config.get("layers_pattern"):
        return True
    number = re.search(r"\.[^.]*\.(\d+)\.", name)
    wanted = layers if isinstance(layers, list) else [layers]
    return number is not None and int(number[1]) in wanted


def _ranks(adapter: Inspected) -> Iterator[Found]:
    if adapter.config_fault or adapter.kind != "LORA" or fused(adapter):
        return
    wrong = []
    for name, (A, _, _) in adapter.pairs.items():
        r = adapter.rank_of(name)
        if A is not None and A.shape and r is not None and A.shape[0] != r:
            wrong.append(f"{name} (rank {A.shape[0]}, the config says {r})")
    if wrong:
        yield Found(
            f"factors are of another rank than r and rank_pattern say: {listed(wrong)}",
            "write the rank of the factors into the config; the scale is lora_alpha / r",
        )


def _absent(adapter: Inspected) -> Iterator[Found]:
    paths = [key.module for key in adapter.whole if not _WRAPPER.search(key.module)]
    saved = adapter.saved
    heads = TASK_HEADS.get(str(adapter.config.get("task_type")), ())

    def is_there(name: str) -> bool:
        return any(f"{name}." in path for path in paths)

    # PEFT lists the usual names of a head together, of which a model has one.
    optional = heads if set(heads) <= set(saved) else ()
    absent = [name for name in saved if name not in optional and not is_there(name)]
    if adapter.base is not None:
        absent = [n for n in absent if any(path.endswith(n) for path in adapter.base.modules)]
    if heads and not any(map(is_there, heads)) and not absent and adapter.tensors:
        absent = [" or ".join(heads)]
    if absent:
        yield Found(
            f"modules that are to be trained whole are not in the file: {listed(absent)}; PEFT "
            "stops, transformers leaves them as the base has them",
            "save them with the adapter: without them a new head is random; set task_type to null "
            "if there is none",
        )


def _lost_magnitudes(adapter: Inspected) -> Iterator[Found]:
    lost = [name for name in adapter.named("magnitude") if not name.endswith(".weight")]
    if lost:
        yield Found(
            f"load_adapter of transformers 5 drops DoRA's magnitudes as PEFT names them: "
            f"{listed(lost)}",
            "load it with peft.PeftModel, merge it, or add .weight to these names, which both read",
        )


def _no_magnitudes(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind != "LORA" or not adapter.pairs:
        return
    has, wants = bool(adapter.named("magnitude")), bool(adapter.config.get("use_dora"))
    if has != wants:
        yield Found(
            f'"use_dora" is {str(wants).lower()}, and magnitudes are '
            f"{'in the file' if has else 'not in the file'}",
            f'"use_dora": {str(has).lower()}, unless tensors were lost',
        )


def _recomputed(adapter: Inspected) -> Iterator[Found]:
    if changes_base(adapter):
        yield Found(
            f'"init_lora_weights" is {adapter.config["init_lora_weights"]!r}: PEFT computes that '
            "start again from the base each time, and the adapter means something only if it comes "
            "out the same",
            "convert it with PEFT's path_initial_model_for_weight_conversion, or merge it",
        )


def _old_experts(adapter: Inspected) -> Iterator[Found]:
    version = adapter.config.get("peft_version")
    found = re.match(r"(\d+)\.(\d+)", version if isinstance(version, str) else "0.0")
    if fused(adapter) and (found is None or (int(found[1]), int(found[2])) < _EXPERTS_SINCE):
        yield Found(
            "updates of fused experts written before PEFT 0.19 have another layout, and "
            f"peft_version is {version!r}",
            "merge the adapter with the version of PEFT that wrote it",
        )


def _attention(adapter: Inspected) -> Iterator[Found]:
    ending = ".base_layer.out_proj"
    if names := [name for name in adapter.pairs if name.endswith(ending)]:
        yield Found(
            f"PEFT 0.21 adds the update of the output projection twice in {listed(names)}",
            "keep to PEFT 0.21 for this adapter, or merge it",
        )


def _unknown_kind(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind not in _KINDS:
        yield Found(
            f"PEFT 0.21 has no peft_type {adapter.kind!r:.80}",
            "update PEFT, or take the program that wrote the adapter",
        )


def _not_injected(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind in _NOT_INJECTED:
        yield Found(
            f"load_adapter does not take {adapter.kind}", "load it with peft.PeftModel, or merge it"
        )


RULES = (
    Rule("config.no-type", _BOTH, "error", TRIED, _no_type),
    Rule("config.unknown-field", _BOTH, "warning", "peft/config.py 0.21.2", _unknown_fields),
    Rule("key.prefix", (PEFT,), "error", TRIED, _prefix),
    Rule("key.untargeted", _BOTH, "error", TRIED, _untargeted),
    Rule("shape.rank", _BOTH, "error", TRIED, _ranks),
    Rule("head.absent", _BOTH, "error", TRIED, _absent),
    Rule("dora.magnitude", _BOTH, "error", TRIED, _no_magnitudes),
    Rule("transformers.dora", (TRANSFORMERS,), "error", TRIED, _lost_magnitudes),
    Rule("transformers.kind", (TRANSFORMERS,), "error", TRIED, _not_injected),
    Rule("config.unknown-type", _BOTH, "error", TRIED, _unknown_kind),
    Rule("peft.start", _BOTH, "warning", TRIED, _recomputed),
    Rule("peft.experts", _BOTH, "error", "huggingface/peft#3165", _old_experts),
    Rule("peft.attention", (PEFT,), "warning", "huggingface/peft#3774", _attention),
)
