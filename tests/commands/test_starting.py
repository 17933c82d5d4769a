"""Every start of the adapters in a whole run: trained, loaded by PEFT, merged, resumed."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.commands.opening import open_adapter
from lora_cli.commands.preparing import prepare
from lora_cli.commands.starting import sample_batches

WEIGHTS = Path("adapter", "adapter_model.safetensors")
STARTS = {
    "gaussian": ("lora.init=gaussian",),
    "pissa": ("lora.init=pissa",),
    "pissa-dora-rslora": ("lora.init=pissa", "lora.variant=dora", "lora.rslora=true"),
    "pissa-niter": ("lora.init=pissa", "lora.pissa_niter=4", "lora.rank_pattern={value:6}"),
    "olora-fa": ("lora.init=olora", "lora.variant=lora_fa"),
    "eva": ("lora.init=eva", "lora.eva.rows=24"),
    "eva-rslora": ("lora.init=eva", "lora.rslora=true", "lora.rank_pattern={query:6}"),
}


def arguments(tiny_run: Any, *more: str) -> tuple[str, ...]:
    """The settings of the tiny run, but for those given."""
    given = {text.partition("=")[0] for text in more}
    kept = [text for text in tiny_run.settings if text.partition("=")[0] not in given]
    return ("train", *kept, *more, "run.dir=a")


def train(run_cli: Any, tiny_run: Any, cwd: Path, *more: str) -> Any:
    finished = run_cli(*arguments(tiny_run, *more), cwd=cwd)
    assert finished.code == 0, finished.err
    return finished


def config_of(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return config


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peft_probabilities(base: Path, run: Path, texts: Sequence[str]) -> torch.Tensor:
    """What PEFT says with the adapter on the base model as it is on disk."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    adapted = PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        logits: torch.Tensor = adapted(**inputs).logits
    return logits.softmax(-1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", STARTS)
def test_a_run_is_loaded_by_peft_and_resumes_bit_for_bit(
    name: str, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    finished = train(run_cli, tiny_run, tmp_path, *STARTS[name])
    run = tmp_path / "a"
    result = json.loads((run / "result.json").read_text())
    assert result["merged"]["loss"] == pytest.approx(result["adapter"]["loss"], abs=1e-5)
    assert result["base"]["loss"] != pytest.approx(result["adapter"]["loss"], abs=1e-4)
    plain = json.loads((tiny_run.path / "result.json").read_text())
    assert result["base"] == pytest.approx(plain["base"], abs=1e-6)

    # The file is of ordinary updates on the untouched base.
    assert config_of(run)["init_lora_weights"] is True
    rows = lines_of(tiny_run.data / "validation.jsonl")
    found = [line["probabilities"] for line in lines_of(run / "predictions" / "validation.jsonl")]
    expected = torch.tensor([list(line.values()) for line in found])
    theirs = peft_probabilities(tiny_run.base, run, [row["text"] for row in rows])
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)
    evaluated = run_cli("eval", "a", "split=validation", "--json", cwd=tmp_path)
    assert evaluated.lines[0]["adapter"] == pytest.approx(result["adapter"], abs=1e-5)

    # As if it had stopped at step 3.
    weights = (run / WEIGHTS).read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "result.json").unlink()
    resumed = train(run_cli, tiny_run, tmp_path, *STARTS[name], "--resume")
    assert "resuming after step 3" in resumed.err
    assert (run / WEIGHTS).read_bytes() == weights
    notes = [re.findall(r"^eva: .*$", text, re.MULTILINE) for text in (finished.err, resumed.err)]
    assert notes[0] == notes[1]
    assert len(notes[0]) == ("eva" in name)


@pytest.mark.parametrize(("init", "factor"), [("pissa", 2), ("kaiming", 1)])
def test_files_are_twice_as_wide_and_checkpoints_are_not(
    init: str, factor: int, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    train(run_cli, tiny_run, tmp_path, f"lora.init={init}")
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (4 * factor, 16 * factor)
    layer = "bert.encoder.layer.0.attention.self.query"
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert tensors[f"base_model.model.{layer}.lora_A.weight"].shape == (4 * factor, 32)
    live = load_file(tmp_path / "a" / "checkpoints" / "step-00000004" / "adapter.safetensors")
    assert live[f"{layer}.lora_A.weight"].shape == (4, 32)
    assert (f"{layer}.start_A" in live) == (factor == 2)


def test_eva_spreads_the_ranks_and_keeps_the_scale(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = ("lora.init=eva", "lora.targets=all-linear", "lora.eva.rho=3")
    finished = train(run_cli, tiny_run, tmp_path, *settings)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    # Six linear layers in each of two blocks.
    assert sum(ranks.values()) == 12 * 4
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 12
    config = config_of(tmp_path / "a")
    assert config["rank_pattern"] == {name: r for name, r in ranks.items() if r != 4}
    assert config["alpha_pattern"] == {name: 4 * r for name, r in ranks.items() if r != 4}
    text = f"eva: 48 ranks spread over 12 layers by 64 training rows: {min(ranks.values())} to "
    assert text + str(max(ranks.values())) in finished.err


class Notes:
    """A display that nobody looks at."""

    def note(self, text: str) -> None: ...

    def table(self, *_: Any, **__: Any) -> None: ...

    def track(self, label: str, items: Sequence[Any]) -> Iterator[Any]:
        yield from items


def test_eva_looks_at_training_rows_that_the_seed_draws(tiny_run: Any) -> None:
    config = open_adapter(str(tiny_run.path), base=None).config
    display: Any = Notes()
    prepared = prepare(config, display)
    rows = prepared.splits.rows["train"]

    def drawn(seed: int, count: int) -> list[str]:
        chosen = replace(
            config, seed=seed, lora=replace(config.lora, eva=replace(config.lora.eva, rows=count))
        )
        return [i for b in sample_batches(prepared.task, rows, chosen) for i in b["ids"]]

    assert len(set(drawn(1, 20))) == len(drawn(1, 20)) == 20
    assert drawn(1, 20) == drawn(1, 20)
    assert set(drawn(1, 20)) != set(drawn(2, 20))
    assert set(drawn(1, 9999)) == {row.id for row in rows}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("lora.init=pissa", "lora.r=33"), "lora.init-rank"),
        (("lora.init=olora", "lora.targets=[query,word_embeddings]"), "lora.init-kind"),
        (("lora.init=eva", "lora.targets=[query,word_embeddings]"), "lora.init-kind"),
        (("lora.init=eva", "lora.eva.rows=1", "lora.r=20"), "lora.eva-rows"),
    ],
)
def test_what_cannot_start_so_is_refused_before_anything_is_written(
    settings: tuple[str, ...], problem: str, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    refused = run_cli(*arguments(tiny_run, *settings), cwd=tmp_path)
    assert refused.code == 2, refused.err
    assert f"error[{problem}]" in refused.err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_starts_on_a_real_model(
    init: str,
    minilm_package: str,
    tiny_run: Any,
    run_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    finished = run_cli(
        *("train", "model=minilm", "trainer=short", f"task.data.path={tiny_run.data}"),
        *(f"lora.init={init}", "run.dir=a"),
        cwd=tmp_path,
    )
    assert finished.code == 0, finished.err
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["merged"]["loss"] == pytest.approx(result["adapter"]["loss"], abs=1e-4)
    assert result["adapter"]["loss"] < result["base"]["loss"]
    merged = run_cli("merge", "a", "--json", cwd=tmp_path)
    assert merged.code == 0, merged.err
    assert merged.lines[0]["max_abs_difference"] < 1e-4
