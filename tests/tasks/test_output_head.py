"""What is read at some places, against the same model run over all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.tasks import output_head, token_loss
from lora_cli.tasks.output_head import head_of, logits_at, loss_at, own_and_best_at

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def gemma() -> Any:
    """A decoder that caps its scores, so that they are not what its head gives."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.fixture
def load(tiny_language_dir: Callable[..., Path]) -> Callable[[str], Any]:
    def get(kind: str) -> Any:
        if kind == "gemma2":
            return gemma()
        decoders = ("llama", "gpt2", "qwen2")
        auto = "AutoModelForCausalLM" if kind in decoders else "AutoModelForSeq2SeqLM"
        return getattr(transformers, auto).from_pretrained(tiny_language_dir(kind)).eval()

    return get


def batch(model: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(4, 60, (3, 7), generator=generator)
    shape = inputs.get("decoder_input_ids", ids).shape
    places = torch.rand(shape, generator=generator) < 0.4
    true = torch.randint(4, 60, (int(places.sum()),), generator=generator)
    return inputs, places, true


def use_of(model: Any) -> str:
    head = head_of(model)
    assert head is not None
    return output_head._KNOWN[head].kind


KINDS = {
    "llama": "slices",
    "gpt2": "slices",
    "t5": "slices",
    "bart": "slices",
    "gemma2": "rows",
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_as_it_is_of_all_places(
    load: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(kind)
    if kind == "t5":
        # Its weights are so large here that the rounding of float32 shows.
        model.double()
    monkeypatch.setattr(token_loss, "_NUMBERS_AT_ONCE", 3 * 61)
    inputs, places, true = batch(model)
    inject_lora(model, adapted(model), LoraSettings(r=2, alpha=4.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(**inputs).logits[places]
    whole = functional.cross_entropy(logits, true, reduction="sum", label_smoothing=0.1)
    expected = torch.autograd.grad(whole, trained)
    loss = loss_at(model, inputs, places, true, label_smoothing=0.1)
    assert use_of(model) == KINDS[kind]
    found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    largest = max(float(one.abs().max()) for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one / largest, other / largest, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        said = own_and_best_at(model, inputs, places, true)
        read = logits_at(model, inputs, places)
    torch.testing.assert_close(read, logits.detach(), rtol=1e-5, atol=1e-5)
    expected_said = logits.detach().log_softmax(-1).gather(1, true[:, None])[:, 0]
    torch.testing.assert_close(said[:, 0], expected_said.float(), rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def adapted(model: Any) -> list[str]:
    ends = ("q_proj", "c_attn", "q", "v_proj", "v")
    return [
        name for name, _ in model.named_modules() if name.endswith(tuple(f".{e}" for e in ends))
    ]


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_trained_head_gets_its_gradient(
    load: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    monkeypatch.setattr(token_loss, "_NUMBERS_AT_ONCE", 3 * 61)
    inputs, places, true = batch(model)
    if kind == "adapter":
        inject_lora(model, ["lm_head"], LoraSettings(r=2, alpha=4.0))
    freeze_base(model, ("lm_head",) if kind == "whole" else (), bias="none")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    whole = functional.cross_entropy(model(**inputs).logits[places], true, reduction="sum")
    expected = torch.autograd.grad(whole, trained)
    found = torch.autograd.grad(loss_at(model, inputs, places, true), trained)
    assert use_of(model) == "slices"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_most_scores_are_never_computed(load: Any) -> None:
    model = load("llama")
    inputs, places, true = batch(model)
    loss_at(model, inputs, places, true)
    rows = []
    handle = model.lm_head.register_forward_hook(
        lambda _m, _i, out: rows.append(out[..., 0].numel())
    )
    loss_at(model, inputs, places, true)
    handle.remove()
    assert sum(rows) == len(true) < places.numel()


def test_a_change_of_the_scores_is_found_out_whatever_their_size() -> None:
    """The scores of a new model are so small that a cap of 30 would not show in them."""
    model = gemma()
    model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    inputs, places, true = batch(model)
    loss_at(model, inputs, places, true)
    assert use_of(model) == "rows"


class Mixing(nn.Module):
    """A model that adds to each score that of the place before, after its head."""

    def __init__(self, model: Any, *, twice: bool) -> None:
        super().__init__()
        self.model, self.config, self.twice = model, model.config, twice

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def generate(self) -> None: ...

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        if self.twice:
            hidden = self.model.model(input_ids=inputs["input_ids"]).last_hidden_state
            output.logits = output.logits + self.model.lm_head(hidden)
        else:
            output.logits = output.logits + output.logits.roll(1, dims=1)
        return output


@pytest.mark.parametrize("twice", [False, True])
def test_a_model_that_does_more_is_run_whole(
    load: Any, twice: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Mixing(load("llama"), twice=twice).eval()
    inputs, places, true = batch(model)
    with caplog.at_level("INFO", logger="lora_cli"):
        loss = loss_at(model, inputs, places, true)
        loss_at(model, inputs, places, true)
    assert use_of(model) == "whole"
    assert caplog.messages == ["the logits of all tokens are computed: Mixing"]
    logits = model(**inputs).logits[places]
    torch.testing.assert_close(loss, functional.cross_entropy(logits, true, reduction="sum"))


def test_the_check_changes_nothing(load: Any) -> None:
    model = load("llama")
    inputs, places, true = batch(model)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loss_at(model, inputs, places, true)
    assert use_of(model) == "slices"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_module_is_run_whole(load: Any) -> None:
    model = load("llama")
    inputs, places, true = batch(model)
    expected = loss_at(model, inputs, places, true)
    torch.testing.assert_close(loss_at(lambda **x: model(**x), inputs, places, true), expected)
    images = {**inputs, "pixel_values": torch.zeros(1, 3, 4, 4)}

    class WithImages(Mixing):
        def forward(self, pixel_values: Any, **inputs: Any) -> Any:
            return self.model(**inputs)

    seen = WithImages(load("llama"), twice=False)
    torch.testing.assert_close(loss_at(seen, images, places, true), expected)
    assert use_of(seen) == "whole"


def test_in_bfloat16_autocast(load: Any) -> None:
    model = load("llama")
    inputs, places, true = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.cross_entropy(
            model(**inputs).logits[places].float(), true, reduction="sum"
        )
        loss = loss_at(model, inputs, places, true)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
