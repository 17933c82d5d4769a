"""Modelfiles: their template, run by a small reader of its language, against the model's own."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_llama import TEMPLATE, byte_tokenizer, random_llama

from lora_cli.artifacts.exporters.contract import ExportInputs, Reading
from lora_cli.artifacts.exporters.ollama import export_ollama, find_pieces, modelfile, read_ollama
from lora_cli.models.integrity import check_manifest

WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|user|>system\nBe kind.<|end|>\n{% endif %}"
    "<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
WITH_BEGIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    "[/INST]{% else %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }} {{ m['content'] }}\n{% endfor %}"
REFUSING = "{{ raise_exception('no') }}"
WITH_CODE = "{% for m in messages %}{{ '{{' }}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
TALKS = (
    [("user", "Hi, {you}")],
    [("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", " C \n")],
)


def run_template(text: str, messages: list[tuple[str, str]]) -> str:
    """Run what Modelfiles of ours use of Go's text/template."""
    system = [content for role, content in messages if role == "system"]
    opening, body, rest = re.fullmatch(
        r"(?s)(?:\{\{ if not \.System \}\}(.*?)\{\{ end \}\})?\{\{ range \.Messages \}\}"
        r"(.*)\{\{ end \}\}\{\{ end \}\}(.*)",
        text,
    ).groups()  # type: ignore[union-attr]
    cases = dict(
        re.findall(r'(?s)\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if eq|\Z)', body)
    )
    said = [cases[role].replace("{{ .Content }}", content) for role, content in messages]
    return ("" if system else opening or "") + "".join(said) + rest


def parts(text: str) -> tuple[str, list[str]]:
    template = re.search(r'(?s)TEMPLATE """(.*?)"""', text)
    assert template is not None
    return template[1], re.findall('PARAMETER stop "(.*)"', text)


@pytest.mark.parametrize("template", [TEMPLATE, WITH_DEFAULT, WITH_BEGIN])
@pytest.mark.parametrize("cut", ["gpt-2", "llama-bpe"])
def test_the_template_writes_what_the_model_was_trained_on(template: str, cut: str) -> None:
    tokenizer = byte_tokenizer(cut, template=template)
    text = modelfile(tokenizer)
    assert text.startswith("FROM ./model.gguf\n")
    translated, stops = parts(text)
    assert stops == ["<|end|>"]
    for talk in TALKS:
        messages = [{"role": role, "content": content} for role, content in talk]
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if cut == "llama-bpe":
            # The runtime puts it there.
            expected = expected.removeprefix("<|begin|>")
        assert run_template(translated, talk) == expected


@pytest.mark.parametrize("template", [COUNTING, REFUSING, WITH_CODE])
def test_a_template_that_does_more_is_left_out_and_told(template: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    assert find_pieces(tokenizer) is None
    text = modelfile(tokenizer)
    assert "\nTEMPLATE" not in text
    assert "write TEMPLATE yourself" in text


def test_a_model_without_a_template_continues_the_prompt() -> None:
    template, stops = parts(modelfile(byte_tokenizer(template=None)))
    assert (template, stops) == ("{{ .Prompt }}", [])


def test_the_folder_holds_the_model_and_hashes(tmp_path: Path) -> None:
    tokenizer: Any = byte_tokenizer()
    inputs = ExportInputs(
        adapter_folder=tmp_path,
        model=random_llama(len(tokenizer)),
        processor=tokenizer,
        labels=(),
        max_length=None,
        output=tmp_path / "out",
        gguf_type="q8_0",
    )
    export_ollama(inputs)
    names = {path.name for path in inputs.output.iterdir()}
    assert names == {"Modelfile", "model.gguf", "MANIFEST.json"}
    reader = gguf.GGUFReader(str(inputs.output / "model.gguf"))
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    reading = Reading(auto_class="AutoModelForCausalLM", load_base=lambda: torch.nn.Identity())
    assert read_ollama(inputs.output, reading).config.hidden_size == 64
    assert list(check_manifest(inputs.output, key="base", known={})) == []
    (inputs.output / "Modelfile").write_text("FROM x")
    assert len(list(check_manifest(inputs.output, key="base", known={}))) == 1
