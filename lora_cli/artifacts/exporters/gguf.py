"""The merged model of the Llama family as one GGUF file, the format of llama.cpp."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_cli.artifacts.exporters.contract import Candidate, ExportInputs, Noise, Reading, Refusal
from lora_cli.artifacts.exporters.gguf_names import gguf_name, heads_of, interleave
from lora_cli.artifacts.exporters.gguf_tokenizer import read_vocabulary, why_no_vocabulary
from lora_cli.artifacts.exporters.rounding import moved_weights, steps_of_blocks, steps_of_floats
from lora_cli.errors import Problem, RunFailedError
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import resolve_model

GGUF_PACKAGES = ("gguf",)
HASH_KEY = "lora_cli.sha256"
_HF = "format=hf, which llama.cpp's own converter reads as well"
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Bits after the leading one of each floating-point format.
_BITS = {"f16": 10, "bf16": 7}
_BLOCK = 32
# Ways to cut a text into words that transformers reads from a GGUF file; of the other it takes
# GPT-2's, which keeps digits together.
_READ_BY_TRANSFORMERS = ("gpt-2", "llama-bpe")


def why_no_gguf(candidate: Candidate) -> Refusal | None:
    """Say why a model cannot be written, or None where it can."""
    config = getattr(candidate.model, "config", None)
    if candidate.auto_class != "AutoModelForCausalLM":
        return Refusal(
            reason="lora-cli writes GGUF of decoders that write texts, and "
            f"task={candidate.family} has a head that llama.cpp does not know.",
            fix="format=onnx, or format=hf",
        )
    reason = why_no_llama(config) or why_no_vocabulary(candidate.processor)
    if reason is None and candidate.gguf_type == "q8_0":
        reason = _why_no_blocks(candidate.model)
    return None if reason is None else Refusal(reason=f"{reason}.", fix=_HF)


def why_no_llama(config: Any) -> str | None:
    """Return why a decoder is not one whose GGUF form is tried and tested, or None."""
    kind = getattr(config, "model_type", None)
    if kind != "llama":
        return f"lora-cli writes GGUF of Llama models, and this is a {kind}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return (
            f"this Llama scales its rotary positions ({rope['rope_type']}), which transformers, "
            "where the file is tried, does not read from it"
        )
    if config.attention_bias or config.mlp_bias:
        return (
            "layers of this Llama have biases, which transformers, where the file is tried, does "
            "not read from it"
        )
    if config.hidden_act != "silu":
        return f"llama.cpp computes silu in a Llama, and this has {config.hidden_act}"
    return None


def _why_no_blocks(model: Any) -> str | None:
    narrow = [n for n, p in model.named_parameters() if p.dim() > 1 and p.shape[-1] % _BLOCK]
    if narrow:
        return f"gguf_type=q8_0 has blocks of {_BLOCK}, which do not fill the rows of {narrow[0]}"
    return None


def type_of(inputs: ExportInputs) -> str:
    """Return the number format of the file."""
    if inputs.gguf_type != "auto":
        return inputs.gguf_type
    dtype: Any = inputs.model.dtype
    return _TYPES.get(dtype, "f32")


def export_gguf(inputs: ExportInputs) -> None:
    """Write the merged model with its tokenizer and chat template.

    Matrices are in the number format asked for, vectors in float32, as llama.cpp expects. The file
    holds ``lora_cli.sha256``, the hash of the data of all tensors, among its facts.

    Raises:
        RunFailedError: If transformers does not cut texts as before with the tokenizer in the file.
    """
    import gguf

    model: Any = inputs.model
    kind = type_of(inputs)
    writer = gguf.GGUFWriter(str(inputs.output), "llama")
    writer.add_type("model")
    writer.add_name(inputs.name)
    _add_sizes(writer, model)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    cut = _add_tokenizer(writer, inputs.processor, size=len(model.get_input_embeddings().weight))
    tensors = {name: stored(values, kind) for name, values in _weights(model)}
    add_tensors(writer, tensors)
    if cut in _READ_BY_TRANSFORMERS:
        _check_tokenizer(inputs)


def _add_sizes(writer: Any, model: Any) -> None:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(model.get_input_embeddings().weight))


def _add_tokenizer(writer: Any, tokenizer: Any, *, size: int) -> str:
    """Write the tokenizer, and return llama.cpp's name of the way it cuts texts."""
    import gguf

    found = read_vocabulary(tokenizer, size=size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types([gguf.TokenType[kind] for kind in found.kinds])
    writer.add_token_merges(list(found.merges))
    for name, number in found.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(found.adds_bos)
    writer.add_add_eos_token(found.adds_eos)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)
    return found.cut


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and values of each tensor of the file; the head only where it is its own."""
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, values in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        found = gguf_name(module)
        if found is None:
            raise RuntimeError(f"llama.cpp has no name for {name}")
        if found == "output" and is_tied:
            continue
        yield f"{found}.{leaf}", interleave(values, heads_of(module, model.config))


def stored(values: torch.Tensor, kind: str) -> tuple[np.ndarray[Any, Any], Any]:
    """Return the bytes of a tensor in a number format, and the format, which is float32 if 1-D."""
    import gguf

    number = gguf.GGMLQuantizationType[kind.upper() if values.dim() > 1 else "F32"]
    plain = np.ascontiguousarray(values.detach().float().cpu().numpy())
    with np.errstate(over="ignore"):
        return gguf.quants.quantize(plain, number), number


def add_tensors(writer: Any, tensors: Mapping[str, tuple[np.ndarray[Any, Any], Any]]) -> None:
    """Write tensors, and before them the hash of their data; nothing can be added after that."""
    found = hashlib.sha256()
    for name, (data, kind) in tensors.items():
        found.update(data.tobytes())
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_string(HASH_KEY, found.hexdigest())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_hash(path: Path) -> Any:
    """Return a reader of a file whose tensors are as they were written.

    Raises:
        ValueError: If they are not.
    """
    import gguf

    reader = gguf.GGUFReader(str(path))
    found = hashlib.sha256()
    for tensor in reader.tensors:
        found.update(tensor.data.tobytes())
    field = reader.fields.get(HASH_KEY)
    if field is None or field.contents() != found.hexdigest():
        raise ValueError(f"{path} was damaged or changed")
    return reader


def _check_tokenizer(inputs: ExportInputs) -> None:
    """Compare the tokens of some texts by the tokenizer in the file with those of the model's."""
    texts = ["Hello world 123, it's  me\n\n ok", " a", "é 東京\t!"]
    if inputs.example is not None and "input_ids" in inputs.example:
        ids = inputs.example["input_ids"].flatten(0, -2)
        texts += inputs.processor.batch_decode(ids, skip_special_tokens=True)
    read = load_tokenizer(resolve_model(str(inputs.output)))
    for text in texts:
        expected, found = (one(text)["input_ids"] for one in (inputs.processor, read))
        if expected != found:
            raise RunFailedError(
                Problem(
                    id="export.differs",
                    message="The tokenizer in the file must cut texts as the model's does, but "
                    f"makes {found[:12]} of {text[:40]!r}, which has the tokens {expected[:12]}.",
                    fix="nothing was written; report this with the model that you use",
                )
            )


def read_gguf(path: Path, reading: Reading) -> Any:
    """Load a file by transformers, in float32.

    Raises:
        ValueError: If the data of its tensors is not what was written.
    """
    check_hash(path)
    source = resolve_model(str(path))
    base = load_base(source, auto_class=reading.auto_class, options={}, dtype="float32", seed=0)
    return base.model


def noise_of_gguf(inputs: ExportInputs) -> Noise | None:
    """Give the noise of the number format, or None where it holds each weight as it is."""
    dtype: Any = inputs.model.dtype
    kind = type_of(inputs)
    if kind in ("f32", _TYPES.get(dtype)):
        return None
    steps = steps_of_blocks if kind == "q8_0" else steps_of_floats(_BITS[kind])

    def noise(model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
        return moved_weights(model, steps, generator)

    return noise
