"""Rules of PEFT and transformers: an error exactly where loading fails or gives other logits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from shaken_adapters import ADAPTERS, Made, base_of, fresh, logits
from stranger_adapters import errors, factors, ids, look, write_adapter

from lora_cli.artifacts.peft_methods import METHODS
from lora_cli.artifacts.portability_base import describe_base
from lora_cli.artifacts.portability_peft import CHANGE_BASE

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    folder = tmp_path_factory.mktemp("made")

    @cache
    def make(name: str) -> Made:
        kind, config = ADAPTERS[name]
        sizes = {} if "method" in config else {"r": 4, "lora_alpha": 8}
        return Made(folder / name.replace(" ", "-"), kind, **{**sizes, **config})

    return make


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def valued(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(x).contiguous() for name, x in tensors.items()}


def same(tensors: Tensors) -> Tensors:
    return tensors


# Name: the adapter, what is done to its tensors, and to its config (... leaves a field out).
HURT: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any]]] = {
    **{name: (name, same, {}) for name in ADAPTERS},
    "no prefix": ("plain", renamed("base_model.model.", ""), {}),
    "another prefix": ("plain", renamed("base_model.model.", "base_model."), {}),
    "name of the adapter": ("plain", renamed(".weight", ".default.weight"), {}),
    "no .weight": ("plain", renamed(".weight", ""), {}),
    "names of loralib": ("plain", renamed("lora_A.weight", "lora_down.weight"), {}),
    "small letters": ("plain", renamed("lora_A", "lora_a"), {}),
    "no B": ("plain", without("lora_B"), {}),
    "no A": ("plain", without("lora_A"), {}),
    "transposed": ("plain", valued(lambda x: x.T), {}),
    "other rank": ("plain", same, {"r": 8}),
    "other rank of a layer": ("plain", same, {"rank_pattern": {"q_proj": 2}}),
    "rank without its pattern": ("patterned", same, {"rank_pattern": {}}),
    "targets left out": ("plain", same, {"target_modules": ["q_proj"]}),
    "layers left out": ("plain", same, {"layers_to_transform": [0]}),
    "one layer left out": ("plain", same, {"layers_to_transform": 1}),
    "targets excluded": ("plain", same, {"exclude_modules": ["v_proj"]}),
    "targets by their whole names": (
        "plain",
        same,
        {
            "target_modules": [
                f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"
            ]
        },
    ),
    "layers of another model": ("plain", renamed("layers.1", "layers.9"), {}),
    "module of another name": ("plain", renamed("self_attn", "attention"), {}),
    "no type": ("plain", same, {"peft_type": ...}),
    "unknown type": ("plain", same, {"peft_type": "LORO"}),
    "unknown field": ("plain", same, {"strange": 1}),
    "wrong rank": ("plain", same, {"r": "four"}),
    "float64": ("plain", valued(torch.Tensor.double), {}),
    "NaN": ("plain", valued(lambda x: x * torch.nan), {}),
    "integers": ("plain", valued(lambda x: (10 * x).to(torch.int8)), {}),
    "magnitudes as torch names them": (
        "dora",
        renamed("magnitude_vector", "magnitude_vector.weight"),
        {},
    ),
    "magnitudes lost": ("dora", without("magnitude"), {}),
    "magnitudes not asked for": ("dora", same, {"use_dora": False}),
    "embedding as a layer": ("embedded", renamed("embedding_A", "embedding_A.weight"), {}),
    "start forgotten": ("olora", same, {"init_lora_weights": "olora"}),
    "head lost": ("head", without("classifier"), {}),
    "head lost and not listed": ("head", without("classifier"), {"modules_to_save": None}),
    "head not listed": ("head", same, {"modules_to_save": None}),
    "head of another size": (
        "head",
        lambda tensors: {
            name: x[:2].clone() if "classifier" in name else x for name, x in tensors.items()
        },
        {},
    ),
    "module lost": ("whole", without("lm_head"), {}),
    "module that nothing has": ("plain", same, {"modules_to_save": ["nothere"]}),
    "module within its wrapper": (
        "head",
        renamed("classifier.", "classifier.modules_to_save."),
        {},
    ),
}


def hurt(made: Callable[[str], Made], case: str, folder: Path) -> Made:
    name, change, fields = HURT[case]
    adapter = made(name)
    shutil.copytree(adapter.folder, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = change(load_file(weights))
    save_file({n: x.contiguous() for n, x in tensors.items()}, weights, {"format": "pt"})
    plain = {**json.loads(config.read_text()), **fields}
    config.write_text(json.dumps({n: value for n, value in plain.items() if value is not ...}))
    changed = object.__new__(Made)
    changed.kind, changed.folder, changed.says = adapter.kind, folder, adapter.says
    return changed


def in_peft(adapter: Made) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(fresh(adapter.kind), adapter.folder))


def in_transformers(adapter: Made) -> torch.Tensor:
    model = fresh(adapter.kind)
    model.load_adapter(str(adapter.folder))
    return logits(model)


def is_sound(load: Callable[[Made], torch.Tensor], adapter: Made) -> bool:
    try:
        found = load(adapter)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return False
    return torch.allclose(found, adapter.says, atol=1e-4)


@pytest.mark.parametrize("case", HURT)
def test_an_error_is_told_exactly_where_the_adapter_is_lost(
    case: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    adapter = hurt(made, case, tmp_path / "a")
    base = describe_base(base_of(adapter.kind))
    told = {name: errors(adapter.folder, name, base=base) for name in ("peft", "transformers")}
    assert is_sound(in_peft, adapter) == (not told["peft"]), told
    assert is_sound(in_transformers, adapter) == (not told["transformers"]), told


@pytest.mark.parametrize("name", ADAPTERS)
def test_sound_adapters_have_no_error_without_a_base(
    name: str, made: Callable[[str], Made]
) -> None:
    assert errors(made(name).folder, "peft") == set()


def test_the_cases_cover_sound_and_lost_adapters(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    lost = {case for case in HURT if errors(hurt(made, case, tmp_path / case).folder, "peft")}
    assert 15 < len(lost) < len(HURT) - 15


@pytest.mark.parametrize("name", ["plain", "rslora", "patterned", "layers"])
def test_scales_are_those_of_peft(name: str, made: Callable[[str], Made]) -> None:
    adapter = made(name)
    model = peft.PeftModel.from_pretrained(fresh(adapter.kind), adapter.folder)
    found = look(adapter.folder)
    assert found.pairs
    for path in found.pairs:
        layer: Any = model.base_model.model.get_submodule(path)
        assert found.scale_of(path) == layer.scaling["default"]
        assert found.rank_of(path) == layer.r["default"]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_warned_of(
    start: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    adapter = hurt(made, start, tmp_path / "a")
    assert "peft.start" in ids(adapter.folder, "peft")
    # Without the word of the config, the same tensors mean something else on the base.
    config = adapter.folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": True}))
    assert not is_sound(in_peft, adapter)
    assert start in CHANGE_BASE


@pytest.mark.parametrize("kind", ["gaussian", "eva", "orthogonal", True, False])
def test_starts_that_do_not_are_not(kind: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", init_lora_weights=kind)
    assert ids(folder) == set()


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_are_known_are_those_of_peft(method: str, tmp_path: Path) -> None:
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    known = set(cls(**({"total_step": 10} if method == "ADALORA" else {})).to_dict())
    absent = {"lora_alpha": ..., "r": ...}
    fields = absent | dict.fromkeys(known - {"runtime_config"}) | {"peft_type": method}
    assert "config.unknown-field" not in ids(write_adapter(tmp_path / "a", **fields), "peft")
    assert "config.unknown-field" in ids(write_adapter(tmp_path / "b", peft_type=method, x=1))


def test_kinds_are_those_of_peft(tmp_path: Path) -> None:
    configs = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert len(configs) > 30
    for kind, config in configs.items():
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        refused = tuner is None or getattr(tuner, "uses_shared_state", False)
        refused |= issubclass(config, PromptLearningConfig | peft.AdaptionPromptConfig)
        refused |= config.__name__ == "ShadowConfig"
        name = str(getattr(kind, "value", kind))
        found = errors(write_adapter(tmp_path / name, peft_type=name), "peft", "transformers")
        assert ("transformers.kind" in found) == refused, name
        assert "config.unknown-type" not in found


def test_prompts_are_not_for_load_adapter(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        fresh("lm"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.peft_config["default"].base_model_name_or_path = "org/model"
    model.save_pretrained(tmp_path)
    assert errors(tmp_path, "transformers") == {"transformers.kind"}
    assert errors(tmp_path, "peft") == set()
    with pytest.raises(ValueError, match="prompt"):
        fresh("lm").load_adapter(str(tmp_path))
    logits(peft.PeftModel.from_pretrained(fresh("lm"), tmp_path))


@pytest.mark.parametrize(
    ("version", "is_old"), [("0.18.1", True), (None, True), ("0.19.0", False), ("0.21.2", False)]
)
def test_layout_of_experts(version: str | None, is_old: bool, tmp_path: Path) -> None:
    tensors = factors("model.layers.0.mlp.experts", r=8)
    folder = write_adapter(
        tmp_path / "a", tensors, target_parameters=["experts.down_proj"], peft_version=version
    )
    assert ("peft.experts" in errors(folder, "peft")) == is_old


def test_pickle_alone(made: Callable[[str], Made], tmp_path: Path) -> None:
    adapter = hurt(made, "plain", tmp_path / "a")
    weights = adapter.folder / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter.folder / "adapter_model.bin")
    assert ids(adapter.folder, "peft") == {"file.second"}
    weights.unlink()
    assert errors(adapter.folder, "transformers") == {"file.no-safetensors"}
    assert ids(adapter.folder, "peft") == {"file.pickle"}
    assert is_sound(in_peft, adapter)
    with pytest.raises(FileNotFoundError):
        in_transformers(adapter)


def test_attention_in_one_module_is_warned_of(tmp_path: Path) -> None:
    tensors = {**factors("attention"), **factors("attention.base_layer.out_proj")}
    folder = write_adapter(tmp_path / "a", tensors, target_modules=["attention"])
    assert ids(folder, "peft") == {"peft.attention"}


def test_without_the_base_a_module_that_is_not_in_the_file_is_an_error(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    folder = hurt(made, "module that nothing has", tmp_path / "a").folder
    assert errors(folder, "peft") == {"head.absent"}
    base = describe_base(base_of("lm"))
    assert ids(folder, "peft", base=base) == {"base.saved"}
    assert errors(folder, "peft", base=replace(base, modules=frozenset({"nothere"})))
