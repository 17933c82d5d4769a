import dataclasses
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.errors import UserError
from lora_cli.lora.settings import LoraSettings

LAYER = "bert.encoder.layer.0.attention.self.query"


def write_peft(folder: Path, adapter: PeftAdapter, *, module_names: Iterable[str] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in peft_files(adapter, module_names=module_names).items():
        (folder / name).write_bytes(content)


def adapter() -> PeftAdapter:
    torch.manual_seed(0)
    return PeftAdapter(
        settings=LoraSettings(r=2, alpha=4.5, dropout=0.1),
        targets=(LAYER,),
        saved_modules=("classifier",),
        task_type="SEQ_CLS",
        base_name="some/base",
        revision="main",
        state={
            f"{LAYER}.lora_A.weight": torch.randn(2, 4),
            f"{LAYER}.lora_B.weight": torch.randn(4, 2),
            "classifier.weight": torch.randn(3, 4),
            "classifier.bias": torch.randn(3),
        },
    )


def fault(folder: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_peft(folder)
    assert caught.value.exit_code == 2
    assert all(str(folder) in (p.where or "") for p in caught.value.problems)
    return caught.value


def rewrite(folder: Path, *, drop: str = "", **extra: torch.Tensor) -> None:
    state = {f"base_model.model.{name}": t for name, t in adapter().state.items()}
    state = {name: t for name, t in state.items() if not drop or drop not in name}
    save_file(state | extra, folder / "adapter_model.safetensors")


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_read_back(tmp_path: Path) -> None:
    write_peft(tmp_path / "a" / "b", adapter())
    loaded = load_peft(tmp_path / "a" / "b")
    plain = {f.name for f in dataclasses.fields(PeftAdapter)} - {"state"}
    for name in plain:
        assert getattr(loaded, name) == getattr(adapter(), name), name
    assert loaded.state.keys() == adapter().state.keys()
    for name, tensor in adapter().state.items():
        assert torch.equal(loaded.state[name], tensor)


def test_files(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_peft(tmp_path, adapter())
    finally:
        os.umask(old)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o644}
    with safe_open(files[1], "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        keys = tensors.keys()
    assert all(key.startswith("base_model.model.") for key in keys)
    text = files[0].read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["inference_mode"] is True
    assert config["lora_alpha"] == 4.5
    assert config["target_modules"] == [LAYER]


def test_same_adapter_same_bytes(tmp_path: Path) -> None:
    reversed_state = dict(reversed(adapter().state.items()))
    write_peft(tmp_path / "a", adapter())
    write_peft(tmp_path / "b", dataclasses.replace(adapter(), state=reversed_state))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_whole_alpha_is_an_integer_as_peft_writes_it(tmp_path: Path) -> None:
    write_peft(tmp_path, dataclasses.replace(adapter(), settings=LoraSettings(r=2, alpha=16.0)))
    assert '"lora_alpha": 16,' in (tmp_path / "adapter_config.json").read_text()


def test_loaded_tensors_survive_writing_the_same_folder(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    loaded = load_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 4096)
    write_peft(tmp_path, loaded)
    again = load_peft(tmp_path)
    assert torch.equal(again.state["classifier.weight"], adapter().state["classifier.weight"])


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([LAYER, "classifier"], ["query"]),
        ([LAYER, LAYER.replace("0", "1"), "classifier"], [LAYER]),
        # Only what is trained whole has the same last part: PEFT leaves that alone.
        ([LAYER, "classifier", "classifier.query"], ["query"]),
        ([], [LAYER]),
    ],
)
def test_targets_select_exactly_the_adapted_layers(
    tmp_path: Path, modules: list[str], expected: list[str]
) -> None:
    write_peft(tmp_path, adapter(), module_names=modules)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == expected


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_cut_file(tmp_path: Path, size: int) -> None:
    write_peft(tmp_path, adapter())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    error = fault(tmp_path)
    assert error.problems[0].id == "adapter.damaged"
    assert "adapter_model.safetensors" in str(error)


def test_huge_header_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert fault(tmp_path).problems[0].id == "adapter.damaged"


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "does not" in str(fault(tmp_path))
    (tmp_path / "adapter_model.bin").write_bytes(b"cposix\nsystem\n")
    error = fault(tmp_path)
    assert "adapter_model.bin" in str(error)
    assert "safetensors" in (error.problems[0].fix or "")


def test_stray_misfit_and_absent_tensors_are_listed_together(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    rewrite(
        tmp_path,
        drop="classifier",
        unprefixed=torch.zeros(1),
        **{
            "base_model.model.bert.embeddings.weight": torch.zeros(2),
            f"base_model.model.{LAYER}.lora_magnitude_vector": torch.zeros(4),
            f"base_model.model.{LAYER}.lora_A.weight": torch.zeros(5, 4),
        },
    )
    error = fault(tmp_path)
    text = str(error)
    assert [p.id for p in error.problems] == ["adapter.tensors"] * 3
    for part in ("unprefixed", "embeddings", "lora_magnitude_vector", "(5, 4)", "classifier"):
        assert part in text


def test_usual_heads_may_be_absent_when_listed_together(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    edit(tmp_path, modules_to_save=["classifier", "score"])
    assert load_peft(tmp_path).saved_modules == ("classifier",)
    edit(tmp_path, modules_to_save=["classifier", "pooler", "score"])
    assert "pooler" in str(fault(tmp_path))


def test_saved_modules_are_exact_paths(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter())
    edit(tmp_path, modules_to_save=["classifier", "pooler"])
    rewrite(
        tmp_path,
        **{
            "base_model.model.bert.pooler.dense.weight": torch.zeros(4, 4),
            "base_model.model.pre_classifier.weight": torch.zeros(4, 4),
        },
    )
    # PEFT matches the end of the text, so that "pre_classifier" is meant as well.
    assert load_peft(tmp_path).saved_modules == ("bert.pooler", "classifier", "pre_classifier")
