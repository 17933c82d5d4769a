from typing import Any

import pytest

from lora_cli.commands.writing import for_evaluation, with_generation
from lora_cli.config.audio import SpeechRecognitionSeq2SeqConfig
from lora_cli.config.generation import GenerationConfig, GenerationOverrides
from lora_cli.config.language import CausalLanguageModelingConfig, ChatConfig, Seq2SeqConfig
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


def test_an_evaluation_writes_texts_on_request() -> None:
    plain, none = ChatConfig(), GenerationOverrides()
    assert for_evaluation(plain, generate=None, generation=none) is plain
    found = for_evaluation(plain, generate=True, generation=GenerationOverrides(num_beams=2))
    assert found == ChatConfig(generate_in_eval=True, generation=GenerationConfig(num_beams=2))
    found = for_evaluation(TASK, generate=False, generation=none)
    assert (found.generate_in_eval, found.metric) == (False, "loss")  # type: ignore[union-attr]
    speech = SpeechRecognitionSeq2SeqConfig(generate_in_eval=True)
    found = for_evaluation(speech, generate=False, generation=GenerationOverrides())
    assert (found.generate_in_eval, found.metric) == (False, "loss")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("task", "generate", "key", "fix"),
    [
        (ChatConfig(), None, "generation.num_beams", "add generate=true"),
        (TASK, False, "generation.num_beams", "add generate=true"),
        (CausalLanguageModelingConfig(), None, "generation.num_beams", "leave it out"),
        (CausalLanguageModelingConfig(), True, "generate", "leave generate out"),
    ],
)
def test_settings_of_texts_that_are_not_written_are_refused(
    task: Any, generate: bool | None, key: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        for_evaluation(task, generate=generate, generation=GenerationOverrides(num_beams=2))
    (problem,) = caught.value.problems
    assert (problem.id, problem.key, problem.fix) == ("eval.no-texts", key, fix)
