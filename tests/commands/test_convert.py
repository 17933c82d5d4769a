"""`lora-cli convert`: files of other programs, made by hand, run by peft as plain algebra says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from foreign_adapters import (
    HEADS,
    KV_HEADS,
    SHAPES,
    added_logits,
    peft_logits,
    updates,
    write_adapter,
    write_llama,
)
from safetensors.torch import load_file

# peft asks a transformers model for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def convert(run_cli: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(adapter: Path, *more: str) -> Any:
        output = f"output={tmp_path / 'out'}"
        return run_cli("convert", f"adapter={adapter}", output, "--json", *more, cwd=tmp_path)

    return run


def fails(done: Any, problem: str, *words: str) -> None:
    assert done.code == 2, done.err
    assert f"error[{problem}]" in done.err, done.err
    for word in words:
        assert word in done.err, done.err


def loralib(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates({name: 2 + n for n, name in enumerate(SHAPES)})
    tensors = {f"{name}.lora_A": a for name, (a, _) in found.items()}
    tensors |= {f"{name}.lora_B": b for name, (_, b) in found.items()}
    deltas = {name: 6 / len(a) * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, name="lora.safetensors"), deltas


def mlx(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates(3)
    tensors = {f"{name}.lora_a": a.T for name, (a, _) in found.items()}
    tensors |= {f"{name}.lora_b": b.T for name, (_, b) in found.items()}
    config = {
        "model": "some/llama",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 0.7, "dropout": 0.0},
    }
    deltas = {name: 0.7 * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, config, name="adapters.safetensors"), deltas


TORCHTUNE = dict(
    zip(
        SHAPES,
        (
            "layers.0.attn.q_proj",
            "layers.0.attn.k_proj",
            "layers.1.attn.v_proj",
            "layers.1.mlp.w2",
        ),
        strict=True,
    )
)


def torchtune(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found, tensors = updates(3), {}
    for name, theirs in TORCHTUNE.items():
        a, b = found[name]
        for suffix, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if name.endswith(suffix):
                # In their order, the two halves of each head alternate.
                b = b.view(heads, 2, -1, 3).transpose(1, 2).reshape(b.shape)
        tensors |= {f"{theirs}.lora_a.weight": a, f"{theirs}.lora_b.weight": b}
    config = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "w2"]}
    deltas = {name: 4 * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, config), deltas


def kohya(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates({name: 2 + n for n, name in enumerate(SHAPES)})
    tensors, deltas = {}, {}
    for n, (name, (a, b)) in enumerate(found.items()):
        spelled = f"lora_te_{name.replace('.', '_')}"
        tensors |= {f"{spelled}.lora_down.weight": a, f"{spelled}.lora_up.weight": b}
        scale = 1.0
        if n:  # the first has no alpha, which means its rank
            tensors[f"{spelled}.alpha"] = torch.tensor(float(n))
            scale = n / len(a)
        deltas[name] = scale * b @ a
    return write_adapter(folder, tensors, name="kohya.safetensors"), deltas


@pytest.mark.parametrize(
    ("write", "name", "more"),
    [
        (loralib, "loralib", ["alpha=6"]),
        (mlx, "mlx-lm", []),
        (torchtune, "torchtune", []),
        (kohya, "kohya", []),
    ],
)
def test_peft_computes_what_the_file_means(
    write: Any, name: str, more: list[str], base: Path, convert: Any, tmp_path: Path
) -> None:
    adapter, deltas = write(tmp_path / "in")
    done = convert(adapter, f"base={base}", *more)
    assert done.code == 0, done.err
    result = done.lines[0]
    assert (result["format"], set(result["layers"])) == (name, set(SHAPES))
    assert result["checked_with_base"]
    expected = added_logits(base, deltas)
    assert (expected - added_logits(base, {})).abs().max() > 1e-2
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(base), "CAUSAL_LM")


def test_a_folder_of_mlx_names_its_base(convert: Any, base: Path, tmp_path: Path) -> None:
    adapter, deltas = mlx(tmp_path / "in")
    done = convert(adapter)
    assert done.code == 0, done.err
    assert (done.lines[0]["base"], done.lines[0]["checked_with_base"]) == ("some/llama", False)
    assert "shapes were not checked" in done.err
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "out"), added_logits(base, deltas), rtol=1e-4, atol=1e-4
    )


@pytest.fixture(scope="module")
def peft_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that peft wrote, of several ranks and strengths."""
    folder = tmp_path_factory.mktemp("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"model.layers.1.mlp.down_proj": 7},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    found = peft.get_peft_model(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for name, tensor in found.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(tensor)
    found.save_pretrained(folder)
    return folder


def test_more_rank_changes_no_logit(
    peft_adapter: Path, base: Path, convert: Any, tmp_path: Path
) -> None:
    done = convert(peft_adapter, "r=9")
    assert done.code == 0, done.err
    assert {layer["r"] for layer in done.lines[0]["layers"].values()} == {9}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (9, {})
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "out"), peft_logits(base, peft_adapter), rtol=1e-5, atol=1e-5
    )


def test_less_rank_is_the_closest_update(peft_adapter: Path, convert: Any, tmp_path: Path) -> None:
    done = convert(peft_adapter, "r=2")
    assert done.code == 0, done.err
    before, after = (load_file(p / "adapter_model.safetensors") for p in
                     (peft_adapter, tmp_path / "out"))  # fmt: skip
    whole, kept = 0.0, 0.0
    for name, found in done.lines[0]["layers"].items():
        keys = [f"base_model.model.{name}.lora_{half}.weight" for half in "BA"]
        old, new = ((t[keys[0]].double() @ t[keys[1]].double()).numpy() for t in (before, after))
        u, s, vt = np.linalg.svd(old)
        np.testing.assert_allclose(new, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)
        assert found["energy"] == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-5)
        whole += found["scale"] ** 2 * float((s**2).sum())
        kept += found["scale"] ** 2 * float((s[:2] ** 2).sum())
    assert done.lines[0]["energy"] == pytest.approx(kept / whole, rel=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name, found in done.lines[0]["layers"].items():
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert alpha / config["r"] ** 0.5 == pytest.approx(found["scale"], rel=1e-9)


def test_a_run_keeps_its_record(tiny_run: Any, convert: Any, run_cli: Any, tmp_path: Path) -> None:
    done = convert(tiny_run.path, "r=9", f"base={tiny_run.base}")
    assert done.code == 0, done.err
    assert done.lines[0]["format"] == "lora-cli"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a good movie"}\n{"text": "bad"}\n')
    found = []
    for adapter in (tiny_run.path, tmp_path / "out"):
        more = () if adapter == tiny_run.path else (f"base={tiny_run.base}",)
        ran = run_cli("predict", adapter, f"input={rows}", *more, cwd=tmp_path)
        assert ran.code == 0, ran.err
        lines = [json.loads(line) for line in ran.out.splitlines()]
        found.append([list(line["probabilities"].values()) for line in lines])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_a_base_that_does_not_fit_is_refused(
    peft_adapter: Path, base: Path, convert: Any, tmp_path: Path
) -> None:
    adapter, _ = loralib(tmp_path / "in")
    fails(convert(adapter), "convert.no-base", "error[convert.no-scale]")
    fails(convert(adapter, f"base={base}"), "convert.no-scale")
    fails(convert(peft_adapter, "alpha=4"), "convert.scale-twice")
    fails(convert(adapter, "alpha=1", "base=./none"), "model.no-such-folder", "`base`")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)
    other = tmp_path / "other"
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    fails(convert(adapter, "alpha=1", f"base={other}"), "convert.unknown-layer", "q_proj")
    fails(convert(torchtune(tmp_path / "tune")[0]), "convert.no-base")
    fails(convert(tmp_path / "tune", f"base={other}"), "convert.unsupported", "gpt2")
    fails(convert(kohya(tmp_path / "kohya")[0]), "convert.no-base")
    fails(convert(tmp_path / "kohya", f"base={other}"), "convert.unknown-layer")
    assert not (tmp_path / "out").exists()
