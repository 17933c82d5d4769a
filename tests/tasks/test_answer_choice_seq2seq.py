import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_cli.config.language import AnswerChoiceSeq2SeqConfig
from lora_cli.data.types import Row
from lora_cli.tasks.answer_choice_seq2seq import AnswerChoiceSeq2Seq

FAMILY = AnswerChoiceSeq2Seq()
COLUMNS = {"text": "text", "text_pair": None, "label": "label"}
STATE = {"columns": COLUMNS, "labels": ["no", "yes"], "numbered": False, "places": []}
ANSWERS = {"no": "not good", "yes": "very very warm film"}
TEXTS = (("the film was good", "yes"), ("a long and boring story of the city", "no"), ("x", "no"))
ROWS = [
    Row(str(n), {"text": text, "label": label}, "rows.jsonl", n)
    for n, (text, label) in enumerate(TEXTS, start=1)
]


@pytest.fixture(scope="module", params=["t5", "bart"])
def loaded(request: Any, tiny_language_dir: Callable[..., Path]) -> Any:
    folder = tiny_language_dir(request.param)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def run(loaded: Any, rows: list[Row], normalize: str = "none", **more: Any) -> Any:
    model, tokenizer = loaded
    config = AnswerChoiceSeq2SeqConfig(answers=ANSWERS, normalize=normalize)  # type: ignore[arg-type]
    task = FAMILY.build(config, STATE, tokenizer)
    features = [task.encode(one) for one in rows]
    json.dumps(features)
    batch = {**task.collate(features), **more}
    with torch.no_grad():
        return task, task.forward(model, batch), batch


@pytest.mark.parametrize("normalize", ["none", "tokens", "characters"])
def test_scores_are_what_the_model_says_of_labels(loaded: Any, normalize: str) -> None:
    model, tokenizer = loaded
    task, output, batch = run(loaded, ROWS, normalize)
    loss = 0.0
    for n, one in enumerate(ROWS):
        ids = tokenizer(f"{one.values['text']}\nAnswer:", return_tensors="pt")["input_ids"]
        for m, label in enumerate(STATE["labels"]):
            labels = tokenizer(text_target=ANSWERS[label], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                total = -float(model(input_ids=ids, labels=labels).loss) * labels.shape[1]
            sizes = {"none": 1, "tokens": labels.shape[1], "characters": len(ANSWERS[label])}
            found = float(output.outputs["scores"][n, m])
            assert found == pytest.approx(total / sizes[normalize], rel=1e-3)
            loss -= total if one.values["label"] == label else 0
    assert float(output.loss_sum) == pytest.approx(loss, rel=1e-3)
    assert output.count == 5 + 3 + 3
    predicted = [one.label for one in task.decode(output.outputs, batch)]
    assert predicted == output.outputs["scores"].argmax(-1).tolist()


def test_training_and_batches_say_the_same(loaded: Any) -> None:
    _, evaluated, _ = run(loaded, ROWS)
    _, trained, _ = run(loaded, ROWS, seed=1)
    assert float(trained.loss_sum) == pytest.approx(float(evaluated.loss_sum), rel=1e-4)
    assert trained.count == evaluated.count
    alone = torch.cat([run(loaded, [one])[1].outputs["scores"] for one in ROWS])
    torch.testing.assert_close(evaluated.outputs["scores"], alone, atol=1e-3, rtol=1e-4)


def test_long_prompts_lose_their_beginning(loaded: Any) -> None:
    _, tokenizer = loaded
    config = AnswerChoiceSeq2SeqConfig(answers=ANSWERS, max_length=16)
    task = FAMILY.build(config, STATE, tokenizer)
    text = "the film was good and " * 5
    features = task.encode(Row("1", {"text": text, "label": "no"}, "f", 1))
    whole = tokenizer(f"{text}\nAnswer:")["input_ids"]
    assert features["source"] == whole[-11:]
    assert (features["cut"], features["length"]) == (len(whole) - 11, 11)
    assert (features["supervised"], features["label"]) == (3, 0)
