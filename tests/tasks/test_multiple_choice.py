import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from transformers import AutoTokenizer

from lora_cli.config.tasks import DataConfig, MultipleChoiceConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.multiple_choice import ChoicePrediction, MultipleChoice, choice_columns

FAMILY = MultipleChoice()
COLUMNS = {"context": "c", "question": "q", "choices": "o", "answer": "a"}
STATE = {"columns": COLUMNS, "answers": "index", "choices": [2, 4]}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def build(tokenizer: Any, *, state: Any = STATE, **settings: Any) -> Any:
    return FAMILY.build(MultipleChoiceConfig(**settings), state, tokenizer)


def row(**values: Any) -> Row:
    base = {"c": "the film was long", "q": "was it", "o": ["good", "bad"], "a": 1}
    return Row("1", {**base, **values}, "rows.jsonl", 1)


def write(folder: Path, *rows: dict[str, Any], **settings: Any) -> MultipleChoiceConfig:
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        text = "".join(json.dumps(line) + "\n" for line in rows)
        (folder / f"{split}.jsonl").write_text(text)
    answers = settings.pop("answers", "auto")
    return MultipleChoiceConfig(data=DataConfig(path=str(folder), **settings), answers=answers)


def texts(tokenizer: Any, features: Any) -> list[str]:
    return [tokenizer.decode(one["input_ids"]) for one in features["inputs"]]


def test_a_choice_is_read_after_its_question_and_context(tokenizer: Any) -> None:
    features = build(tokenizer).encode(row())
    assert texts(tokenizer, features) == [
        f"[CLS] the film was long [SEP] was it {choice} [SEP]" for choice in ("good", "bad")
    ]
    assert features["inputs"][0]["token_type_ids"] == [0] * 6 + [1] * 4
    assert (features["answer"], features["supervised"], features["length"]) == (1, 1, 10)
    assert json.loads(json.dumps(features)) == features


@pytest.mark.parametrize("left_out", ["context", "question"])
def test_one_text_is_enough(tokenizer: Any, left_out: str) -> None:
    state = {**STATE, "columns": {**COLUMNS, left_out: None}}
    first = "was it" if left_out == "context" else "the film was long"
    assert texts(tokenizer, build(tokenizer, state=state).encode(row()))[0] == (
        f"[CLS] {first} [SEP] good [SEP]"
    )


def test_the_context_is_cut_first_then_the_question_never_a_choice(tokenizer: Any) -> None:
    long = row(o=["good", "bad and very long"])
    features = build(tokenizer, max_length=11).encode(long)
    assert texts(tokenizer, features) == [
        "[CLS] the film was long [SEP] was it good [SEP]",
        "[CLS] the film [SEP] was it bad and very long [SEP]",
    ]
    assert (features["cut"], features["length"]) == (2, 11)
    features = build(tokenizer, max_length=8).encode(long)
    assert texts(tokenizer, features) == [
        "[CLS] was it [SEP] good [SEP]",
        "[CLS] was [SEP] bad and very long [SEP]",
    ]
    assert (features["cut"], features["length"]) == (5, 8)
    with pytest.raises(UserError) as caught:
        build(tokenizer, max_length=6).encode(long)
    (problem,) = caught.value.problems
    assert (problem.id, problem.where) == ("task.candidate-too-long", "rows.jsonl row 1")
    assert problem.fix is not None
    assert problem.fix.startswith("task.max_length=7")


def rows_and_logits(tokenizer: Any) -> tuple[Any, Any, torch.Tensor]:
    draw = random.Random(0)
    task = build(tokenizer)
    rows = []
    for _ in range(30):
        choices = [f"film {n}" for n in range(draw.randint(2, 4))]
        rows.append(row(o=choices, a=draw.randrange(len(choices))))
    torch.manual_seed(0)
    return task, task.collate([task.encode(one) for one in rows]), torch.randn(30, 4)


def test_loss_and_metrics_are_those_of_scikit_learn(tokenizer: Any) -> None:
    task, batch, logits = rows_and_logits(tokenizer)
    assert batch["inputs"]["input_ids"].shape[:2] == (30, 4)
    logits.requires_grad_()
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    predictions = task.decode({"logits": output.outputs["logits"].detach()}, batch)
    counts = [len(p.choices) for p in predictions]
    assert set(counts) == {2, 3, 4}
    padded = [list(p.probabilities) + [0.0] * (4 - len(p.choices)) for p in predictions]
    references = batch["answers"].tolist()
    assert output.count == 30
    assert float(output.loss_sum.detach()) / 30 == pytest.approx(
        log_loss(references, padded, labels=[0, 1, 2, 3]), rel=1e-5
    )
    predicted = [p.index for p in predictions]
    assert all(index < count for index, count in zip(predicted, counts, strict=True))
    assert task.metrics(predictions) == {"accuracy": accuracy_score(references, predicted)}
    assert task.metrics([]) == {"accuracy": 0.0}
    assert task.report(predictions) == {}
    # What fills a row gets no gradient.
    output.loss_sum.backward()
    gradient = torch.as_tensor(logits.grad)
    assert torch.equal(gradient != 0, batch["mask"])


def test_outputs_are_finite_so_that_two_models_can_be_compared(tokenizer: Any) -> None:
    task, batch, logits = rows_and_logits(tokenizer)
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    assert torch.equal(output.outputs["logits"], logits)


def test_a_line_of_predictions(tokenizer: Any) -> None:
    line = build(tokenizer).to_json(ChoicePrediction("7", 1, ("a", "b"), (0.2, 0.8), 0))
    assert line == {
        "id": "7",
        "index": 1,
        "text": "b",
        "probabilities": [0.2, 0.8],
        "reference": 0,
    }


SWAG = {"sent1": "a man", "sent2": "he", "ending0": "x", "ending1": "y", "label": 1}
C3 = {"context": ["甲 你好", "乙 好"], "question": "谁", "choice": ["甲", "乙"], "answer": "乙"}
RACE = {"article": "a text", "question": "why", "options": ["x", "y"], "answer": "B"}
KEYED = {"label": ["A", "B"], "text": ["x", "y"]}
COMMONSENSE = {"question": "why", "question_concept": "z", "choices": KEYED, "answerKey": "B"}


@pytest.mark.parametrize(
    ("one", "kind", "first", "second"),
    [
        (SWAG, "index", "a man", "he y"),
        (C3, "text", "甲 你好 乙 好", "谁 乙"),
        (RACE, "letter", "a text", "why y"),
        (COMMONSENSE, "key", "why", "y"),
    ],
)
def test_layouts_of_known_data_sets_are_found(
    tmp_path: Path, one: dict[str, Any], kind: str, first: str, second: str
) -> None:
    config = write(tmp_path / "d", one)
    splits = FAMILY.load(config, seed=0)
    assert splits.state["answers"] == kind
    assert json.loads(json.dumps(splits.state)) == splits.state
    read: list[tuple[str, str]] = []

    def tokenize(text: str, pair: str, **_: Any) -> dict[str, Any]:
        read.append((text, pair))
        return {"input_ids": [0]}

    features = FAMILY.build(config, splits.state, tokenize).encode(splits.rows["train"][0])
    assert (features["answer"], read[1]) == (1, (first, second))


def test_columns_of_choices_may_be_named(tmp_path: Path) -> None:
    one = {"question": "why", "good": "x", "bad": "y", "answer": "y"}
    config = write(tmp_path / "d", one, choice_columns=("good", "bad"))
    splits = FAMILY.load(config, seed=0)
    assert choice_columns(splits.state["columns"]) == ("good", "bad")
    bound = FAMILY.bind_columns(["bad", "good", "question"], splits.state, where="new")
    assert choice_columns(bound["columns"]) == ("good", "bad")
    assert bound["columns"]["answer"] is None
    with pytest.raises(UserError, match='"good"'):
        FAMILY.bind_columns(["bad", "question"], splits.state, where="new")


@pytest.mark.parametrize(
    ("change", "settings", "found"),
    [
        ({"question": None, "choices": ["x"]}, {}, ["data.bad-passage", "data.bad-choices"]),
        ({"answer": 2}, {}, ["data.bad-answer"]),
        ({"answer": None}, {}, ["data.bad-answer"]),
        ({}, {"choice_columns": ("question",)}, ["data.no-choices"]),
        ({}, {"choice_columns": ("question", "x")}, ["data.missing-column"]),
        ({}, {"choices_column": "choices", "choice_columns": ("a", "b")}, None),
    ],
)
def test_faults_are_told(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], found: list[str] | None
) -> None:
    one = {"question": "why", "choices": ["x", "y"], "answer": 0}
    config = write(tmp_path / "d", one, {**one, **change}, **settings)
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    problems = caught.value.problems
    ids = [problem.id for problem in problems if "validation" not in (problem.where or "")]
    assert ids == (found or ["data.two-kinds-of-choices"])
    if change:
        assert all("train.jsonl row 2" in (p.where or "") for p in problems[: len(ids)])


def test_something_must_be_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        FAMILY.load(write(tmp_path / "d", {"x": "why", "y": ["a", "b"], "answer": 0}), seed=0)
    assert [p.id for p in caught.value.problems] == ["data.no-choices", "data.no-question"]


def test_numbers_from_one_are_read_on_demand(tmp_path: Path) -> None:
    rows = [{"question": "why", "choices": ["x", "y"], "answer": n} for n in (1, 2)]
    with pytest.raises(UserError, match=r"task\.answers|number, from 0"):
        FAMILY.load(write(tmp_path / "d", *rows), seed=0)
    config = write(tmp_path / "d", *rows, answers="number")
    splits = FAMILY.load(config, seed=0)
    assert FAMILY.describe(splits.state) == "2 choices a row, answers by number"


def test_rows_repeat_others_only_with_the_same_choices(tmp_path: Path) -> None:
    assert FAMILY.input_columns({**COLUMNS, "question": None}) == ["c", "o"]
    columns = {**COLUMNS, "choices": None, "choice 1": "y", "choice 0": "x"}
    assert FAMILY.input_columns(columns) == ["c", "q", "x", "y"]
