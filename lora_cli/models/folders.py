"""Whether the folder of a base model holds data only, and all of it. Does not import torch."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.errors import Problem
from lora_cli.models.weights import INDEX, WEIGHTS, read_header, weight_files

KEY = "model.path"

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
# Keys by which a folder asks for code to be run, or for weights that are not plain tensors.
_CODE_KEYS = re.compile(r"auto_map|trust_remote_code|\w*implementation\w*internal\w*")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
)
PROCESSOR_FILES = {
    "tokenizer": _TOKENIZER_FILES,
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "feature extractor": ("preprocessor_config.json", "processor_config.json"),
    "image and text processor": ("preprocessor_config.json", "processor_config.json"),
    "image chat processor": ("processor_config.json", "preprocessor_config.json"),
}
"""Of each kind of processor the files of which one must be there."""
PROCESSOR_PARTS = {"speech processor": ("feature extractor", "tokenizer")}
"""Of what kinds a combined processor is made."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def _problem(kind: str, rule: str, finding: str, *, folder: Path, fix: str) -> Problem:
    message = f"`{KEY}` must name a folder {rule}, but {finding}."
    return Problem(id=f"model.{kind}", message=message, key=KEY, where=str(folder), fix=fix)


def check_folder(folder: Path, *, processor: str | None) -> Iterator[Problem]:
    """Yield everything that keeps a folder from being a base model.

    Args:
        folder: Where it is.
        processor: What must be there besides the model, one of `PROCESSOR_FILES` or
            `PROCESSOR_PARTS`.
    """
    problems = list(check_configs(folder))
    yield from problems
    if any(problem.id == "model.is-adapter" for problem in problems):
        return
    yield from _check_weights(folder)
    for kind in () if processor is None else _parts(processor):
        if has_processor(folder, kind):
            continue
        article = "an" if kind[0] in "aeiou" else "a"
        rule, finding = f"with {article} {kind}", f"no {kind} file is there"
        names = PROCESSOR_FILES[kind][0]
        if kind == "tokenizer":
            names += " and tokenizer_config.json"
        fix = f"copy {names} of the model into the folder"
        yield _problem(f"no-{kind.replace(' ', '-')}", rule, finding, folder=folder, fix=fix)


def has_processor(folder: Path, processor: str) -> bool:
    """Whether files of such a processor are there that transformers may read."""
    return all(
        any((folder / name).is_file() for name in PROCESSOR_FILES[kind])
        for kind in _parts(processor)
    )


def _parts(processor: str) -> tuple[str, ...]:
    return PROCESSOR_PARTS.get(processor, (processor,))


def check_configs(folder: Path) -> Iterator[Problem]:
    """Yield everything that keeps the settings in a folder from being those of a base model."""
    if (folder / "adapter_config.json").exists():
        yield _problem(
            "is-adapter",
            "with a base model",
            "this one holds an adapter",
            folder=folder,
            fix=f"{KEY}=BASE; to use the adapter: lora-cli eval from={folder}",
        )
        return
    if not (folder / "config.json").is_file():
        rule, finding = "with a config.json", "there is none"
        fix = "name the folder that save_pretrained wrote"
        yield _problem("no-config", rule, finding, folder=folder, fix=fix)
    for name in _CONFIGS:
        if (folder / name).is_file():
            yield from _check_config(folder, name)


def _check_config(folder: Path, name: str) -> Iterator[Problem]:
    try:
        config = json.loads((folder / name).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        rule, finding = f"with a {name} in JSON", f"it cannot be read ({error})"
        yield _problem("bad-config", rule, finding, folder=folder, fix="download it again")
        return
    if not isinstance(config, dict):
        rule, finding = f"with an object in {name}", "another value is there"
        yield _problem("bad-config", rule, finding, folder=folder, fix="download it again")
        return
    keys = set(_iter_keys(config))
    code = sorted(key for key in keys if _CODE_KEYS.fullmatch(key))
    if code:
        rule = "that holds data only"
        finding = f"{name} asks to run code of its own ({', '.join(code)})"
        fix = "use a model whose architecture transformers has built in"
        yield _problem("asks-for-code", rule, finding, folder=folder, fix=fix)
    if "quantization_config" in keys:
        rule, finding = "with plain weights", f"{name} says that they are quantized"
        fix = "use the model as it was before quantization"
        yield _problem("quantized", rule, finding, folder=folder, fix=fix)


def _iter_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _iter_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_keys(item)


def _check_weights(folder: Path) -> Iterator[Problem]:
    rule = f"with weights in {WEIGHTS}"
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        finding, fix = "there are none", "download the weights as well"
        if pickles:
            finding = f"it holds {pickles[0]}, a format that can run code when it is read"
            fix = (
                "convert it where you trust it: AutoModel.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR) writes safetensors"
            )
        yield _problem("no-weights", rule, finding, folder=folder, fix=fix)
        return
    try:
        names = weight_files(folder)
    except (ValueError, RecursionError, OSError) as error:
        finding = f"{INDEX} cannot be used ({error})"
        yield _problem("bad-index", rule, finding, folder=folder, fix="download it again")
        return
    for name in names:
        if not (folder / name).is_file():
            finding = f"{name} is missing, which {INDEX} lists"
            yield _problem("missing-shard", rule, finding, folder=folder, fix=f"download {name}")
            continue
        try:
            read_header(folder / name)
        except (ValueError, RecursionError, OSError) as error:
            finding = f"{name} is damaged ({error})"
            fix = f"download {name} again"
            yield _problem("damaged-weights", rule, finding, folder=folder, fix=fix)
