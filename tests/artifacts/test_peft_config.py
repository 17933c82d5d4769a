import json
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lora_cli.artifacts.peft_config import read_config
from lora_cli.artifacts.peft_methods import default_config
from lora_cli.errors import UserError


def write(folder: Path, **config: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["query"], **config}))
    return path


def fault(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert caught.value.exit_code == 2
    assert all(str(path.parent) in (p.where or "") for p in caught.value.problems)
    return caught.value


def test_fields_and_defaults_are_those_of_peft(tmp_path: Path) -> None:
    LoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = default_config()
    for config in (theirs, ours):
        for name in ("peft_version", "target_modules", "inference_mode"):
            config.pop(name)
    assert ours == theirs


def test_minimal_config(tmp_path: Path) -> None:
    config = read_config(write(tmp_path))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 8, ["query"])


@pytest.mark.parametrize(
    "field",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": ["gaussian"]},
        {"peft_type": "IA3"},
        {"megatron_core": "os.path"},
        {"layer_replication": [[0, 1]]},
        {"use_qalora": True},
        {"loftq_config": {"loftq_bits": 4}},
        {"ensure_weight_tying": True},
    ],
)
def test_unsupported_features_are_named(tmp_path: Path, field: dict[str, Any]) -> None:
    error = fault(write(tmp_path, **field))
    assert [p.id for p in error.problems] == ["adapter.unsupported"]
    assert next(iter(field)) in str(error)


@pytest.mark.parametrize(
    "field",
    [
        {"r": 0},
        {"r": True},
        {"r": "8"},
        {"r": 2.5},
        {"lora_alpha": 0},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"lora_dropout": 1},
        {"lora_dropout": -0.5},
        {"target_modules": []},
        {"target_modules": None},
        {"target_modules": [3]},
        {"target_modules": ["*"]},
        {"target_modules": ["a" * 201]},
        {"target_modules": {"query": 1}},
        {"target_parameters": "experts.*"},
        {"use_dora": 1},
        {"use_rslora": "yes"},
        {"lora_bias": None},
        {"bias": "some"},
        {"rank_pattern": {"query": 0}},
        {"rank_pattern": {"query": 2.5}},
        {"rank_pattern": {"(a+)+b": 2}},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"query": 0}},
        {"alpha_pattern": {"q.*": 1}},
        {"layers_to_transform": [-1]},
        {"layers_to_transform": "0"},
        {"layers_pattern": "h.*"},
        {"trainable_token_indices": [1.5]},
        {"trainable_token_indices": {"wte": "all"}},
        {"modules_to_save": "classifier"},
        {"modules_to_save": [".*"]},
        {"exclude_modules": ".*query"},
        {"task_type": "OTHER"},
        {"task_type": ["SEQ_CLS"]},
        {"base_model_name_or_path": 3},
        {"revision": []},
    ],
)
def test_wrong_values(tmp_path: Path, field: dict[str, Any]) -> None:
    error = fault(write(tmp_path, **field))
    assert [p.id for p in error.problems] == ["adapter.bad-value"]
    assert next(iter(field)) in str(error)


def test_regular_expressions_are_refused_without_being_run(tmp_path: Path) -> None:
    start = time.perf_counter()
    error = fault(write(tmp_path, target_modules="(a+)+b"))
    assert time.perf_counter() - start < 1.0
    assert error.problems[0].id == "adapter.regex"
    assert read_config(write(tmp_path, target_modules="all-linear"))["target_modules"]


def test_all_problems_together(tmp_path: Path) -> None:
    error = fault(write(tmp_path, r=0, use_qalora=True, lora_alfa=3, auto_map={"a": "b"}))
    assert [p.id for p in error.problems] == [
        "adapter.unknown-key",
        "adapter.unknown-key",
        "adapter.unsupported",
        "adapter.bad-value",
    ]
    assert error.problems[1].fix == 'did you mean "lora_alpha"?'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", '{"a": "' + "x" * (1 << 20) + '"}', "[" * 100_000, "\udcff"],
    ids=["empty", "cut", "list", "null", "large", "deep", "not-utf8"],
)
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert fault(path).problems[0].id == "adapter.bad-config"


def test_no_file(tmp_path: Path) -> None:
    assert fault(tmp_path / "adapter_config.json").problems[0].id == "adapter.missing-file"
