"""Base models and tokenizers, loaded from a checked folder without network or foreign code."""

import copy
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging as chatter

from lora_cli.errors import Problem, UserError
from lora_cli.models.folders import KEY
from lora_cli.models.heads import head_names, inner_heads
from lora_cli.models.sources import ModelSource

# What transformers raises for folders that it cannot make sense of.
LOAD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, ImportError)

# A layer has a number in its name, an embedding says so; a pooler is neither.
LAYER_OR_EMBEDDING = re.compile(r"\.\d+\.|embed")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A pretrained model, in evaluation mode.

    Attributes:
        model: The model with the task's head.
        new_keys: Names of parameters that the checkpoint does not have, or has in another
            shape, sorted: they start from random values and must be trained and saved.
        notes: What the user is to be told of it, in sentences.
    """

    model: Any
    new_keys: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of a base model.

    A tokenizer without a padding token, as decoders have, pads with its end-of-sequence token;
    padded positions are then told by the attention mask, never by the token.

    Raises:
        UserError: If it cannot be loaded, or has no token to pad with.
    """
    try:
        with silence():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False, **_gguf(source)
            )
            if source.gguf is not None:
                _drop_strangers(tokenizer)
    # The Rust library raises a bare Exception for a tokenizer.json that it cannot read.
    except Exception as error:
        rule, finding = "with a tokenizer that transformers can load", first_line(error)
        raise UserError(_problem("bad-tokenizer", rule, finding, source)) from error
    let_pad(tokenizer, source)
    return tokenizer


def let_pad(tokenizer: Any, source: ModelSource) -> None:
    """Give a tokenizer that cannot pad its end-of-sequence token to do so, in place.

    Raises:
        UserError: If it has none.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            rule, finding = "whose tokenizer can pad", "it has no padding and no end token"
            raise UserError(_problem("no-padding", rule, finding, source))
        tokenizer.pad_token = tokenizer.eos_token
    # Rows are tokenized whole and cut afterwards, so its warning of long ones would be wrong.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True


def load_base(
    source: ModelSource, *, auto_class: str, options: Mapping[str, Any], dtype: str, seed: int
) -> BaseModel:
    """Load a base model with the head of a task.

    Random values of new parameters depend on `seed` alone; the caller's random state is kept.

    Args:
        source: What `resolve_model` found. The weights of a GGUF file become plain ones, in float32
            where `dtype` is "auto".
        auto_class: Name of a transformers Auto class, such as AutoModelForTokenClassification.
        options: Further arguments of `from_pretrained`, such as id2label.
        dtype: "float32", "bfloat16", "float16", or "auto" for the stored one.
        seed: Decides the start of new parameters.

    Raises:
        UserError: If transformers cannot load it, the weights are not those of the architecture
            or are not finite, or the labels contradict those of the checkpoint.
    """
    stored = load_config(source)
    factory = getattr(transformers, auto_class)
    # The progress bar for GGUF files cannot be switched off.
    hidden: AbstractContextManager[Any] = (
        nullcontext() if source.gguf is None else redirect_stderr(StringIO())
    )
    with silence(), hidden, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = factory.from_pretrained(
                source.folder,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                **(options if source.gguf is None else _from_gguf(source, stored, options)),
            )
        except LOAD_ERRORS as error:
            raise UserError(loading_problem(error, source, auto_class)) from error
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    new_keys = tuple(sorted(set(info["missing_keys"]) | mismatched))
    problems = [
        *_check_backbone(model, new_keys, mismatched, source),
        *_check_finite(model, source),
        *_check_labels(stored, options, model, new_keys),
    ]
    if problems:
        raise UserError(problems)
    return BaseModel(model.eval(), new_keys)


def check_vocabulary(tokenizer: Any, model: nn.Module, source: ModelSource) -> None:
    """Check that the model has an embedding for every token of its tokenizer.

    Raises:
        UserError: If it has not.
    """
    # A dual encoder reads tokens in one of its halves.
    reader: Any = getattr(model, "text_model", model)
    embeddings = reader.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        rule = "whose tokenizer belongs to the model"
        finding = f"there are {len(tokenizer)} tokens for {rows} embeddings"
        raise UserError(_problem("other-tokenizer", rule, finding, source))


def agree_on_padding(tokenizer: Any, model: nn.Module) -> None:
    """Tell a model that knows no padding token the one of its tokenizer; both are changed in place.

    Heads of decoders look for the last token that is none, and refuse several rows without it.
    Where a model does not write, rows are padded at their right: a model that counts positions from
    the first token of a row, as GPT-2 does, would count padding at its left. XLNet looks at the
    last token instead, and counts no positions.
    """
    config: Any = model.config
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    writes: Any = getattr(model, "can_generate", lambda: False)
    if not writes() and config.model_type != "xlnet":
        tokenizer.padding_side = "right"


@contextmanager
def silence() -> Iterator[None]:
    """Keep progress bars and warnings of transformers from the terminal; errors still raise."""
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _gguf(source: ModelSource) -> dict[str, Any]:
    """Return the arguments by which transformers reads all from a GGUF file, if there is one."""
    return {} if source.gguf is None else {"gguf_file": source.gguf}


def _from_gguf(source: ModelSource, stored: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that give a model with the weights of a GGUF file.

    Args:
        source: The file.
        stored: Its configuration. Reading it takes seconds, and transformers would do so again.
        options: Changes to the configuration.
    """
    config = copy.deepcopy(stored)
    for name, value in options.items():
        setattr(config, name, value)
    found = {"config": config, **_gguf(source)}
    # Without it, weights may stay in blocks, which a kernel from the hub would multiply.
    if hasattr(transformers, "GgufConfig"):
        found["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return found


def _drop_strangers(tokenizer: Any) -> None:
    """Take out the tokens, in place, that a GGUF file lacks and transformers adds behind its own.

    It gives every byte-level vocabulary an "<|endoftext|>", for which there may be no embedding.
    """
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    # All tokens of the file are in the vocabulary, special ones too.
    own = plain["model"]["vocab"]
    count = len(own) if isinstance(own, list) else max(own.values(), default=-1) + 1
    kept = [token for token in plain["added_tokens"] if token["id"] < count]
    if len(kept) < len(plain["added_tokens"]):
        text = json.dumps({**plain, "added_tokens": kept})
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)


def _problem(kind: str, rule: str, finding: str, source: ModelSource) -> Problem:
    return Problem(
        id=f"model.{kind}",
        message=f"`{KEY}` must name a model {rule}, but {finding}.",
        key=KEY,
        where=str(source.folder),
        fix="download the model again, or name another: model=minilm",
    )


def first_line(error: Exception) -> str:
    """Say that something does not load, and why."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200].rstrip(".:") if lines else type(error).__name__
    return f"it does not load ({text})"


def architectures_with(auto_class: str) -> list[str]:
    """Return the model types of transformers that a class such as AutoModelForMaskedLM can load."""
    # Its own keys are classes, which are imported one by one when they are asked for.
    return sorted(getattr(transformers, auto_class)._model_mapping._model_mapping)


def load_config(source: ModelSource) -> Any:
    """Read the configuration of a model.

    Raises:
        UserError: If it is not one of a class that transformers has.
    """
    try:
        with silence():
            return transformers.AutoConfig.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False, **_gguf(source)
            )
    # Validation of a configuration may raise classes of huggingface_hub's own.
    except Exception as error:
        rule = "of an architecture that transformers has built in"
        if source.gguf is not None:
            rule = "in a whole GGUF file, of an architecture that transformers reads from such"
        raise UserError(_problem("bad-config", rule, first_line(error), source)) from error


def loading_problem(error: Exception, source: ModelSource, auto_class: str) -> Problem:
    """Say why transformers could not make a model of `source`."""
    if "Unrecognized configuration class" in str(error):
        kind = load_config(source).model_type
        rule = f"whose architecture has the head of the task ({auto_class})"
        problem = _problem("wrong-architecture", rule, f"{kind} has none", source)
        families = ", ".join(architectures_with(auto_class))
        return replace(problem, allowed=families, fix="choose a model of one of these families")
    return _problem("does-not-load", "that transformers can load", first_line(error), source)


def _check_backbone(
    model: Any, new_keys: tuple[str, ...], mismatched: set[str], source: ModelSource
) -> list[Problem]:
    """Return a problem if more than heads and poolers would start from random values."""
    prefix, heads = f"{model.base_model_prefix}.", tuple(f"{name}." for name in head_names(model))
    # The classifiers of CLIP and SigLIP hold half of the body, under another name than its own.
    is_named = hasattr(model, model.base_model_prefix)
    inside = [key for key in new_keys if key.startswith(prefix) or not is_named]
    inside = [key for key in inside if key.startswith(prefix) or not key.startswith(heads)]
    inside = [key for key in inside if not key.startswith(inner_heads(model))]
    lost = [key for key in inside if key in mismatched or LAYER_OR_EMBEDDING.search(key.lower())]
    if not lost:
        return []
    rule = "whose weights belong to its config.json"
    finding = f"{len(lost)} of its tensors are missing or of another shape, such as {lost[0]}"
    return [_problem("incomplete-weights", rule, finding, source)]


def _check_finite(model: nn.Module, source: ModelSource) -> list[Problem]:
    bad = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if not bad:
        return []
    rule, finding = "with finite weights", f"NaN or infinity is in {', '.join(bad[:5])}"
    return [_problem("not-finite", rule, finding, source)]


def _check_labels(
    stored: Any, options: Mapping[str, Any], model: Any, new_keys: tuple[str, ...]
) -> list[Problem]:
    """Return a problem if a head is taken over whose outputs have other names, or another order."""
    wanted_by_id = options.get("id2label")
    names_by_id = getattr(stored, "id2label", None)
    prefix = model.base_model_prefix + "."
    if not wanted_by_id or not names_by_id or len(wanted_by_id) != len(names_by_id):
        return []
    if any(not key.startswith(prefix) for key in new_keys):
        return []
    names = [str(names_by_id[index]) for index in sorted(names_by_id)]
    wanted = [str(wanted_by_id[index]) for index in sorted(wanted_by_id)]
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return []
    folded = [[name.casefold() for name in side] for side in (wanted, names)]
    if folded[0] == folded[1]:
        return []
    same_set = sorted(folded[0]) == sorted(folded[1])
    relabelled = (
        sorted(wanted, key=lambda name: folded[1].index(name.casefold())) if same_set else names
    )
    fix = f"task.data.label_names=[{','.join(relabelled)}]"
    if not same_set:
        fix += " and these labels in the data, or a base model without a head"
    finding = "another order" if same_set else "other names"
    return [
        Problem(
            id="model.other-labels",
            message=(
                f"`task.data.label_names` must be the labels of the model's head, "
                f"but {', '.join(wanted[:20])} has {finding} than {', '.join(names[:20])}."
            ),
            key="task.data.label_names",
            allowed=", ".join(names[:20]),
            fix=fix,
        )
    ]
