import hashlib
import json
import shutil
import subprocess
import sys
import time

import pytest

from lora_cli.errors import UserError
from lora_cli.models.sources import check_sha256, resolve_model
from lora_cli.models.weights import hash_weights


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir(), tmp_path / "model")


def ids_of(path, **options):
    with pytest.raises(UserError) as caught:
        resolve_model(str(path), **options)
    assert all(problem.key == "model.path" for problem in caught.value.problems)
    return [problem.id.removeprefix("model.") for problem in caught.value.problems]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder, *names, **weight_map):
    """Turn the weights into shards; the first holds them all."""
    (folder / "model.safetensors").rename(folder / names[0])
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)
    mapping = {f"w{n}": name for n, name in enumerate(names)} | weight_map
    index = {"metadata": {}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_local_folder_and_its_hash(folder):
    source = resolve_model(str(folder))
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (source.folder, source.revision, source.sha256) == (folder, None, expected)
    check_sha256(source, expected.upper())
    check_sha256(source, None)
    with pytest.raises(UserError) as caught:
        check_sha256(source, "0" * 64)
    assert caught.value.problems[0].id == "model.other-weights"


def test_the_hash_of_shards_covers_names_and_contents(folder):
    shard(folder, "b.safetensors", "a.safetensors")
    digest = hashlib.sha256((folder / "a.safetensors").read_bytes()).hexdigest()
    lines = f"a.safetensors {digest}\nb.safetensors {digest}\n"
    assert resolve_model(str(folder)).sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_one_changed_bit_changes_the_hash(folder):
    before = hash_weights(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert hash_weights(folder) != before


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3, None, ""]
)
def test_shards_outside_the_folder_are_refused(folder, name):
    shard(folder, "a.safetensors", w9=name)
    assert ids_of(folder) == ["bad-index"]


def test_bad_indexes_and_shards(folder):
    shard(folder, "a.safetensors", w9="missing.safetensors")
    assert ids_of(folder) == ["missing-shard"]
    for content in ("{", "[]", "{}", '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert ids_of(folder) == ["bad-index"]


@pytest.mark.parametrize("size", [0, 4, 200])
def test_damaged_weights(folder, size):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert ids_of(folder) == ["damaged-weights"]


def test_pickles_are_refused_with_a_way_to_convert(folder):
    (folder / "model.safetensors").unlink()
    assert ids_of(folder) == ["no-weights"]
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        resolve_model(str(folder))
    problem = caught.value.problems[0]
    assert "pytorch_model.bin" in problem.message
    assert "save_pretrained" in problem.fix


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_bad_configs(folder, content):
    (folder / "config.json").write_text(content)
    assert ids_of(folder) == ["bad-config"]


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "x.Model"}},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {}}},
        {"_attn_implementation_internal": "x/kernel"},
        {"sub": [{"_experts_implementation_internal": "x"}]},
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_configs_that_ask_for_code(folder, name, changes):
    (folder / "x.py").write_text("raise RuntimeError")
    edit(folder / name, **changes)
    assert ids_of(folder) == ["asks-for-code"]


def test_quantized_models(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert ids_of(folder) == ["quantized"]


def test_everything_that_is_missing_is_reported_together(tmp_path):
    assert ids_of(tmp_path) == ["no-config", "no-weights", "no-tokenizer"]
    assert ids_of(tmp_path, processor=None) == ["no-config", "no-weights"]


def test_an_adapter_is_no_base(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert ids_of(folder) == ["is-adapter"]


@pytest.mark.parametrize("path", ["./none", "/none", "~/none", "a/b/c", "", "a b"])
def test_folders_that_do_not_exist(path):
    assert ids_of(path) == ["no-such-folder"]


def test_a_file_is_no_folder(folder):
    assert ids_of(folder / "config.json") == ["no-such-folder"]


def test_an_unreachable_hub_is_said_soon():
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        resolve_model("nobody/no-such-model")
    problem = caught.value.problems[0]
    assert problem.id == "model.hub-unreachable"
    assert "the hub cannot be reached" in problem.message
    assert "model.path=DIR, or, for texts, model=minilm" in problem.fix
    assert time.monotonic() - start < 5


def test_models_in_the_hub_cache_are_found(folder, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / commit
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = resolve_model("some/model", revision="main")
    assert (source.name, source.revision) == ("some/model", commit)
    assert asked["revision"] == "main"
    assert not any(".bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_the_package_with_minilm(minilm_package):
    source = resolve_model(f"pkg://{minilm_package}/model")
    assert source.sha256.startswith("53aa51172d142c89")


def test_torch_is_not_imported():
    code = (
        "import sys; from lora_cli.models import sources; from pathlib import Path\n"
        "try: sources.resolve_model('./none')\n"
        "except Exception: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
