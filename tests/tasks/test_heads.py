from collections.abc import Callable
from pathlib import Path

import pytest

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
