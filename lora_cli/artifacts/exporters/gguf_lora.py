"""The adapter alone as a GGUF file, which llama.cpp adds to a Llama while it runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.exporters.contract import Candidate, ExportInputs, Reading, Refusal
from lora_cli.artifacts.exporters.gguf import add_tensors, check_hash, stored, why_no_llama
from lora_cli.artifacts.exporters.gguf_names import gguf_name, heads_of, interleave, separate
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.lora.settings import scale_of

_A, _B = ".lora_A.weight", ".lora_B.weight"
_ALPHA = "adapter.lora.alpha"
_MERGED = "format=gguf writes the merged model"


def why_no_gguf_lora(candidate: Candidate) -> Refusal | None:
    """Say why an adapter cannot be written alone, or None where it can."""
    adapter = candidate.adapter
    reason = None
    if candidate.auto_class != "AutoModelForCausalLM":
        reason = f"task={candidate.family} has a head that llama.cpp does not know"
    elif not isinstance(adapter, PeftAdapter):
        reason = "llama.cpp adds low-rank updates, and something else was trained"
    else:
        config = getattr(candidate.model, "config", None)
        reason = why_no_llama(config) or _fault_of(adapter)
    fix = _MERGED if candidate.auto_class == "AutoModelForCausalLM" else "format=peft"
    return None if reason is None else Refusal(reason=f"{reason}.", fix=fix)


def _fault_of(adapter: PeftAdapter) -> str | None:
    """Return what an adapter has besides the two factors of linear layers, or None."""
    if adapter.settings.variant not in ("lora", "lora_fa"):
        return f"llama.cpp adds plain low-rank updates, and this adapter is {_said(adapter)}"
    if adapter.saved_modules or adapter.tokens:
        whole = ", ".join([*adapter.saved_modules, *adapter.tokens])
        return f"llama.cpp adds low-rank updates alone, and {whole} was trained as well"
    others = [name for name in adapter.state if not name.endswith((_A, _B))]
    strange = [n for n in adapter.state if gguf_name(n.removesuffix(_A).removesuffix(_B)) is None]
    if found := [*others, *strange]:
        return f"llama.cpp adds updates of the linear layers of a Llama, and this has {found[0]}"
    return None


def _said(adapter: PeftAdapter) -> str:
    return f"of the variant {adapter.settings.variant}"


def export_gguf_lora(inputs: ExportInputs) -> None:
    """Write the two factors of each layer in float32, with the strength of the adapter.

    llama.cpp multiplies each update by ``alpha / r``, with the r of its factors and the alpha of
    the file; where a layer has another alpha, or rsLoRA another rule, B is multiplied by the rest.
    """
    import gguf

    model: Any = inputs.model
    writer = gguf.GGUFWriter(str(inputs.output), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(inputs.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(_ALPHA, inputs.adapter.settings.alpha)
    tensors = {name: stored(x, "f32") for name, x in _factors(inputs.adapter, model.config)}
    add_tensors(writer, tensors)


def _factors(adapter: PeftAdapter, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    settings = adapter.settings
    for name in sorted(adapter.state):
        if not name.endswith(_A):
            continue
        module = name.removesuffix(_A)
        a, b = adapter.state[name].float(), adapter.state[module + _B].float()
        r = len(a)
        scale = scale_of(r, settings.alpha_of(module), rslora=settings.rslora)
        rest = scale * r / settings.alpha
        found = gguf_name(module)
        yield f"{found}.weight.lora_a", a
        yield f"{found}.weight.lora_b", interleave(b * rest, heads_of(module, config))


def read_gguf_lora(path: Path, reading: Reading) -> Any:
    """Load the base model anew, and add to it what the file holds, as llama.cpp does.

    Raises:
        ValueError: If the data of its tensors is not what was written.
    """
    reader = check_hash(path)
    model: Any = reading.load_base()
    alpha = reader.fields[_ALPHA].contents()
    factors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    modules = {gguf_name(name): name for name, _ in model.named_modules()}
    with torch.no_grad():
        for name in factors:
            if not name.endswith(".lora_a"):
                continue
            layer = name.removesuffix(".weight.lora_a")
            a, b = factors[name], factors[f"{layer}.weight.lora_b"]
            update = separate(alpha / len(a) * b @ a, heads_of(modules[layer], model.config))
            weight = model.get_submodule(modules[layer]).weight
            weight.copy_(weight.float() + update.to(weight.device))
    return model
