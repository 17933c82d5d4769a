import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_cli.config.language import AnswerChoiceConfig
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.answer_choice import AnswerChoice

FAMILY = AnswerChoice()
COLUMNS = {"text": "text", "text_pair": None, "label": "label"}
STATE = {"columns": COLUMNS, "labels": ["no", "yes"], "numbered": False, "places": []}
ANSWERS = {"no": "not good", "yes": "very very warm film"}
DECODERS = ("llama", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def load(tiny_language_dir: Callable[..., Path]) -> Callable[[str], Any]:
    def get(kind: str) -> Any:
        folder = tiny_language_dir(kind)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        return model, transformers.AutoTokenizer.from_pretrained(folder)

    return get


def row(number: int, text: str, label: Any = None, **more: Any) -> Row:
    values = {"text": text, **more} | ({} if label is None else {"label": label})
    return Row(str(number), values, "rows.jsonl", number)


ROWS = [
    row(1, "the film was good", "yes"),
    row(2, "a very long and boring story about the old city", "no"),
    row(3, "music", "no"),
]


def build(tokenizer: Any, state: Any = STATE, **settings: Any) -> Any:
    return FAMILY.build(AnswerChoiceConfig(**settings), state, tokenizer)


def run(task: Any, model: Any, rows: list[Row], **more: Any) -> Any:
    batch = {**task.collate([task.encode(one) for one in rows]), **more}
    with torch.no_grad():
        return task.forward(model, batch), batch


def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Token by token, one pass for each."""
    ids = tokenizer(prompt)["input_ids"]
    total, count = 0.0, 0
    for token in tokenizer(answer)["input_ids"]:
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total, count, ids = total + float(said[token]), count + 1, [*ids, token]
    return total, count


@pytest.mark.parametrize("normalize", ["none", "tokens", "characters"])
@pytest.mark.parametrize("kind", DECODERS)
def test_scores_are_likelihoods(load: Any, kind: str, normalize: str) -> None:
    model, tokenizer = load(kind)
    task = build(tokenizer, prompt="{text} is", answers=ANSWERS, normalize=normalize)
    output, batch = run(task, model, ROWS)
    scores = output.outputs["scores"]
    assert scores.shape == (3, 2)
    loss = count = 0.0
    for n, one in enumerate(ROWS):
        for m, label in enumerate(STATE["labels"]):
            answer = ANSWERS[label]
            total, tokens = likelihood(model, tokenizer, f"{one.values['text']} is", answer)
            size = {"none": 1, "tokens": tokens, "characters": len(answer)}[normalize]
            assert float(scores[n, m]) == pytest.approx(total / size, rel=1e-4)
            if one.values["label"] == label:
                loss, count = loss - total, count + tokens
    assert float(output.loss_sum) == pytest.approx(loss, rel=1e-4)
    assert output.count == count == 4 + 2 + 2
    for one, found in zip(ROWS, task.decode(output.outputs, batch), strict=True):
        n = int(one.id) - 1
        assert found.label == int(scores[n].argmax())
        assert found.probabilities == pytest.approx(scores[n].softmax(-1).tolist(), rel=1e-5)
        assert task.to_json(found)["reference"] == one.values["label"]


def test_normalizing_decides_between_short_and_long(load: Any) -> None:
    model, tokenizer = load("llama")
    found = {}
    for normalize in ("none", "tokens", "characters"):
        task = build(tokenizer, answers=ANSWERS, normalize=normalize)
        output, _ = run(task, model, ROWS)
        found[normalize] = output.outputs["scores"]
    assert bool((found["none"][:, 0] > found["none"][:, 1]).all()), "short ones are likelier"
    ratio = found["none"] / found["tokens"]
    torch.testing.assert_close(ratio, torch.tensor([[2.0, 4.0]]).expand(3, 2))
    ratio = found["none"] / found["characters"]
    torch.testing.assert_close(ratio, torch.tensor([[8.0, 19.0]]).expand(3, 2))


def test_training_runs_the_right_answers_alone(load: Any) -> None:
    model, tokenizer = load("gpt2")
    task = build(tokenizer, answers=ANSWERS)
    evaluated, _ = run(task, model, ROWS)
    seen: list[Any] = []

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return model(**inputs)

    trained, _ = run(task, watched, ROWS, seed=1)
    (ids,) = seen
    assert len(ids) == 3
    assert float(trained.loss_sum) == pytest.approx(float(evaluated.loss_sum), rel=1e-5)
    assert trained.count == evaluated.count
    assert trained.outputs == {}


def test_batches_say_what_single_rows_say(load: Any) -> None:
    model, tokenizer = load("gpt_neox")
    for side in ("left", "right"):
        tokenizer.padding_side = side
        task = build(tokenizer, answers=ANSWERS)
        together, _ = run(task, model, ROWS)
        alone = [run(task, model, [one])[0] for one in ROWS]
        scores = torch.cat([one.outputs["scores"] for one in alone])
        torch.testing.assert_close(together.outputs["scores"], scores, atol=1e-5, rtol=1e-5)
        total = sum(float(one.loss_sum) for one in alone)
        assert float(together.loss_sum) == pytest.approx(total, rel=1e-5)


def test_long_prompts_lose_their_beginning(load: Any) -> None:
    _, tokenizer = load("llama")
    task = build(tokenizer, answers=ANSWERS, max_length=16)
    features = task.encode(row(1, "the film was good and " * 5 + "old", "yes"))
    json.dumps(features)
    answer = tokenizer("very very warm film")["input_ids"]
    short, long = features["sequences"]
    assert long["input_ids"][-4:] == answer
    assert long["spans"] == [[12, 16]]
    assert short["input_ids"][:-2] == long["input_ids"][:-4], "the same prompt for both"
    whole = tokenizer("the film was good and " * 5 + "old\nAnswer:")["input_ids"]
    assert long["input_ids"][:12] == whole[-12:]
    assert (features["cut"], features["supervised"], features["length"]) == (len(whole) - 12, 4, 16)


def test_the_first_token_of_texts_is_kept(load: Any) -> None:
    from tokenizers import processors

    _, tokenizer = load("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    task = build(tokenizer, answers=ANSWERS, max_length=16)
    short, long = task.encode(row(1, "the film " * 12, "yes"))["sequences"]
    assert short["input_ids"][0] == long["input_ids"][0] == 2
    assert 3 not in long["input_ids"], "the end token would end the prompt"
    assert long["input_ids"][-4:] == tokenizer("very very warm film")["input_ids"][1:-1]
    assert len(long["input_ids"]) == 16


def test_columns_of_the_prompt() -> None:
    prompt = "Liked: {history}. Next: {text} ({year}) {text_pair}?"
    columns = {**COLUMNS, "text_pair": "other"}
    rows = [
        row(n, "film", label, history=["a", "b"], year=1990, other="x")
        for n, label in ((1, "yes"), (2, "no"))
    ]
    config = AnswerChoiceConfig(prompt=prompt)
    state = {"columns": columns, **FAMILY.learn(config, rows, Loaded({}), columns)}
    assert (state["places"], state["labels"]) == (["history", "year"], ["no", "yes"])
    assert FAMILY.check_known(rows, state) == []
    seen: list[str] = []

    def tokenizer(text: str) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [ord(one) for one in text]}

    tokenizer.eos_token_id = tokenizer.bos_token_id = None  # type: ignore[attr-defined]
    build(tokenizer, state, prompt=prompt).encode(rows[0])
    wanted = "Liked: a, b. Next: film (1990) x?"
    assert seen == [f"{wanted} no", f"{wanted} yes", wanted]
    bad = row(3, "film", "yes", year=None, other="x")
    (first, second) = FAMILY.check_known([bad], state)
    assert ("`history`" in first.message, "`year`" in second.message) == (True, True)
    with pytest.raises(UserError, match="`history`"):
        FAMILY.check_row(bad, state)


@pytest.mark.parametrize(
    ("prompt", "pair", "finding"),
    [
        ("Answer:", None, "has no {text}"),
        ("{text}", "other", "has no {text_pair}"),
        ("{text} {text_pair}", None, "has {text_pair} without such a column"),
    ],
)
def test_prompts_that_leave_texts_out(prompt: str, pair: str | None, finding: str) -> None:
    rows = [row(1, "a", "yes", other="b"), row(2, "a", "no", other="b")]
    columns = {**COLUMNS, "text_pair": pair}
    with pytest.raises(UserError) as caught:
        FAMILY.learn(AnswerChoiceConfig(prompt=prompt), rows, Loaded({}), columns)
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("task.bad-prompt", "task.prompt")
    assert finding in problem.message


@pytest.mark.parametrize(
    ("answers", "finding"),
    [
        ({"no": "bad"}, '"yes" has none'),
        ({"no": "bad", "yes": "good", "maybe": "x"}, '"maybe" is no label'),
        ({"no": "same", "yes": " same"}, "two labels have the same, or an empty one"),
        ({"no": "", "yes": "x"}, "two labels have the same, or an empty one"),
    ],
)
def test_answers_are_those_of_the_labels(answers: dict[str, str], finding: str) -> None:
    rows = [row(1, "a", "yes"), row(2, "a", "no")]
    with pytest.raises(UserError) as caught:
        FAMILY.learn(AnswerChoiceConfig(answers=answers), rows, Loaded({}), COLUMNS)
    (problem,) = caught.value.problems
    assert problem.id == "task.bad-answers"
    assert finding in problem.message
    assert problem.allowed == "no, yes"


def test_rows_to_predict_have_no_label(load: Any) -> None:
    model, tokenizer = load("llama")
    state = FAMILY.bind_columns(["text"], STATE, where="text")
    task = build(tokenizer, state, answers=ANSWERS)
    output, batch = run(task, model, [row(1, "the film")])
    assert output.count == 0
    (found,) = task.decode(output.outputs, batch)
    assert set(task.to_json(found)) == {"id", "label", "probabilities"}
