"""Programs of torch.export, loaded by torch alone."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import LABELS, batches_for, make_batch

from lora_cli.artifacts.exporters.contract import ExportInputs, Reading
from lora_cli.artifacts.exporters.torch_export import export_torch, read_torch
from lora_cli.errors import UserError

READING = Reading(auto_class="AutoModelForSequenceClassification", load_base=lambda: None)  # type: ignore[arg-type,return-value]
SCRIPT = """
import json, sys, torch
extra = {"lora_cli.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
assert "transformers" not in sys.modules
facts = json.loads(extra["lora_cli.json"])
for batch in torch.load(sys.argv[2]):
    found = module(*(batch[name] for name in facts["inputs"]))[0]
    torch.testing.assert_close(found, batch["logits"], atol=1e-5, rtol=0)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def made(
    make_inputs: Callable[[Path], ExportInputs], tmp_path_factory: pytest.TempPathFactory
) -> ExportInputs:
    given = make_inputs(tmp_path_factory.mktemp("pt2"))
    example = make_batch(given.model, 1, 9)
    given = replace(given, output=given.output.with_suffix(".pt2"), example=example)
    export_torch(given)
    return given


def test_torch_alone_computes_the_same_at_any_size(made: ExportInputs, tmp_path: Path) -> None:
    batches = batches_for(made.model)
    with torch.no_grad():
        batches = [{**batch, "logits": made.model(**batch).logits} for batch in batches]
    assert max(float(batch["logits"].abs().max()) for batch in batches) > 0.1
    torch.save(batches, tmp_path / "batches.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, made.output, tmp_path / "batches.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "inputs": ["input_ids", "token_type_ids", "attention_mask"],
        "outputs": ["logits"],
        "labels": list(LABELS),
        "max_length": 48,
    }


def test_no_row_and_no_path_is_in_the_file(made: ExportInputs) -> None:
    assert torch.export.load(str(made.output)).example_inputs is None
    content = made.output.read_bytes()
    assert b".py" not in content, "source paths of this machine are left in the file"
    assert str(Path.cwd()).encode() not in content
    ids = make_batch(made.model, 1, 9)["input_ids"].numpy().tobytes()
    assert ids not in content


def test_a_changed_file_is_refused(made: ExportInputs, tmp_path: Path) -> None:
    path = tmp_path / "changed.pt2"
    shutil.copyfile(made.output, path)
    batch = {name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["token_type_ids"] = torch.zeros(1, 4, dtype=torch.long)
    assert read_torch(path, READING)(**batch).logits.shape == (1, 3)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/more", "x")
    with pytest.raises(ValueError, match="changed"):
        read_torch(path, READING)


def test_a_model_that_torch_cannot_express(inputs: ExportInputs) -> None:
    class Branching(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return input_ids if input_ids.sum().item() > 3 else -input_ids

    with pytest.raises(UserError) as caught:
        export_torch(replace(inputs, model=Branching()))
    (problem,) = caught.value.problems
    assert problem.id == "export.unsupported"
    assert "Branching" in problem.message
    assert list(inputs.output.parent.glob("*")) == []
