"""The table of formats: names, packages, and what each of them refuses."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from lora_cli.artifacts.export import EXPORTERS, check_candidate, check_format
from lora_cli.artifacts.exporters import contract
from lora_cli.artifacts.exporters.contract import Candidate
from lora_cli.artifacts.exporters.onnx import OnnxModel
from lora_cli.config.exporting import ExportConfig
from lora_cli.errors import UserError


def test_each_format_can_be_asked_for() -> None:
    (annotation,) = [
        field.type for field in dataclasses.fields(ExportConfig) if field.name == "format_"
    ]
    assert list(get_args(annotation)) == list(EXPORTERS)
    names = [exporter.name for exporter in EXPORTERS.values()]
    assert sorted(set(names)) == sorted(names), "two formats would replace each other"


def test_unknown_format() -> None:
    with pytest.raises(UserError) as caught:
        check_format("onxx")
    (problem,) = caught.value.problems
    assert problem.message == '`format` must be a format that can be written, but is "onxx".'
    assert problem.allowed == ", ".join(EXPORTERS)
    assert problem.fix == 'did you mean "onnx"?'


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda name: None)
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


def candidate(auto_class: str, family: str) -> Candidate:
    model: Any = object()
    return Candidate(
        family=family, auto_class=auto_class, model=model, processor=None, adapter=None
    )


@pytest.mark.parametrize("format_", ["onnx", "onnx-int8", "torch-export"])
@pytest.mark.parametrize(
    ("auto_class", "family", "reason"),
    [
        ("AutoModelForCausalLM", "chat", "a cache of keys and values"),
        ("AutoModelForSeq2SeqLM", "seq2seq", "a cache of keys and values"),
        ("AutoModelForObjectDetection", "object_detection", "one size of images"),
    ],
)
def test_one_graph_is_refused_with_the_reason(
    format_: str, auto_class: str, family: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_candidate(format_, candidate(auto_class, family))
    (problem,) = caught.value.problems
    assert problem.id == f"export.no-{format_}"
    assert reason in problem.message
    assert f"task={family}" in problem.message
    assert problem.allowed is not None
    assert problem.allowed.startswith("peft, hf")
    assert "onnx" not in problem.allowed
    assert problem.fix is not None
    check_candidate(format_, candidate("AutoModelForSequenceClassification", family))
