import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from lora_cli.config.tasks import DataConfig, QuestionAnsweringConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.question_answering import QuestionAnswering

FAMILY = QuestionAnswering()
COLUMNS = {
    "question": "question",
    "context": "context",
    "answers": "answers",
    "answer_start": None,
}
STATE = {"columns": COLUMNS, "answered": 2, "unanswered": 0}
LONG = "a man and a woman see the old film in the city. " * 3


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


def row(number: int, context: str, *answers: str, known: bool = True) -> Row:
    places = [{"text": text, "answer_start": context.index(text)} for text in answers]
    values: dict[str, Any] = {"question": "who?", "context": context}
    return Row(str(number), values | ({"answers": places} if known else {}), "rows.jsonl", number)


def build(tokenizer: Any, *, unanswered: int = 0, **settings: Any) -> Any:
    config = QuestionAnsweringConfig(**{"max_length": 24, "stride": 4, **settings})
    return FAMILY.build(config, {**STATE, "unanswered": unanswered}, tokenizer)


def scores(batch: Any, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = batch["inputs"]["input_ids"].shape
    return {side: torch.randn(shape, generator=generator) for side in ("start", "end")}


def run(task: Any, batch: Any, outputs: dict[str, torch.Tensor]) -> Any:
    found = SimpleNamespace(start_logits=outputs["start"], end_logits=outputs["end"])
    return task.forward(lambda **_: found, batch)


def test_features_are_plain_values(tokenizer: Any) -> None:
    task = build(tokenizer)
    features = task.encode(row(1, LONG, "woman", "a man"))
    again = json.loads(json.dumps(features))
    assert again == features
    assert features["length"] == sum(len(w["inputs"]["input_ids"]) for w in features["windows"])
    assert (features["cut"], features["answers"]) == (0, ["woman", "a man"])
    assert features["supervised"] == len(features["windows"]) > 1
    batch, copy = task.collate([features]), task.collate([again])
    assert torch.equal(batch["labels"]["start"], copy["labels"]["start"])
    assert batch["ids"] == ["1"]


def test_the_loss_is_over_context_and_none_of_every_window(tokenizer: Any) -> None:
    task = build(tokenizer)
    rows = [
        row(1, LONG, "old film", "city"),
        row(2, "a bad story."),
        row(3, "the cold night", "night"),
    ]
    features = [task.encode(item) for item in rows]
    batch = task.collate(features)
    outputs = scores(batch)
    found = run(task, batch, outputs)
    total, n = 0.0, 0
    for item, encoded in zip(rows, features, strict=True):
        for window in encoded["windows"]:
            allowed = [window["none"], *window["places"]]
            answers = item.values["answers"]
            begin = answers[0]["answer_start"] if answers else -1
            end = begin + len(answers[0]["text"]) if answers else -1
            spans = window["spans"]
            is_inside = answers and spans[0][0] <= begin and end <= spans[-1][1]
            for side, at, edge in (("start", 0, begin), ("end", 1, end)):
                values = outputs[side][n, allowed].log_softmax(-1)
                place = 1 + [span[at] for span in spans].index(edge) if is_inside else 0
                total -= values[place].item() / 2
            n += 1
    assert found.count == n > len(rows)
    assert found.loss_sum.item() == pytest.approx(total, rel=1e-5)


def test_padding_changes_nothing(tokenizer: Any) -> None:
    task = build(tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(
        BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1, initializer_range=0.5, **sizes)
    ).eval()
    features = [task.encode(row(1, LONG, "city")), task.encode(row(2, "a bad story", "bad"))]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        with torch.no_grad():
            together = task.forward(model, task.collate(features))
            alone = [task.forward(model, task.collate([item])) for item in features]
        if side == "right":
            assert together.loss_sum.item() == pytest.approx(
                sum(item.loss_sum.item() for item in alone), rel=1e-5
            )
        batch = task.collate(features)
        ids, places = batch["inputs"]["input_ids"][-1], batch["allowed"][-1].nonzero().flatten()
        assert tokenizer.convert_ids_to_tokens(ids[places]) == ["[CLS]", "a", "bad", "story"]
        assert [ids[batch["labels"][s][-1]].item() for s in ("start", "end")] == [
            tokenizer.convert_tokens_to_ids("bad")
        ] * 2


def test_an_answer_in_no_window_counts_by_what_is_there(tokenizer: Any) -> None:
    task = build(tokenizer)
    text = LONG[2 : LONG.rindex("film")].strip()
    batch = task.collate([task.encode(row(1, LONG, text))])
    assert (batch["labels"]["start"] >= 0).sum() == 1
    assert run(task, batch, scores(batch)).count == 1
    dropped = Row(
        "2",
        {**row(2, "a \u200d b").values, "answers": {"text": "\u200d", "answer_start": 2}},
        "x",
        2,
    )
    features = task.encode(dropped)
    assert features["supervised"] == 0
    output = run(task, (batch := task.collate([features])), scores(batch))
    assert (output.count, output.loss_sum.item()) == (0, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_best_answers_over_all_windows(tokenizer: Any, side: str) -> None:
    tokenizer.padding_side = side
    task = build(tokenizer, max_answer_length=3, n_best=4)
    rows = [row(1, LONG, "city"), row(2, "the cold night", "night")]
    features = [task.encode(item) for item in rows]
    batch = task.collate(features)
    outputs, n = scores(batch, seed=4), 0
    width = batch["inputs"]["input_ids"].shape[1]
    for item, encoded, found in zip(rows, features, task.decode(outputs, batch), strict=True):
        everything: dict[tuple[int, int], float] = {}
        none = []
        for window in encoded["windows"]:
            shift = width - len(window["inputs"]["input_ids"]) if side == "left" else 0
            first, last = outputs["start"][n, shift:], outputs["end"][n, shift:]
            none.append(float(first[0] + last[0]))
            for i, (p, span) in enumerate(zip(window["places"], window["spans"], strict=True)):
                for q, other in list(zip(window["places"], window["spans"], strict=True))[
                    i : i + 3
                ]:
                    place = (span[0], other[1])
                    score = float(first[p] + last[q])
                    everything[place] = max(score, everything.get(place, score))
            n += 1
        best = sorted(((score, place) for place, score in everything.items()), reverse=True)[:4]
        line = task.to_json(found)
        assert [(c["start"], c["end"]) for c in line["n_best"]] == [place for _, place in best]
        assert [c["score"] for c in line["n_best"]] == pytest.approx([score for score, _ in best])
        for c in line["n_best"]:
            assert c["text"] == item.values["context"][c["start"] : c["end"]]
        assert line["answer"] == line["n_best"][0]["text"]
        assert line["no_answer_score"] == pytest.approx(min(none) - best[0][0])
        assert line["reference"] == [item.values["answers"][0]["text"]]


def test_no_answer_needs_questions_without_one_or_a_threshold(tokenizer: Any) -> None:
    rows = [row(1, "good cold night", "night"), row(2, "bad story")]
    for unanswered, threshold, expected in (
        (0, None, ["good", "bad"]),
        (3, None, ["", "bad"]),
        (0, 1.5, ["", "bad"]),
        (3, 2.5, ["good", "bad"]),
        (3, -1.5, ["", ""]),
    ):
        task = build(tokenizer, unanswered=unanswered, no_answer_threshold=threshold)
        features = [task.encode(item) for item in rows]
        batch = task.collate(features)
        shape = batch["inputs"]["input_ids"].shape
        outputs = {side: torch.zeros(shape) for side in ("start", "end")}
        outputs["start"][0, 0] = 3
        for side in outputs.values():
            side[:, features[0]["windows"][0]["places"][0]] = 0.5
        predictions = task.decode(outputs, batch)
        lines = [task.to_json(item) for item in predictions]
        assert [line["answer"] for line in lines] == expected
        assert [line["no_answer_score"] for line in lines] == [2, -1]
        for line in lines:
            empty = line["answer"] == ""
            assert [line[name] is None for name in ("start", "end", "score")] == [empty] * 3
        metrics = task.metrics(predictions)
        assert metrics["no_answer_accuracy"] == float(expected[1] == "")
        # Found out, not used: nothing for the first, and so nothing for the second too.
        assert metrics["best_exact_match"] == 0.5
        assert metrics["best_exact_match_threshold"] == -2
        assert set(task.metrics(predictions[:1])) == {"exact_match", "f1"}
    assert task.report(predictions) == {}


def test_white_space_is_no_part_of_an_answer(tokenizer: Any) -> None:
    task = build(tokenizer)
    features = task.encode(row(1, "the night", "night"))
    # As tokenizers of bytes tell it.
    features["windows"][0]["spans"] = [[0, 3], [3, 9]]
    batch = task.collate([features])
    outputs = {side: torch.zeros(1, 20) for side in ("start", "end")}
    place = features["windows"][0]["places"][1]
    outputs["start"][0, place] = outputs["end"][0, place] = 9
    (found,) = task.decode(outputs, batch)
    assert task.to_json(found)["n_best"][0] | {"score": 0} == {
        "text": "night",
        "start": 4,
        "end": 9,
        "score": 0,
    }


def test_characters_count_where_that_is_set(tokenizer: Any) -> None:
    for unit, f1 in (("words", 0.0), ("characters", 2 / 3)):
        task = build(tokenizer, answer_unit=unit)
        features = task.encode(row(1, "北京大学", "北京大学"))
        batch = task.collate([features])
        outputs = {
            side: torch.zeros(batch["inputs"]["input_ids"].shape) for side in ("start", "end")
        }
        places = features["windows"][0]["places"]
        outputs["start"][0, places[0]] = outputs["end"][0, places[1]] = 5
        (found,) = task.decode(outputs, batch)
        assert task.to_json(found)["answer"] == "北京"
        assert task.metrics([found])["f1"] == pytest.approx(f1)


def write(folder: Path, *rows: dict[str, Any], name: str = "train", **data: Any) -> Any:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(item) + "\n" for item in rows)
    (folder / f"{name}.jsonl").write_text(text)
    return QuestionAnsweringConfig(data=DataConfig(path=str(folder), **data), max_length=24)


def values(number: int, text: str = "night", start: Any = 9) -> dict[str, Any]:
    answers = {"text": [text] if text else [], "answer_start": [start] if text else []}
    return {"question": f"q{number}?", "context": "the cold night", "answers": answers}


def test_rows_are_learned_and_flat_columns_too(tmp_path: Path, tokenizer: Any) -> None:
    config = write(tmp_path / "a", values(1), values(2, ""))
    write(tmp_path / "a", values(3), name="validation")
    splits = FAMILY.load(config, seed=0)
    assert splits.state == {"columns": COLUMNS, "answered": 1, "unanswered": 1}
    assert "1 of 2 questions of train without an answer" in splits.notes[-1]
    flat = [
        {"query": "q?", "passage": "the cold night", "answer": "cold", "answer_start": "4"},
        {"query": "p?", "passage": "a bad story", "answer": "", "answer_start": ""},
    ]
    config = write(tmp_path / "b", *flat)
    write(tmp_path / "b", *flat, name="validation")
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    encoded = [task.encode(item) for item in splits.rows["train"]]
    assert [item["answers"] for item in encoded] == [["cold"], []]
    assert encoded[0]["windows"][0]["start"] == encoded[0]["windows"][0]["places"][1]


def test_a_cut_keeps_contexts_together(tmp_path: Path) -> None:
    rows = [{**values(n), "context": f"the cold night {n // 4}"} for n in range(20)]
    splits = FAMILY.load(write(tmp_path, *rows, validation_split=0.2, max_eval_rows=2), seed=0)
    contexts = [{item.values["context"] for item in found} for found in splits.rows.values()]
    assert [len(found) for found in splits.rows.values()] == [16, 2]
    assert not contexts[0] & contexts[1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (values(9, "night", 8), 'validation.jsonl row 2 ("night" is not at 8 but at 9)'),
        (values(9, "day", 0), 'validation.jsonl row 2 ("day" is not at 0 but nowhere)'),
        ({**values(9), "answers": ["night"]}, 'validation.jsonl row 2 (["night"])'),
        ({**values(9), "question": " "}, "validation.jsonl row 2 (empty)"),
        ({**values(9), "context": None}, "validation.jsonl row 2 (null)"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: dict[str, Any], why: str) -> None:
    config = write(tmp_path, values(1))
    write(tmp_path, values(2), bad, name="validation")
    with pytest.raises(UserError) as caught:
        FAMILY.load(config, seed=0)
    (problem,) = caught.value.problems
    assert (problem.where or "").endswith(why)


def test_train_without_any_answer_is_refused(tmp_path: Path) -> None:
    config = write(tmp_path, values(1, ""), values(2, ""))
    write(tmp_path, values(3), name="validation")
    with pytest.raises(UserError, match="must hold questions with an answer"):
        FAMILY.load(config, seed=0)


def test_rows_to_predict_need_question_and_context(tokenizer: Any) -> None:
    state = FAMILY.bind_columns(["context", "question"], STATE, where="new.jsonl")
    FAMILY.check_row(row(1, "a film", known=False), state)
    task = FAMILY.build(QuestionAnsweringConfig(), state, tokenizer)
    batch = task.collate([task.encode(row(1, "a film", known=False))])
    assert batch["labels"] is None
    assert run(task, batch, scores(batch)).count == 0
    (found,) = task.decode(scores(batch), batch)
    assert "reference" not in task.to_json(found)
    with pytest.raises(UserError) as caught:
        FAMILY.bind_columns(["context", "text"], STATE, where="new.jsonl")
    assert caught.value.problems[0].id == "data.missing-column"
    with pytest.raises(UserError, match="must hold a text"):
        FAMILY.check_row(Row("1", {"question": "who?", "context": ""}, "x", 1), state)
