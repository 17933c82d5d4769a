from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tiny_scenes import tiny_rt_detr

from lora_cli.errors import UserError
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.heads import load_with_head, sees_later_tokens
from lora_cli.tasks.table import FAMILIES

STATE = {"columns": {}, "low": 0.0, "high": 9.0, "mean": 7.5}


def test_a_new_head_is_started_and_one_that_is_there_is_not(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    family, source = FAMILIES["text_regression"], resolve_model(str(tiny_model_dir()))
    new = load_with_head(source, family, STATE, dtype="auto", seed=1).model
    assert new.classifier.bias.tolist() == [7.5]
    new.classifier.bias.data.fill_(2.0)
    new.save_pretrained(tmp_path)
    for path in Path(source.folder).glob("token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    trained = resolve_model(str(tmp_path))
    again = load_with_head(trained, family, STATE, dtype="auto", seed=1).model
    assert again.classifier.bias.tolist() == [2.0]


DECODERS = ["llama", "gpt2", "qwen2", "gpt_neox"]


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_see_no_later_token(tiny_language_dir: Callable[..., Path], kind: str) -> None:
    family, source = (
        FAMILIES["causal_language_modeling"],
        resolve_model(str(tiny_language_dir(kind))),
    )
    base = load_with_head(source, family, {}, dtype="bfloat16", seed=1)
    assert not sees_later_tokens(base.model)


@pytest.mark.parametrize("name", ["causal_language_modeling", "chat", "answer_choice"])
def test_an_encoder_is_no_decoder(tiny_model_dir: Callable[..., Path], name: str) -> None:
    family, source = FAMILIES[name], resolve_model(str(tiny_model_dir()))
    state = {"columns": {}, "labels": ["a", "b"]}
    with pytest.raises(UserError) as error:
        load_with_head(source, family, state, dtype="auto", seed=1)
    (problem,) = error.value.problems
    assert problem.id == "model.no-decoder"
    assert "this bert is shown those behind it too" in problem.message


def test_a_detector_of_other_classes_gets_new_layers_for_them(tmp_path: Path) -> None:
    config = tiny_rt_detr()
    config.num_labels = 5
    transformers.RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path), processor=None)
    state = {"labels": ["blue", "red"]}
    base = load_with_head(source, FAMILIES["object_detection"], state, dtype="float32", seed=0)
    parts = {".".join(name.split(".")[:3]) for name in base.new_keys}
    assert parts == {
        "model.decoder.class_embed",
        "model.denoising_class_embed.weight",
        "model.enc_score_head.weight",
        "model.enc_score_head.bias",
    }


def test_a_part_that_is_taken_out_is_not_new(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.BeitConfig(
        **sizes,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        pool_scales=[1],
    )
    transformers.BeitModel(config).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path), processor=None)
    state = {"labels": ["ground", "red"]}
    base = load_with_head(source, FAMILIES["semantic_segmentation"], state, dtype="float32", seed=0)
    assert any(name.startswith("decode_head.") for name in base.new_keys)
    assert not any("auxiliary" in name for name in base.new_keys)
