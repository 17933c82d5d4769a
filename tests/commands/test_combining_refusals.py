"""What `lora-cli merge adapters=[...]` refuses, before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.artifacts.commit import describe_files, document_sha256
from lora_cli.commands import combining

WEIGHTS = "adapter_model.safetensors"


def copied(combining_runs: Path, tmp_path: Path, name: str = "b") -> Path:
    """A copy of an adapter folder that is in no run."""
    return Path(shutil.copytree(combining_runs / name / "adapter", tmp_path / f"copy-of-{name}"))


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    sign(path.parent)


def sign(folder: Path) -> None:
    """Let the record say that the files were written as they are."""
    path = folder / "lora_cli.json"
    record = json.loads(path.read_text())
    contents = {name: path.with_name(name).read_bytes() for name in record["files"]}
    record["files"] = describe_files(contents)
    path.write_text(json.dumps({**record, "sha256": document_sha256(record)}))


def reorder(record: Any) -> None:
    record["state"]["labels"].reverse()


def rebase(record: Any) -> None:
    record["base"].update(sha256="0" * 64, name="other/model")


def rename(record: Any) -> None:
    record["state"]["labels"][1] = "glad"


def forget(record: Any) -> None:
    del record["state"]["labels"]


@pytest.mark.parametrize("into", ["adapter", "model"])
def test_what_cannot_be_combined_is_refused_before_writing(
    merge_adapters: Any, tmp_path: Path, into: str
) -> None:
    finished = merge_adapters("a", "c", "method=ties", into=into)
    assert finished.code == 2
    assert "error[merge.cannot-combine]" in finished.err
    assert "attention.self.query (4, 2)" in finished.err
    assert "method=svd gives one rank" in finished.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rebase, "be of the same base weights, but other/model has others than"),
        (
            reorder,
            "have the same labels in the same order, but one has positive, negative and the first "
            "negative, positive",
        ),
        (rename, "but one has negative, glad and the first negative, positive"),
        (forget, "say what their labels are, but one does not (KeyError"),
    ],
)
def test_adapters_of_another_kind(
    combining_runs: Path,
    merge_adapters: Any,
    tmp_path: Path,
    change: Callable[[Any], None],
    message: str,
) -> None:
    other = copied(combining_runs, tmp_path)
    edit_json(other / "lora_cli.json", change)
    finished = merge_adapters("a", str(other))
    assert finished.code == 2
    assert "error[merge.cannot-combine]" in finished.err
    assert message in " ".join(finished.err.split())
    assert str(other) in finished.err
    assert not (tmp_path / "out").exists()


def test_every_fault_is_told_at_once(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path
) -> None:
    """Another base, other labels, and magnitudes of DoRA in a further one."""
    other, dora = copied(combining_runs, tmp_path), copied(combining_runs, tmp_path, "a")
    edit_json(other / "lora_cli.json", rebase)
    edit_json(other / "lora_cli.json", rename)
    edit_json(dora / "adapter_config.json", lambda config: config.update(use_dora=True))
    tensors = load_file(dora / WEIGHTS)
    for name in list(tensors):
        if name.endswith(".lora_B.weight"):
            magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[magnitude] = torch.ones(tensors[name].shape[0])
    save_file(tensors, dora / WEIGHTS, {"format": "pt"})
    sign(dora)
    finished = merge_adapters("a", str(other), str(dora))
    assert finished.code == 2
    assert finished.err.count("error[merge.cannot-combine]") == 3
    assert "but one has DoRA magnitudes" in finished.err


def test_a_damaged_adapter_cannot_hide_behind_another(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path
) -> None:
    """A layer that is missing in one file is there in the other: still an error."""
    other = copied(combining_runs, tmp_path)
    tensors = load_file(other / WEIGHTS)
    lost = next(name for name in tensors if name.endswith("query.lora_A.weight"))
    kept = {n: t for n, t in tensors.items() if n.rpartition(".lora_")[0] != lost[:-14]}
    assert len(kept) == len(tensors) - 2
    save_file(kept, other / WEIGHTS, {"format": "pt"})
    sign(other)
    finished = merge_adapters("a", str(other))
    assert finished.code == 2
    assert "error[adapter.state]" in finished.err
    assert str(other) in finished.err


def test_no_folder_is_left_out_silently(merge_adapters: Any, tmp_path: Path) -> None:
    finished = merge_adapters("a", "nowhere", str(tmp_path))
    assert finished.code == 2
    assert finished.err.count("error[adapter.not-found]") == 2
    assert finished.err.count("`adapters` must be a run or adapter directory") == 2


@pytest.mark.parametrize("name", ["a", "b"])
def test_no_input_is_replaced(combining_runs: Path, run_cli: Any, name: str) -> None:
    before = (combining_runs / name / "adapter" / WEIGHTS).read_bytes()
    finished = run_cli(
        *(
            "merge",
            f"adapters=[{combining_runs / 'a'},{combining_runs / 'b'}]",
            "into=adapter",
            "--overwrite",
        ),
        f"output={combining_runs / name / 'adapter'}",
        cwd=combining_runs,
    )
    assert finished.code == 2
    assert "is what the command reads" in finished.err
    assert (combining_runs / name / "adapter" / WEIGHTS).read_bytes() == before


def test_heads_need_weights_that_make_a_mean(merge_adapters: Any, tmp_path: Path) -> None:
    finished = merge_adapters("a", "b", "weights=[1,-1]")
    assert finished.code == 2
    assert "error[merge.bad-weights]" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_fused_experts_cannot_be_combined(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path
) -> None:
    other = copied(combining_runs, tmp_path)
    experts = ["experts.down_proj"]
    edit_json(other / "adapter_config.json", lambda c: c.update(target_parameters=experts))
    finished = merge_adapters("a", str(other))
    assert finished.code == 2
    assert "but one adapts fused weights of experts: experts.down_proj" in finished.err


def test_another_task(merge_adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of = combining._config_of

    def other_task(member: Any) -> Any:
        if member.subject.run.name == "a":
            return config_of(member)
        task, strategy = SimpleNamespace(family="image_classification"), config_of(member).strategy
        return SimpleNamespace(task=task, strategy=strategy)

    monkeypatch.setattr(combining, "_config_of", other_task)
    finished = merge_adapters("a", "b")
    assert finished.code == 2
    assert "one is of image_classification and the first of text_classification" in finished.err


@pytest.mark.parametrize("places", [("copy-of-b", "a"), ("a", "copy-of-b")])
def test_another_strategy(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path, places: tuple[str, str]
) -> None:
    copied(combining_runs, tmp_path)
    edit_json(
        tmp_path / "copy-of-b" / "lora_cli.json",
        lambda r: r["config"].update(strategy={"name": "bitfit"}),
    )
    found = [str(tmp_path / place) if place[0] == "c" else place for place in places]
    finished = merge_adapters(*found)
    assert finished.code == 2
    assert "`adapters` must be LoRA adapters, but one was trained with strategy=bitfit" in (
        finished.err
    )


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["check_rows=5"], "check_rows"),
        (["task.data.path=rows.jsonl"], "task.data.path"),
        (["r=3"], "r"),
        (["method=cat", "density=0.3"], "density"),
    ],
)
def test_settings_that_would_do_nothing(merge_adapters: Any, settings: list[str], key: str) -> None:
    finished = merge_adapters("a", "b", *settings)
    assert finished.code == 2
    assert f"`{key}` must be left out" in finished.err


@pytest.mark.parametrize("first", [True, False])
def test_what_has_no_factors(
    tiny_run: Any, merge_adapters: Any, run_cli: Any, tmp_path: Path, first: bool
) -> None:
    kept = [s for s in tiny_run.settings if not s.startswith(("lora.", "trainer.max_steps"))]
    head = tmp_path / "head"
    settings = [*kept, "strategy=head", "trainer.max_steps=1", f"run.dir={head}", "--quiet"]
    assert run_cli("train", *settings, cwd=tmp_path).code == 0
    finished = merge_adapters(*((str(head), "a") if first else ("a", str(head))))
    assert finished.code == 2
    assert "but one was trained with strategy=head" in finished.err
    assert finished.err.count("error[") == 1
