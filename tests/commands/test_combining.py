"""`lora-cli merge adapters=[...]`: against plain algebra on the files, and read back by PEFT."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.artifacts.commit import describe_files, document_sha256
from lora_cli.artifacts.peft_format import load_peft
from lora_cli.commands import combining
from lora_cli.lora.combine import Blend, combine_factors
from lora_cli.lora.factors import factor_state, read_factors
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.settings import LoraSettings

# PEFT asks a model for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

METHODS = ("linear", "cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune")
TEXTS = ("a good film", "the plot was awful and long", "we like this warm story")
WEIGHTS = "adapter_model.safetensors"


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """Scale times B A by layer, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        r = config["rank_pattern"].get(layer, config["r"])
        alpha = config["alpha_pattern"].get(layer, config["lora_alpha"])
        assert a.shape[0] == r
        scale = alpha / (r**0.5 if config["use_rslora"] else r)
        found[layer] = scale * tensors[name.replace("lora_A", "lora_B")] @ a
    return found


def head(adapter: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(adapter / WEIGHTS).items() if ".lora_" not in n}


def logits(base: Path, tokenizer: Any, prepare: Callable[[Any], Any]) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = prepare(model).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(
            **tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        ).logits
    return found


def by_hand(model: Any, changes: dict[str, torch.Tensor], heads: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        for layer, change in changes.items():
            model.get_submodule(layer).weight += change
        for name, tensor in heads.items():
            model.get_parameter(name.removeprefix("base_model.model.")).copy_(tensor)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_every_combination(
    combining_runs: Path, tiny_run: Any, merge_adapters: Any, tmp_path: Path, method: str
) -> None:
    finished = merge_adapters("a", "b", f"method={method}", "weights=[0.7,0.3]")
    assert finished.code == 0, finished.err
    out, tokenizer = tmp_path / "out", AutoTokenizer.from_pretrained(tiny_run.base)
    read = logits(tiny_run.base, tokenizer, lambda m: PeftModel.from_pretrained(m, out))
    expected = logits(tiny_run.base, tokenizer, lambda m: by_hand(m, updates(out), head(out)))
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    alone = [updates(combining_runs / name / "adapter") for name in "ab"]
    combined = updates(out)
    assert combined.keys() == alone[0].keys()
    difference = max(
        float((combined[n] - 0.7 * alone[0][n] - 0.3 * alone[1][n]).abs().max()) for n in combined
    )
    size = max(float(update.abs().max()) for update in alone[0].values())
    if method == "cat":
        assert difference < 1e-5 * size
    else:
        assert 1e-4 * size < difference < 5 * size
    for name, tensor in head(out).items():
        parts = [head(combining_runs / run / "adapter")[name] for run in "ab"]
        torch.testing.assert_close(tensor, 0.7 * parts[0] + 0.3 * parts[1])


@pytest.mark.parametrize("weights", ["[2,0.5]", "[1,-0.5]", None])
def test_the_merged_model_is_the_weighted_sum(
    combining_runs: Path, tiny_run: Any, merge_adapters: Any, tmp_path: Path, weights: str | None
) -> None:
    given = [] if weights is None else [f"weights={weights}"]
    finished = merge_adapters(
        "a", "b", "c", "method=cat", *(w[:-1] + ",0.25]" for w in given), into="model"
    )
    assert finished.code == 0, finished.err
    assert "merged against adapter on validation: 32 rows" in finished.err
    w = [*json.loads(weights), 0.25] if weights else [1, 1, 1]
    parts = [combining_runs / name / "adapter" for name in "abc"]
    changes: dict[str, torch.Tensor] = {}
    for weight, part in zip(w, parts, strict=True):
        for layer, update in updates(part).items():
            changes[layer] = changes.get(layer, 0) + weight * update
    shares = torch.tensor(w) / sum(w)
    heads = {
        name: torch.stack([s * head(p)[name] for s, p in zip(shares, parts, strict=True)]).sum(0)
        for name in head(parts[0])
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.base)
    expected = logits(tiny_run.base, tokenizer, lambda m: by_hand(m, changes, heads))
    found = logits(tmp_path / "out", tokenizer, lambda m: m)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = logits(tiny_run.base, tokenizer, lambda m: by_hand(m, {}, heads))
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "expected_ranks"),
    [(["method=cat"], {2, 4, 6}), (["method=svd"], {2, 4}), (["method=svd", "r=3"], {2, 3})],
)
def test_ranks_by_layer(
    tiny_run: Any,
    merge_adapters: Any,
    run_cli: Any,
    tmp_path: Path,
    settings: list[str],
    expected_ranks: set[int],
) -> None:
    """Layers of one adapter only, and of both: ranks differ, every reader agrees on them."""
    finished = merge_adapters("c", "a", *settings)
    assert finished.code == 0, finished.err
    out, tokenizer = tmp_path / "out", AutoTokenizer.from_pretrained(tiny_run.base)
    config = json.loads((out / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == expected_ranks
    read = logits(tiny_run.base, tokenizer, lambda m: PeftModel.from_pretrained(m, out))
    expected = logits(tiny_run.base, tokenizer, lambda m: by_hand(m, updates(out), head(out)))
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(TEXTS) + "\n")
    predicted = run_cli("predict", out, f"input={rows}", "--quiet", cwd=tmp_path)
    assert predicted.code == 0, predicted.err
    shares = torch.tensor([list(line["probabilities"].values()) for line in predicted.lines])
    torch.testing.assert_close(shares, expected.softmax(-1), rtol=1e-3, atol=1e-3)


def test_the_adapter_says_where_it_is_from(
    combining_runs: Path, tiny_run: Any, merge_adapters: Any, run_cli: Any, tmp_path: Path
) -> None:
    finished = merge_adapters(
        "a", "b", "method=dare_ties", "weights=[1,0.5]", "density=0.75", "seed=3"
    )
    assert finished.code == 0, finished.err
    out = tmp_path / "out"
    record = json.loads((out / "lora_cli.json").read_text())
    origin = record["combined"]
    assert {name: origin[name] for name in origin if name != "adapters"} == {
        "method": "dare_ties",
        "density": 0.75,
        "majority_sign": "total",
        "seed": 3,
    }
    assert [(part["name"], part["weight"]) for part in origin["adapters"]] == [("a", 1), ("b", 0.5)]
    card = (out / "README.md").read_text()
    assert "combined from 2 others" in card
    for part in origin["adapters"]:
        assert part["sha256"] in card
    assert str(tmp_path) not in card
    assert str(combining_runs) not in card + json.dumps(record["combined"])
    assert record["metrics"] == {}
    assert record["config"]["lora"]["alpha"] == record["config"]["lora"]["r"] == 4
    (result,) = finished.lines
    assert result == {"output": str(out), "bytes": result["bytes"], **origin}
    assert result["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert (
        "combined 2 adapters with dare_ties (density 0.75, majority_sign total, seed 3): 4 lay"
        in (finished.err)
    )
    evaluated = run_cli("eval", out, f"task.data.path={tiny_run.data}", "--json", cwd=tmp_path)
    assert evaluated.code == 0, evaluated.err
    assert evaluated.lines[0]["adapter"] == pytest.approx(evaluated.lines[0]["merged"], abs=1e-4)
    again = merge_adapters("a", "b", "method=cat")
    assert again.code == 2
    assert "error[output.exists]" in again.err
    assert merge_adapters("a", "b", "method=cat", "--overwrite").code == 0
    assert '"method": "cat"' in (out / "lora_cli.json").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dare_linear", "density": 0.25, "seed": 3},
        {"method": "ties", "density": 0.75, "majority_sign": "frequency"},
        {"method": "magnitude_prune", "density": 0.25},
    ],
)
def test_every_setting_arrives(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The file holds what the pure functions, which are tested against PEFT, give."""
    given = [f"{name}={value}" for name, value in settings.items()]
    assert merge_adapters("a", "b", "weights=[0.7,-0.3]", *given).code == 0
    parts = []
    for folder in (combining_runs / "a" / "adapter", combining_runs / "b" / "adapter"):
        adapter = load_peft(folder)
        parts.append(
            read_factors(adapter.state, adapter.saved_modules, adapter.settings, where="")[0]
        )
    expected = combine_factors(parts, Blend(weights=[0.7, -0.3], **settings))
    found = load_peft(tmp_path / "out").state
    for name, tensor in factor_state(expected).items():
        assert torch.equal(found[name], tensor)


def test_one_adapter_can_be_made_weaker(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path
) -> None:
    finished = merge_adapters("a", "weights=[0.25]")
    assert finished.code == 0, finished.err
    whole, found = updates(combining_runs / "a" / "adapter"), updates(tmp_path / "out")
    for layer, update in found.items():
        torch.testing.assert_close(update, 0.25 * whole[layer], rtol=1e-4, atol=1e-6)
    for name, tensor in head(tmp_path / "out").items():
        torch.testing.assert_close(tensor, head(combining_runs / "a" / "adapter")[name])


def test_a_wrong_merge_is_never_written(
    merge_adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: LoraLinear) -> nn.Module:
        plain = nn.Linear(layer.base_layer.in_features, layer.base_layer.out_features)
        plain.load_state_dict(layer.base_layer.state_dict())
        return plain

    monkeypatch.setattr(LoraLinear, "merged", wrong)
    finished = merge_adapters("a", "b", into="model")
    assert finished.code == 1
    assert "error[merge.differs]" in finished.err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_as_for_the_first(
    combining_runs: Path, merge_adapters: Any, tmp_path: Path
) -> None:
    other = tmp_path / "copy"
    shutil.copytree(combining_runs / "b" / "adapter", other)
    note = "the adapters read rows differently; the settings of the first are used"
    record = other / "lora_cli.json"
    document = json.loads(record.read_text())
    document["config"]["task"]["data"]["path"] = "elsewhere.jsonl"
    record.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    assert note not in merge_adapters("a", str(other)).err
    document["config"]["task"]["max_length"] = 48
    record.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    finished = merge_adapters("a", str(other), "--overwrite")
    assert finished.code == 0, finished.err
    assert note in finished.err
    made = json.loads((tmp_path / "out" / "lora_cli.json").read_text())
    assert made["config"]["task"]["max_length"] == 32


def test_on_a_base_of_lower_precision(
    tiny_run: Any, tiny_model_dir: Any, run_cli: Any, tmp_path: Path
) -> None:
    """The head is float32 there, with casts around it: once only, however many go through."""
    base = tiny_model_dir(dtype="bfloat16")
    kept = [s for s in tiny_run.settings if not s.startswith("model.path")]
    settings = [*kept, f"model.path={base}", f"run.dir={tmp_path / 'x'}"]
    assert run_cli("train", *settings, "--quiet", cwd=tmp_path).code == 0
    shutil.copytree(tmp_path / "x" / "adapter", tmp_path / "y" / "adapter")
    tensors = load_file(tmp_path / "y" / "adapter" / WEIGHTS)
    halved = {n: t * (-0.5 if ".lora_A" in n else 1) for n, t in tensors.items()}
    save_file(halved, tmp_path / "y" / "adapter" / WEIGHTS, {"format": "pt"})
    record = tmp_path / "y" / "adapter" / "lora_cli.json"
    document = json.loads(record.read_text())
    document["files"] |= describe_files({WEIGHTS: record.with_name(WEIGHTS).read_bytes()})
    record.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    finished = run_cli(
        *("merge", f"adapters=[{tmp_path / 'x'},{tmp_path / 'y'}]", "method=cat", "--json"),
        f"output={tmp_path / 'out'}",
        cwd=tmp_path,
    )
    assert finished.code == 0, finished.err
    assert finished.lines[0]["dtype"] == "bfloat16"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    parts = [tmp_path / name / "adapter" for name in "xy"]
    for layer in updates(parts[0]):
        before = plain[f"{layer.removeprefix('bert.')}.weight"].float()
        expected = before + updates(parts[0])[layer] + updates(parts[1])[layer]
        torch.testing.assert_close(merged[f"{layer}.weight"], expected.bfloat16())


def test_adapters_are_taken_out_again_with_those_inside_of_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 4), nn.Embedding(5, 8))
    plain, names = copy.deepcopy(model), [name for name, _ in model.named_modules()]
    inject_lora(model, ["0", "1", "2"], LoraSettings(r=2, alpha=4.0))
    assert len(list(model.modules())) > len(names)
    combining._detach(model)
    assert [name for name, _ in model.named_modules()] == names
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    x = torch.randn(3, 1, 8)
    assert torch.equal(model[0](x, x, x)[0], plain[0](x, x, x)[0])
