import pytest

from lora_cli.commands.writing import with_generation
from lora_cli.config.generation import GenerationConfig, GenerationOverrides
from lora_cli.config.language import Seq2SeqConfig
from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.errors import UserError

TASK = Seq2SeqConfig(prefix="x: ", generation=GenerationConfig(num_beams=3, max_new_tokens=7))


def test_what_is_given_takes_the_place_of_what_was_recorded() -> None:
    assert with_generation(TASK, GenerationOverrides()) is TASK
    found = with_generation(TASK, GenerationOverrides(max_new_tokens=9, length_penalty=0.5))
    assert found == Seq2SeqConfig(
        prefix="x: ",
        generation=GenerationConfig(num_beams=3, max_new_tokens=9, length_penalty=0.5),
    )


def test_families_without_texts_take_no_such_settings() -> None:
    plain = TextClassificationConfig()
    assert with_generation(plain, GenerationOverrides()) is plain
    with pytest.raises(UserError) as caught:
        with_generation(plain, GenerationOverrides(stop=("x",)))
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("predict.no-generation", "generation.stop")
    assert "seq2seq" in (problem.allowed or "")
    assert "text_regression" not in (problem.allowed or "")
    assert set((problem.allowed or "").removeprefix("with an adapter for ").split(" or ")) <= set(
        TASKS
    )


def test_settings_must_go_together_with_what_was_recorded() -> None:
    with pytest.raises(UserError) as caught:
        with_generation(TASK, GenerationOverrides(do_sample=True))
    (problem,) = caught.value.problems
    assert problem.key == "generation.num_beams"
    found = with_generation(TASK, GenerationOverrides(do_sample=True, num_beams=1, top_k=5))
    assert found.generation.top_k == 5  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"generation\.top_k"):
        with_generation(TASK, GenerationOverrides(top_k=5))
