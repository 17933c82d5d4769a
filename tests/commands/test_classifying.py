from dataclasses import replace

import pytest

from lora_cli.commands.classifying import with_labels
from lora_cli.config.media import ImageTextContrastiveConfig, ZeroShotConfig
from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.errors import UserError

TRAINED = ImageTextContrastiveConfig(
    max_length=32, zero_shot=ZeroShotConfig(labels=("cat", "dog"), prompt="a drawing of a {}")
)


def test_what_is_given_takes_the_place_of_what_was_recorded() -> None:
    assert with_labels(TRAINED, ZeroShotConfig()) is TRAINED
    found = with_labels(TRAINED, ZeroShotConfig(labels=("owl", "hen")))
    expected = ZeroShotConfig(labels=("owl", "hen"), prompt="a drawing of a {}")
    assert found == replace(TRAINED, zero_shot=expected)


def test_other_families_take_no_such_settings() -> None:
    plain = TextClassificationConfig()
    assert with_labels(plain, ZeroShotConfig()) is plain
    with pytest.raises(UserError) as caught:
        with_labels(plain, ZeroShotConfig(labels=("a", "b")))
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("predict.no-zero-shot", "zero_shot.labels")
    assert problem.allowed == "with an adapter for image_text_contrastive"


def test_a_prompt_without_labels_does_nothing() -> None:
    with pytest.raises(UserError, match="must come with the labels") as caught:
        with_labels(ImageTextContrastiveConfig(), ZeroShotConfig(prompt="a {}"))
    assert caught.value.problems[0].key == "zero_shot.prompt"
