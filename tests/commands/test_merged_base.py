"""A second round on top of a merged adapter, whose base model is the run's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.commands import merged_base
from lora_cli.models.weights import hash_weights

QUICK = (
    "task.max_length=32",
    "optimizer.lr=0.01",
    "trainer.max_steps=2",
    "trainer.global_batch_size=16",
    "trainer.log_steps=1",
)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_merged_adapter_becomes_a_base_of_its_own(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path
) -> None:
    arguments = ("train", f"adapter={tiny_run.path}", "adapter_mode=merge", *QUICK)
    done = run_cli(*arguments, f"task.data.path={rows()}", "lora.r=2", "run.dir=b", cwd=tmp_path)
    assert done.code == 0, done.err
    path = tmp_path / "b"
    record = read_json(path / "adapter" / "lora_cli.json")
    first = read_json(tiny_run.path / "adapter" / "lora_cli.json")
    assert record["base"]["sha256"] == hash_weights(path / "base") != first["base"]["sha256"]
    assert record["base"]["folder"] == "base"
    assert record["base"]["merged"]["base"] == first["base"]
    peft_config = read_json(path / "adapter" / "adapter_config.json")
    assert peft_config["base_model_name_or_path"] == str(path / "base")
    # The first row is the new base, which is what the adapter and its base said before.
    result = read_json(path / "result.json")
    told = run_cli(
        "eval", tiny_run.path, f"task.data.path={tmp_path / 'new'}", "split=validation", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert told.lines[0]["adapter"] == pytest.approx(result["base"], abs=1e-5)
    assert "start" not in result
    # Nothing is left of where it was made.
    assert sorted(e.name for e in tmp_path.iterdir()) == ["b", "new"]
    # Head and pooler, which the new base has, are trained on.
    assert "base_model.model.classifier.weight" in tensors(path / "adapter")
    assert "base_model.model.bert.pooler.dense.weight" in tensors(path / "adapter")


def test_a_merge_that_loses_something_is_noticed(
    run_cli: Any, tiny_run: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model that is read back is compared with the adapter, before anything is written."""
    arguments = ("train", f"adapter={tiny_run.path}", "adapter_mode=merge", *QUICK)
    arguments = (*arguments, f"task.data.path={rows()}", "run.dir=b")
    done = run_cli(*arguments, cwd=tmp_path)
    assert "merged against adapter on train: " in done.err
    write = merged_base.write_merged

    def spoil(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
        write(model, tokenizer, folder, **more)

    monkeypatch.setattr(merged_base, "write_merged", spoil)
    refused = run_cli(*arguments[:-1], "run.dir=c", cwd=tmp_path)
    assert refused.code == 1
    assert "error[merge.differs]" in refused.err
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def second_round(tmp_path_factory: pytest.TempPathFactory, tiny_run: Any, run_cli: Any) -> Path:
    """A run on top of a merged adapter; tests copy it to change it."""
    cwd = tmp_path_factory.mktemp("second")
    done = run_cli(
        "train", f"adapter={tiny_run.path}", "adapter_mode=merge",
        f"task.data.path={tiny_run.data}", *QUICK, "lora.r=2", "run.dir=b", cwd=cwd,
    )  # fmt: skip
    assert done.code == 0, done.err
    return cwd / "b"


def test_later_commands_find_the_base_in_the_run(
    second_round: Path, run_cli: Any, tiny_run: Any, tmp_path: Path
) -> None:
    result = read_json(second_round / "result.json")
    found = run_cli("eval", second_round, "split=validation", "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    assert found.lines[0]["adapter"] == pytest.approx(result["adapter"], abs=1e-6)
    merged = run_cli("merge", second_round, "output=m", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert merged.lines[0]["max_abs_difference"] < 1e-5
    alone = tmp_path / "alone"
    shutil.copytree(second_round / "adapter", alone)
    lost = run_cli("predict", alone, "text=good", cwd=tmp_path)
    assert lost.code == 2
    assert "`base` must say where the base model is" in lost.err
    # It does not pass for an adapter of the model that the first one was trained on.
    wrong = run_cli("predict", alone, f"base={tiny_run.base}", "text=good", cwd=tmp_path)
    assert wrong.code == 2
    assert "error[adapter.other-base]" in wrong.err
    right = run_cli("predict", alone, f"base={second_round / 'base'}", "text=good", cwd=tmp_path)
    assert right.code == 0, right.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_agrees_on_the_second_round(second_round: Path, run_cli: Any, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(second_round / "base")
    model = peft.PeftModel.from_pretrained(base, str(second_round / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(second_round / "base")
    with torch.no_grad():
        logits = model(**tokenizer("a good movie", return_tensors="pt")).logits
    told = run_cli("predict", second_round, "text=a good movie", cwd=tmp_path)
    probabilities = list(told.lines[0]["probabilities"].values())
    assert logits.softmax(-1)[0].tolist() == pytest.approx(probabilities, abs=1e-5)


def test_a_third_round_goes_on_from_the_second(
    second_round: Path, run_cli: Any, rows: Any, tmp_path: Path
) -> None:
    for mode, base in (("continue", second_round / "base"), ("merge", tmp_path / "c" / "base")):
        done = run_cli(
            "train", f"adapter={second_round}", f"adapter_mode={mode}",
            f"task.data.path={rows(mode)}", *QUICK, "run.dir=c", "--overwrite", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        record = read_json(tmp_path / "c" / "adapter" / "lora_cli.json")
        assert record["base"]["sha256"] == hash_weights(base)


def test_a_run_does_not_delete_what_it_starts_from(
    run_cli: Any, second_round: Path, rows: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "b"
    shutil.copytree(second_round, copy)
    done = run_cli(
        "train", "adapter=b", f"task.data.path={rows()}", *QUICK, "run.dir=b", "--overwrite",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "error[run.holds-input]" in done.err
    assert (copy / "adapter" / "adapter_model.safetensors").exists()
