"""The family of chat without commands: features, masks after cutting, columns, answers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.language import ChatConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.chat import Chat
from lora_cli.tasks.language import Score
from lora_cli.tasks.written import WrittenText

_spec = importlib.util.spec_from_file_location(
    "conversations", Path(__file__).with_name("conversations.py")
)
assert _spec is not None
assert _spec.loader is not None
_conversations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conversations)
said = _conversations.said

COLUMNS: dict[str, str | None] = {
    **dict.fromkeys(("messages", "prompt", "input", "completion", "system", "documents")),
    "messages": "messages",
}
# Every word of the tiny vocabulary is one token; the end of a turn is that of the tokenizer.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
FAMILY = Chat()


@pytest.fixture(scope="module")
def base(tiny_language_dir: Callable[..., Path]) -> Path:
    return tiny_language_dir("llama")


@pytest.fixture
def build(base: Path) -> Callable[..., Any]:
    def make(state: Any = None, **settings: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(base)
        known = {"columns": COLUMNS, "chat_template": TEMPLATE, **(state or {})}
        return FAMILY.build(ChatConfig(**settings), known, tokenizer)

    return make


def row(messages: Any, name: str = "1", **more: Any) -> Row:
    return Row(name, {"messages": messages, **more}, "f.jsonl", int(name))


def learned(task: Any, features: Any) -> list[str]:
    (one,) = features["sequences"]
    return [
        task._tokenizer.decode(one["input_ids"][start:end]).strip() for start, end in one["spans"]
    ]


LONG = said("user: the film", "assistant: is good", "user: and the man", "assistant: is very old")


def test_each_turn_of_the_assistant_is_learned(build: Any) -> None:
    task = build()
    features = task.encode(row(LONG))
    assert learned(task, features) == ["is good [SEP]", "is very old [SEP]"]
    assert features["supervised"] == 7
    assert features["length"] == 4 + 4 + 5 + 5
    assert features["cut"] == 0


def test_a_cut_leaves_the_end_unlearned(build: Any) -> None:
    task = build(max_length=16)
    features = task.encode(row(LONG))
    assert learned(task, features) == ["is good [SEP]", "is very"]
    assert (features["length"], features["cut"], features["supervised"]) == (16, 2, 5)


def test_overlong_rows_are_left_out_or_refused(build: Any) -> None:
    assert build(max_length=16, overlong="drop").encode(row(LONG))["left_out"]
    assert "left_out" not in build(max_length=18, overlong="drop").encode(row(LONG))
    for settings, messages in (
        ({"overlong": "error"}, LONG),
        ({}, [{"role": "user", "content": "the " * 20}, LONG[1]]),
    ):
        with pytest.raises(UserError) as caught:
            build(max_length=16, **settings).encode(row(messages))
        (problem,) = caught.value.problems
        assert (problem.id, problem.where) == ("task.overlong", "f.jsonl row 1")


def test_a_system_prompt_for_rows_that_have_none(build: Any) -> None:
    task = build(system_prompt="see it")
    own = [{"role": "system", "content": "think"}, *LONG]
    texts = [
        task._tokenizer.decode(task.encode(row(messages))["sequences"][0]["input_ids"])
        for messages in (LONG, own)
    ]
    assert texts[0].startswith("s see it [SEP] u the film")
    assert texts[1].startswith("s think [SEP] u the film")


def test_padding_is_never_learned_and_the_end_is(build: Any) -> None:
    """Where padding is the end token, as in SmolLM2."""
    task = build()
    task._tokenizer.pad_token = task._tokenizer.eos_token
    rows = [task.encode(row(LONG)), task.encode(row(LONG[:2], "2"))]
    batch = task.collate(rows)
    end = task._tokenizer.eos_token_id
    ids, own = batch["inputs"]["input_ids"], batch["learned"]
    assert (ids[1, 8:] == end).all()
    assert not own[1, 8:].any()
    assert own.sum(1).tolist() == [7, 3]
    assert (own & (ids == end)).sum(1).tolist() == [2, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_the_padding_changes_nothing(build: Any, base: Path, side: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    task = build(generate_in_eval=True, generation=GenerationConfig(max_new_tokens=6))
    task._tokenizer.padding_side = side
    rows = [task.encode(row(LONG)), task.encode(row(LONG[:2], "2"))]
    found = task.forward(model, task.collate(rows))
    predictions = task.decode(found.outputs, task.collate(rows))
    for features, prediction in zip(rows, predictions, strict=True):
        batch = task.collate([features])
        one = task.forward(model, batch)
        (alone,) = task.decode(one.outputs, batch)
        assert prediction.text == alone.text
        assert prediction.references == alone.references
        assert prediction.score.loss_sum == pytest.approx(alone.score.loss_sum, rel=1e-5)
        # And what transformers says of the same tokens.
        (sequence,) = features["sequences"]
        labels = torch.full((1, len(sequence["input_ids"])), -100)
        for start, end in sequence["spans"]:
            labels[0, start:end] = torch.tensor(sequence["input_ids"][start:end])
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([sequence["input_ids"]]), labels=labels).loss
        assert alone.score.loss_sum / alone.score.count == pytest.approx(float(theirs), rel=1e-5)
    assert [one.references for one in predictions] == [("is very old",), ("is good",)]


def test_nothing_is_generated_in_training_and_comparing(build: Any, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    task = build(generate_in_eval=True, generation=GenerationConfig(max_new_tokens=2))
    batch = task.collate([task.encode(row(LONG))])
    assert set(task.forward(model, batch).outputs) == {"log_probs", "texts", "ended"}
    assert set(task.forward(model, {**batch, "generate": False}).outputs) == {"log_probs"}
    assert not task.forward(model, {**batch, "seed": 1}).outputs


def test_answering_reads_no_answers(build: Any, base: Path) -> None:
    state = FAMILY.bind_columns(["messages"], {"columns": COLUMNS}, where="f")
    task = build(state, generation=GenerationConfig(max_new_tokens=3))
    features = task.encode(row(LONG))
    assert task._tokenizer.decode(features["prompt"]).strip().endswith("u and the man [SEP] a")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    batch = task.collate([features])
    found = task.forward(model, batch)
    assert found.count == 0
    (prediction,) = task.decode(found.outputs, batch)
    assert prediction.score is None
    assert set(task.to_json(prediction)) == {"id", "answer", "ended"}
    with pytest.raises(UserError) as caught:
        build(state, max_length=16).encode(row(said("user: " + "the " * 30)))
    assert caught.value.problems[0].id == "task.overlong"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages", "prompt"], {"messages": "messages"}),
        (["conversations"], {"messages": "conversations"}),
        (["instruction", "input", "output"], {"prompt": "instruction", "input": "input"}),
        (["text"], {"prompt": "text"}),
        (["prompt", "documents", "system"],
         {"prompt": "prompt", "documents": "documents", "system": "system"}),
    ],
)  # fmt: skip
def test_rows_to_answer_may_have_any_layout(columns: list[str], expected: Any) -> None:
    state = FAMILY.bind_columns(columns, {"columns": COLUMNS}, where="f")
    assert {k: v for k, v in state["columns"].items() if v is not None} == expected


def test_rows_to_answer_are_read_as_those_of_training() -> None:
    """There the user named the prompt beside messages that merely were there."""
    trained = {**COLUMNS, "messages": None, "prompt": "question", "completion": "answer"}
    for columns, read in (
        (["question", "messages"], {"prompt": "question"}),
        (["messages"], {"messages": "messages"}),
    ):
        state = FAMILY.bind_columns(columns, {"columns": trained}, where="f")
        assert {k: v for k, v in state["columns"].items() if v is not None} == read


def test_rows_without_a_question_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        FAMILY.bind_columns(["other"], {"columns": COLUMNS}, where="f")
    assert caught.value.problems[0].id == "data.missing-column"
    state = FAMILY.bind_columns(["messages"], {"columns": COLUMNS}, where="f")
    with pytest.raises(UserError) as caught:
        FAMILY.check_row(row(said("assistant: it")), state)
    assert caught.value.problems[0].id == "data.no-question"


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (["prompt", "messages"], {}, {"messages": "messages"}),
        (
            ["question", "answer", "messages"],
            {"prompt_column": "question"},
            {"prompt": "question", "completion": "answer"},
        ),
        (
            ["instruction", "context", "response", "category"],
            {"input_column": "context"},
            {"prompt": "instruction", "input": "context", "completion": "response"},
        ),
    ],
)
def test_one_layout_is_read(columns: list[str], named: Any, expected: Any) -> None:
    found, notes = FAMILY._resolve(DataConfig(**named), columns)
    assert {k: v for k, v in found.items() if v is not None} == expected
    assert all(any(name in note for name in expected.values()) for note in notes)


def test_columns_that_are_no_layout_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        FAMILY._resolve(DataConfig(), ["prompt", "other"])
    (problem,) = caught.value.problems
    assert problem.allowed == "prompt, other"


def test_metrics_are_over_all_tokens(build: Any) -> None:
    task = build()
    predictions = [
        WrittenText("1", "it is", True, Score(2.0, 1, 2), ("it is",)),
        WrittenText("2", "no", False, Score(4.0, 0, 4), ("yes",)),
        WrittenText("3", None, None, None, ()),
    ]
    found = task.metrics(predictions)
    assert found["perplexity"] == pytest.approx(2.718281828)
    assert found["token_accuracy"] == pytest.approx(1 / 6)
    assert (found["exact_match"], found["ended"]) == (0.5, 0.5)
    line = task.to_json(predictions[0])
    assert line == {
        "id": "1", "answer": "it is", "ended": True, "reference": "it is", "loss": 1.0,
        "perplexity": pytest.approx(2.718281828), "tokens": 2,
    }  # fmt: skip
    assert set(task.metrics(predictions[2:])) == {"perplexity", "token_accuracy"}
    assert task.report(predictions) == {}
