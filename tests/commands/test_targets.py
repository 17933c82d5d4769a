"""`lora-cli targets`: the tables say what training then does, and need no weights for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

SMOKE = (
    "trainer.max_steps=1",
    "trainer.global_batch_size=8",
    "trainer.eval_steps=1",
    "trainer.save_steps=1",
    "task.max_length=32",
    "seed=1",
)


@pytest.fixture
def config_only(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Path:
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(tiny_model_dir() / "config.json", folder)
    return folder


def targets(run_cli: Any, path: Path, *settings: str) -> Any:
    finished = run_cli("targets", f"model.path={path}", *settings, "--json", cwd=path.parent)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    return result


def test_tables(run_cli: Any, config_only: Path) -> None:
    finished = run_cli(
        "targets", f"model.path={config_only}", "lora.layers=[-1]", cwd=config_only.parent
    )
    assert finished.code == 0, finished.err
    rows = [line.split() for line in finished.out.splitlines()]
    assert ["query", "linear", "32", "->", "32", "2", "0-1", "1"] in rows
    assert ["dense", "linear", "32", "->", "64", "2", "0-1", "0"] in rows
    assert ["classifier", "linear", "32", "->", "2", "1", "-", "whole"] in rows
    chosen = [row for row in rows if row[1:2] == ["(chosen)"]]
    assert [row[0] for row in chosen] == ["8"]
    assert "adapters: query: 1 layer (1), value: 1 layer (1)\n" in finished.err
    assert "trained whole: classifier (if the weights have no such head yet)\n" in finished.err


def test_one_object(run_cli: Any, config_only: Path) -> None:
    result = targets(run_cli, config_only, "ranks=[2]", "lora.r=4", "num_labels=5")
    assert result["class"] == "BertForSequenceClassification"
    assert result["family"] == "bert"
    assert result["auto"] == ["query", "value"]
    assert result["targets"] == {
        "query": {"layers": 2, "blocks": "0-1"},
        "value": {"layers": 2, "blocks": "0-1"},
    }
    assert result["whole"] == ["classifier"]
    query = next(group for group in result["layers"] if group["name"] == "query")
    assert query == {
        "name": "query",
        "kind": "linear",
        "shape": [32, 32],
        "count": 2,
        "blocks": "0-1",
        "adapted": 2,
        "paths": [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)],
    }
    # Two factors of 32 r in each of four layers, and a head of 5 labels.
    trained = {cost["r"]: cost["trained_parameters"] for cost in result["costs"]}
    assert trained == {r: 4 * 2 * 32 * r + 5 * 33 for r in (2, 4)}


@pytest.mark.parametrize(
    "settings",
    [
        ("lora.variant=lora",),
        ("lora=all-linear", "lora.layers=[top-1]", "lora.rank_pattern={query:2}"),
        ("lora.variant=dora", "lora.targets=[query,word_embeddings]"),
        ("lora.variant=vera",),
        ("lora.init=pissa", "lora.bias=lora_only"),
        ("lora.trainable_tokens=[<new>,good]", "lora.modules_to_save=[pooler]"),
    ],
)
def test_size_and_count_are_those_of_training(
    run_cli: Any,
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    toy_reviews: Path,
    settings: tuple[str, ...],
) -> None:
    base = tiny_model_dir()
    chosen = ("lora.r=4", *settings)
    result = targets(run_cli, base, "ranks=[4]", *chosen)
    (cost,) = result["costs"]
    run = run_cli(
        "train",
        f"model.path={base}",
        "task=text_classification",
        f"task.data.path={toy_reviews}",
        f"run.dir={tmp_path / 'run'}",
        *SMOKE,
        *chosen,
        cwd=tmp_path,
    )
    assert run.code == 0, run.err
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert cost["adapter_bytes"] == file.stat().st_size
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["trainable_parameters"]
    assert cost["trained_parameters"] == trained
    assert result["whole"] == ["bert.pooler", "classifier"]
    adapted = {
        name.removeprefix("base_model.model.").rpartition(".lora_A")[0]
        for name in safetensors.torch.load_file(file)
        if ".lora_A" in name
    }
    paths = {path for group in result["layers"] if group["adapted"] for path in group["paths"]}
    assert adapted <= paths


def test_adalora_starts_wider(run_cli: Any, config_only: Path) -> None:
    (cost,) = targets(run_cli, config_only, "ranks=[4]", "lora.r=4", "lora.variant=adalora")[
        "costs"
    ]
    # Two factors of 32 and one value for each of the 1.5 r directions, and the head.
    assert cost["trained_parameters"] == 4 * 6 * (32 + 32 + 1) + 2 * 33
    assert cost["adapter_bytes"] > 4 * (4 * 4 * (32 + 32 + 1) + 2 * 33)
    assert cost["adapter_bytes"] < 4 * cost["trained_parameters"]


def write_config(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_family_without_usual_targets_shows_what_there_is(run_cli: Any, tmp_path: Path) -> None:
    folder = write_config(
        tmp_path / "mamba", model_type="mamba", hidden_size=8, num_hidden_layers=2
    )
    finished = run_cli("targets", f"model.path={folder}", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "in_proj" in finished.out
    assert "lora.targets=[NAME,...]" in finished.err
    assert targets(run_cli, folder)["targets"] is None
    named = targets(run_cli, folder, "lora.targets=[in_proj]", "ranks=[8]")
    assert named["targets"] == {"in_proj": {"layers": 2, "blocks": "0-1"}}
    assert named["auto"] is None


def test_no_head_for_the_task_is_said(run_cli: Any, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "vit", model_type="vit", hidden_size=12, num_hidden_layers=2)
    finished = run_cli("targets", f"model.path={folder}", "lora.targets=[projection]", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "head: vit has none for text_classification" in finished.err
    assert "3 -> 12, 16x16" in finished.out
    assert "trained whole: nothing\n" in finished.err


def test_fused_weights(run_cli: Any, tmp_path: Path) -> None:
    folder = write_config(
        tmp_path / "moe",
        model_type="mixtral",
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=20,
    )
    result = targets(
        run_cli, folder, "lora.target_parameters=[experts.down_proj]", "ranks=[2]", "lora.r=2"
    )
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    assert result["target_parameters"] == names
    group = next(group for group in result["layers"] if group["name"] == "experts.down_proj")
    assert (group["kind"], group["shape"], group["adapted"]) == ("parameter", [3, 16, 8], 2)
    never = run_cli("targets", f"model.path={folder}", "lora.variant=vera", cwd=tmp_path)
    assert never.code == 0, never.err
    assert "never: lora.variant=vera" in never.err


def test_a_rank_that_a_layer_cannot_have_is_left_out(run_cli: Any, tmp_path: Path) -> None:
    folder = write_config(
        tmp_path / "squeezebert", model_type="squeezebert", hidden_size=768, num_hidden_layers=1
    )
    result = targets(run_cli, folder, "lora.targets=[query]", "lora.r=4", "ranks=[2,4,6,8]")
    assert [cost["r"] for cost in result["costs"]] == [4, 8]
    refused = run_cli(
        "targets", f"model.path={folder}", "lora.targets=[query]", "lora.r=6", cwd=tmp_path
    )
    assert refused.code == 2


def test_errors_come_with_the_layers_that_there_are(run_cli: Any, config_only: Path) -> None:
    finished = run_cli(
        "targets", f"model.path={config_only}", "lora.targets=[qurey]", cwd=config_only.parent
    )
    assert finished.code == 2
    assert "word_embeddings" in finished.out
    assert 'did you mean "query"? List all: lora-cli targets' in finished.err


def test_hub_without_network(run_cli: Any, tmp_path: Path) -> None:
    finished = run_cli("targets", "model=bert", cwd=tmp_path)
    assert finished.code == 2
    assert "model.hub-unreachable" in finished.err


def test_package(run_cli: Any, tmp_path: Path, minilm_package: str) -> None:
    finished = run_cli("targets", "model=minilm", "--json", cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert finished.lines[0]["whole"] == ["classifier"]
    assert finished.lines[0]["parameters"] == 22_713_986
