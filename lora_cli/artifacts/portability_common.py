"""Rules about the files, names and values of an adapter that hold for several programs."""

import re
from collections.abc import Iterator

from lora_cli.artifacts.inspection import Inspected, is_number, names_of
from lora_cli.artifacts.peft_config import CONFIG_FILE
from lora_cli.artifacts.peft_tensors import WEIGHTS_FILE
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
from lora_cli.artifacts.tuned import TUNED_FILE

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_FLOATING = ("F64", "F32", "F16", "BF16")
_SAVE_AGAIN = "load it with peft where you trust it and call save_pretrained, which writes {0}"
_PATH = re.compile(r"[/~.]|[A-Za-z]:[\\/]|.*\\|[^/]*/[^/]*/")


def is_path(name: str) -> bool:
    """Whether the name of a base model is a path of one machine, and no id of the hub.

    >>> [is_path(x) for x in ("bert-base-uncased", "org/model", "/data/model", "a/b/c", "./model")]
    [False, False, True, True, True]
    """
    return _PATH.match(name) is not None


def _config(adapter: Inspected) -> Iterator[Found]:
    if TUNED_FILE in adapter.files and CONFIG_FILE not in adapter.files:
        yield Found(
            f"the folder holds {TUNED_FILE}, which lora-cli alone reads: what was trained is no "
            "low-rank update",
            "lora-cli merge writes a whole model, where the strategy allows it",
        )
    elif adapter.config_fault:
        yield Found(
            f"{CONFIG_FILE} cannot be read: {adapter.config_fault}", "copy the whole folder again"
        )


def _weights(adapter: Inspected) -> Iterator[Found]:
    lacks_all = not adapter.files.intersection((WEIGHTS_FILE, *_PICKLES, TUNED_FILE))
    if adapter.tensors_fault and (lacks_all or WEIGHTS_FILE in adapter.files):
        yield Found(adapter.tensors_fault, "copy the whole folder again")
    elif not adapter.tensors and WEIGHTS_FILE in adapter.files:
        yield Found(f"{WEIGHTS_FILE} holds no tensor", "save the adapter again")


def _pickled(adapter: Inspected) -> Iterator[Found]:
    pickles = sorted(adapter.files.intersection(_PICKLES))
    if pickles and WEIGHTS_FILE not in adapter.files:
        yield Found(
            f"the weights are in {pickles[0]}, a pickle, which can run code when it is opened; "
            "nothing in it was checked",
            _SAVE_AGAIN.format(WEIGHTS_FILE),
        )


def _beside(adapter: Inspected) -> Iterator[Found]:
    pickles = sorted(adapter.files.intersection(_PICKLES))
    if pickles and WEIGHTS_FILE in adapter.files:
        yield Found(
            f"{pickles[0]} lies beside {WEIGHTS_FILE}, which every program prefers; the two may "
            "differ",
            f"delete {pickles[0]}",
        )


def _values(adapter: Inspected) -> Iterator[Found]:
    config = adapter.config
    names = ("r", "lora_alpha") if adapter.kind == "LORA" else ()
    wrong = [name for name in names if name in config and not _is_positive(config[name])]
    if "r" in config and adapter.kind == "LORA" and not isinstance(config["r"], int):
        wrong = sorted({*wrong, "r"})
    for name in wrong:
        yield Found(
            f'"{name}" must be a positive number in {CONFIG_FILE}, but is {config[name]!r:.80}',
            f'write "{name}" as it was in training',
        )


def _is_positive(value: object) -> bool:
    return is_number(value) and 0 < float(str(value)) < float("inf")


def _not_finite(adapter: Inspected) -> Iterator[Found]:
    if adapter.not_finite:
        yield Found(
            f"NaN or infinity is in {listed(adapter.not_finite)}",
            "take an earlier checkpoint, and train with a smaller learning rate",
        )


def _not_floating(adapter: Inspected) -> Iterator[Found]:
    names = [f"{n} ({t.kind})" for n, t in adapter.tensors.items() if t.kind not in _FLOATING]
    if names:
        yield Found(
            f"tensors must be float64, float32, float16 or bfloat16, but are not: {listed(names)}",
            "save the adapter in float32, as PEFT does",
        )


def _dead(adapter: Inspected) -> Iterator[Found]:
    Bs = [pair.B for pair in adapter.pairs.values() if pair.B is not None]
    As = [pair.A for pair in adapter.pairs.values() if pair.A is not None and pair.is_embedding]
    if Bs and all(B.name in adapter.zero for B in Bs) and not As:
        yield Found(
            "every B is zero, so the updates change nothing: they were never trained, or lost",
            "save the adapter after training",
        )


def _stray(adapter: Inspected) -> Iterator[Found]:
    if adapter.kind == "LORA" and (names := adapter.named("stray")):
        yield Found(
            f"names that look like those of factors and are none: {listed(names)}",
            "call them MODULE.lora_A.weight and MODULE.lora_B.weight, those of an embedding "
            "MODULE.lora_embedding_A and MODULE.lora_embedding_B",
        )


def _adapter_name(adapter: Inspected) -> Iterator[Found]:
    names = [key.text for key in adapter.keys if key.adapter]
    if names:
        yield Found(
            f"the adapter's name is still in {listed(names)}",
            "take it out: .lora_A.NAME.weight must be .lora_A.weight",
        )


def _halves(adapter: Inspected) -> Iterator[Found]:
    halves = [name for name, pair in adapter.pairs.items() if pair.A is None or pair.B is None]
    if halves:
        yield Found(
            f"one of A and B is missing of {listed(halves)}",
            "copy the folder again, or save the adapter again",
        )


def _factors(adapter: Inspected) -> Iterator[Found]:
    names = []
    for name, (A, B, _) in adapter.pairs.items():
        if A is None or B is None or adapter.kind != "LORA":
            continue
        # In a convolution in groups, B is as long as the rank of one group.
        in_groups = len(B.shape) > 2 and A.shape[0] % max(B.shape[1], 1) == 0
        if len(A.shape) < 2 or len(B.shape) < 2 or (A.shape[0] != B.shape[1] and not in_groups):
            names.append(f"{name} ({A.shape} and {B.shape})")
    if names:
        yield Found(
            f"A must be (r, inputs) and B (outputs, r), but is not for {listed(names)}",
            "save the adapter again; factors of other programs may be transposed",
        )


def _local_base(adapter: Inspected) -> Iterator[Found]:
    name = adapter.config.get("base_model_name_or_path")
    if isinstance(name, str) and is_path(name):
        yield Found(
            f'"base_model_name_or_path" is a path of one machine: {name}',
            "write the hub id of the base there (lora-cli train: model.hub_id=ORG/NAME)",
        )


def _no_base(adapter: Inspected) -> Iterator[Found]:
    if not adapter.config_fault and not adapter.config.get("base_model_name_or_path"):
        yield Found(
            '"base_model_name_or_path" is empty, so no program finds the base by itself',
            "write the hub id of the base there, or name the base to each program; "
            "convert_lora_to_gguf.py takes it as --base DIR",
        )


def _labels(adapter: Inspected) -> Iterator[Found]:
    for name, tensor in adapter.tensors.items():
        if not re.search(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$", name):
            continue
        if len(tensor.shape) != 2 or adapter.config.get("task_type") == "QUESTION_ANS":
            continue
        size, labels = tensor.shape[0], adapter.labels
        known = len(labels) == size
        shown = ", ".join(f"{i}: {label!r}" for i, label in enumerate(labels)) if known else "..."
        yield Found(
            f"the head has {size} outputs, of which PEFT's files hold neither number nor names",
            f"load the base with num_labels={size}, id2label={{{shown}}}",
        )
        return


def whole_modules(adapter: Inspected) -> tuple[str, ...]:
    """Return the modules that were trained whole, as the config or the file names them."""
    paths = {key.module.rpartition(".")[0] for key in adapter.whole if "base_layer" not in key.text}
    own = {path for path in paths if not any(path.endswith(name) for name in adapter.saved)}
    return tuple(sorted({*adapter.saved, *own} - {""}))


def fused(adapter: Inspected) -> tuple[str, ...]:
    """Return the fused weights of experts that the config names."""
    return names_of(adapter.config.get("target_parameters"))


_FILES = f"{TRIED}; vllm/lora/lora_model.py; convert_lora_to_gguf.py"
_ONLY_SOME = "transformers 5.23.0, by loading; vllm/lora/utils.py parse_fine_tuned_lora_name; "
RULES = (
    Rule("config.unreadable", EVERY, "error", _FILES, _config),
    Rule("config.value", EVERY, "error", _FILES, _values),
    Rule("file.weights", EVERY, "error", _FILES, _weights),
    Rule("file.pickle", (PEFT, VLLM, GGUF), "warning", _FILES, _pickled),
    Rule("file.no-safetensors", (TRANSFORMERS,), "error", TRIED, _pickled),
    Rule("file.second", EVERY, "warning", _FILES, _beside),
    Rule("value.not-finite", EVERY, "error", TRIED, _not_finite),
    Rule("value.kind", EVERY, "error", TRIED, _not_floating),
    Rule("value.zero", EVERY, "warning", TRIED, _dead),
    Rule("key.stray", EVERY, "error", _FILES, _stray),
    Rule(
        "key.adapter-name",
        (TRANSFORMERS, VLLM, GGUF),
        "error",
        f"{_ONLY_SOME}convert_lora_to_gguf.py get_tensors",
        _adapter_name,
    ),
    Rule("key.half", EVERY, "error", _FILES, _halves),
    Rule("shape.factors", EVERY, "error", _FILES, _factors),
    Rule("base.local", (PEFT, TRANSFORMERS, GGUF), "warning", _FILES, _local_base),
    Rule("base.unnamed", (PEFT, TRANSFORMERS, GGUF), "warning", _FILES, _no_base),
    Rule("head.labels", (PEFT, TRANSFORMERS), "warning", TRIED, _labels),
)
