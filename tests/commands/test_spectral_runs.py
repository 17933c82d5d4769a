"""AdaLoRA, VeRA and LoRA+ through the command line: train, resume, eval, merge, predict, PEFT."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.training.loop import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

VARIANTS = {
    "adalora": ["lora=adalora", "lora.adalora.every=1", "lora.r=2", "lora.alpha=64"],
    "vera": ["lora=vera", "lora.r=16", "lora.vera.d_initial=0.5", "optimizer.lr=0.1"],
    "lora_plus": ["optimizer=lora_plus"],
}


def settings_of(run: Any, variant: str, *more: str) -> list[str]:
    own = [*VARIANTS[variant], "trainer.max_steps=8", *more]
    changed = {setting.partition("=")[0] for setting in own}
    kept = [setting for setting in run.settings if setting.partition("=")[0] not in changed]
    return [*kept, *own]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    train_step = Trainer._train_step

    def step(self: Trainer) -> None:
        train_step(self)
        if self.progress.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", step)


def state(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumed_by_the_command_line_is_bit_equal(
    variant: str, tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tiny_run, variant)
    whole = run_cli("train", *settings, "run.dir=whole", "--quiet", cwd=tmp_path)
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = run_cli("train", *settings, "run.dir=half", "--quiet", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    resumed = run_cli("train", *settings, "run.dir=half", "--resume", "--quiet", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    for part in ("adapter", "checkpoints/step-00000008"):
        file = "adapter_model" if part == "adapter" else "adapter"
        one, other = (
            load_file(tmp_path / run / part / f"{file}.safetensors") for run in ("whole", "half")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adalora", "vera"])
def test_every_command_and_peft_agree_on_a_run(
    variant: str, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    trained = run_cli(
        "train", *settings_of(tiny_run, variant), "run.dir=run", "--json", cwd=tmp_path
    )
    assert trained.code == 0, trained.err
    result = json.loads(trained.out)
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-4)
    assert result["base"] != result["adapter"]

    evaluated = run_cli("eval", "run", "--json", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    values = json.loads(evaluated.out)
    assert values["merged"] == pytest.approx(values["adapter"], abs=1e-4)
    merged = run_cli("merge", "run", "output=merged", cwd=tmp_path)
    assert merged.code == 0, merged.err
    texts = ["a lovely film", "this was the dull story of a long night", "not it"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    predicted = run_cli("predict", "run", "input=in.jsonl", "output=out.jsonl", cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ours = torch.tensor([list(row["probabilities"].values()) for row in rows])

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_run.base, num_labels=2)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        for model in (plain, theirs):
            logits = model(**inputs).logits
            torch.testing.assert_close(logits.softmax(-1), ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adalora_ends_at_its_budget_and_writes_no_more(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    # One evaluation, after the last step.
    settings = settings_of(tiny_run, "adalora", "trainer.eval_steps=8")
    trained = run_cli("train", *settings, "run.dir=run", "--quiet", cwd=tmp_path)
    assert trained.code == 0, trained.err
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (3, 2, 8)
    assert (config["tinit"], config["tfinal"], config["deltaT"]) == (0, 2, 1)
    ranks = [len(t) for name, t in state(tmp_path / "run/adapter").items() if "lora_E" in name]
    assert len(ranks) == 4
    assert sum(ranks) == 2 * 4
