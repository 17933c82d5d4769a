"""Exported files against the torch model, at shapes other than the one that was traced."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_cli.artifacts import export
from lora_cli.artifacts.export import EXPORTERS, ExportInputs, OnnxModel, check_format
from lora_cli.errors import UserError

LABELS = ("sad", 'gl"ad', "ärger")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "num_labels": 3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "roberta": {"max_position_embeddings": 70},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
}


def make_model(family: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, **FAMILIES[family], "vocab_size": vocabulary}
    if family == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del options[name]
    config = transformers.AutoConfig.for_model(family, **options)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def make_batch(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, the second row padded from the middle on."""
    draw = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = model.config.pad_token_id
    mask[:, 0] = 1
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


@pytest.fixture
def inputs(tiny_model_dir: Any, tmp_path: Path) -> ExportInputs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "README.md").write_text("card")
    (adapter / "link").symlink_to("/etc/hostname")
    return ExportInputs(
        adapter_folder=adapter,
        model=make_model("bert", len(tokenizer)),
        processor=tokenizer,
        labels=LABELS,
        max_length=48,
        output=tmp_path / "out" / "model.onnx",
    )


def with_fields(inputs: ExportInputs, **changes: Any) -> ExportInputs:
    fields = {name: getattr(inputs, name) for name in ExportInputs.__dataclass_fields__}
    return ExportInputs(**{**fields, **changes})


def written(name: str, inputs: ExportInputs) -> Path:
    inputs.output.parent.mkdir(exist_ok=True)
    EXPORTERS[name].write(inputs)
    return inputs.output


def assert_same_function(model: Any, path: Path) -> None:
    exported = OnnxModel(path)
    scale = 0.0
    for rows, length in ((2, 7), (1, 3), (5, 20), (3, 41), (1, 1)):
        batch = make_batch(model, rows, length)
        if model.config.model_type in ("distilbert", "modernbert"):
            del batch["token_type_ids"]
        with torch.no_grad():
            expected = model(**batch).logits
        actual = exported(**batch).logits
        assert actual.shape == expected.shape == (rows, 3)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        scale = max(scale, expected.abs().max().item())
    assert scale > 0.1, "the logits are too small for the comparison to mean anything"


def test_onnx_equals_torch(inputs: ExportInputs, capfd: pytest.CaptureFixture[str]) -> None:
    before = {name: value.clone() for name, value in inputs.model.state_dict().items()}
    path = written("onnx", inputs)

    assert capfd.readouterr() == ("", "")
    assert path == inputs.output
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    assert_same_function(inputs.model, path)
    assert all(torch.equal(before[name], now) for name, now in inputs.model.state_dict().items())

    import onnx

    document = onnx.load(path)
    onnx.checker.check_model(document, full_check=True)
    metadata = {entry.key: entry.value for entry in document.metadata_props}
    assert json.loads(metadata["labels"]) == list(LABELS)
    assert metadata["max_length"] == "48"
    assert OnnxModel(path).labels == LABELS
    assert [value.name for value in document.graph.input] == inputs.processor.model_input_names
    content = path.read_bytes()
    assert b".py" not in content, "source paths of this machine are left in the file"
    assert str(Path.cwd()).encode() not in content


def test_onnx_answers_to_the_mask(inputs: ExportInputs) -> None:
    exported = OnnxModel(written("onnx", inputs))
    batch = make_batch(inputs.model, 2, 8)
    padded = exported(**batch).logits[1]
    batch["input_ids"][1, 4:] = 9
    assert torch.allclose(exported(**batch).logits[1], padded, atol=1e-6)
    batch["attention_mask"][1] = 1
    assert not torch.allclose(exported(**batch).logits[1], padded, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_onnx_of_each_family(inputs: ExportInputs, family: str) -> None:
    model = make_model(family, len(inputs.processor))
    assert_same_function(model, written("onnx", with_fields(inputs, model=model)))


def test_onnx_traced_on_one_real_row(inputs: ExportInputs) -> None:
    example = make_batch(inputs.model, 1, 9)
    path = written("onnx", with_fields(inputs, example=example))
    assert_same_function(inputs.model, path)


def test_onnx_of_a_head_with_two_outputs(inputs: ExportInputs) -> None:
    torch.manual_seed(0)
    options = {**SIZES, "num_labels": 2, "vocab_size": len(inputs.processor)}
    config = transformers.AutoConfig.for_model("bert", **options)
    model = transformers.AutoModelForQuestionAnswering.from_config(config).eval()
    exported = OnnxModel(written("onnx", with_fields(inputs, model=model, labels=())))
    for rows, length in ((2, 7), (5, 20), (1, 1)):
        batch = make_batch(model, rows, length)
        with torch.no_grad():
            expected = model(**batch)
        actual = exported(**batch)
        assert set(vars(actual)) == {"start_logits", "end_logits"}
        for name, value in vars(actual).items():
            assert value.shape == (rows, length)
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
    assert not torch.allclose(actual.start_logits, actual.end_logits, atol=1e-3)


def test_onnx_of_half_precision_is_float32(inputs: ExportInputs) -> None:
    model = make_model("bert", len(inputs.processor)).to(torch.bfloat16)
    path = written("onnx", with_fields(inputs, model=model))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert_same_function(model.float(), path)


def test_a_model_that_onnx_cannot_express(inputs: ExportInputs) -> None:
    class Branching(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return input_ids if input_ids.sum().item() > 3 else -input_ids

    with pytest.raises(UserError) as caught:
        written("onnx", with_fields(inputs, model=Branching()))
    (problem,) = caught.value.problems
    assert problem.id == "export.unsupported"
    assert "Branching" in problem.message
    assert list(inputs.output.parent.glob("*")) == []


def test_peft_copies_files_but_no_links(inputs: ExportInputs, tmp_path: Path) -> None:
    folder = written("peft", with_fields(inputs, output=tmp_path / "copy"))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize("name", ["hf", "onnx"])
def test_each_format_is_read_back_by_its_own_row(inputs: ExportInputs, name: str) -> None:
    read = EXPORTERS[name].read
    assert read is not None
    loaded = read(written(name, inputs), "AutoModelForSequenceClassification")
    batch = make_batch(inputs.model, 3, 11)
    with torch.no_grad():
        expected = inputs.model(**batch).logits
        if name == "hf":
            loaded.eval()
        assert torch.allclose(loaded(**batch).logits, expected, atol=1e-5)
    assert EXPORTERS[name].is_file == inputs.output.is_file()


def test_hf_is_read_by_transformers(inputs: ExportInputs, tmp_path: Path) -> None:
    folder = written("hf", with_fields(inputs, output=tmp_path / "merged"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = make_batch(inputs.model, 3, 11)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, inputs.model(**batch).logits)


def test_unknown_format() -> None:
    with pytest.raises(UserError) as caught:
        check_format("onxx")
    (problem,) = caught.value.problems
    assert problem.message == '`format` must be a format that can be written, but is "onxx".'
    assert problem.allowed == "peft, hf, onnx"
    assert problem.fix == 'did you mean "onnx"?'


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    for call in (lambda: check_format("onnx"), lambda: OnnxModel(tmp_path / "model.onnx")):
        with pytest.raises(UserError) as caught:
            call()
        (problem,) = caught.value.problems
        assert problem.id == "export.missing-extra"
        assert problem.fix == 'pip install "lora-cli[export]"'
    check_format("peft")


def test_module_loads_without_the_extra() -> None:
    code = "import sys, lora_cli.artifacts.export; print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_unreadable_onnx_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        OnnxModel(path)
    assert caught.value.problems[0].id == "export.unreadable"
    assert str(path) in caught.value.problems[0].message
