import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.language import Seq2SeqConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.seq2seq import Seq2Seq, shift_right
from lora_cli.tasks.written import WrittenText

FAMILY = Seq2Seq()
STATE = {"columns": {"source": "source", "target": "target"}}
KINDS = ("t5", "bart", "marian", "mbart", "bert2bert")
PAIRS = (
    ("the film was good", "good movie"),
    ("a very long and boring story about the city", "dull and poor"),
    ("music", "the scene was a warm day in the new year and not bad"),
)


@pytest.fixture(scope="module")
def load(tiny_language_dir: Callable[..., Path]) -> Callable[[str], Any]:
    def get(kind: str) -> Any:
        folder = tiny_language_dir(kind)
        auto = transformers.AutoModelForSeq2SeqLM
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return auto.from_pretrained(folder).eval(), tokenizer

    return get


def row(number: int, source: Any, target: Any = None) -> Row:
    values = {"source": source} | ({} if target is None else {"target": target})
    return Row(str(number), values, "rows.jsonl", number)


def rows() -> list[Row]:
    return [row(number, *pair) for number, pair in enumerate(PAIRS, start=1)]


def build(tokenizer: Any, state: Any = STATE, **settings: Any) -> Any:
    return FAMILY.build(Seq2SeqConfig(**settings), state, tokenizer)


def run(task: Any, model: Any, chosen: list[Row], **more: Any) -> Any:
    batch = {**task.collate([task.encode(one) for one in chosen]), **more}
    with torch.no_grad():
        return task.forward(model, batch), batch


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_model_with_labels(load: Any, kind: str) -> None:
    """The target is shifted once: transformers, which shifts labels itself, says the same."""
    model, tokenizer = load(kind)
    if kind == "bert2bert":
        model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    task = build(tokenizer)
    output, batch = run(task, model, rows(), seed=1)
    labels = batch["labels"]
    with torch.no_grad():
        wanted = model(**batch["inputs"], labels=labels).loss
    count = int((labels != -100).sum())
    assert output.count == count == sum(len(tokenizer(target)["input_ids"]) for _, target in PAIRS)
    torch.testing.assert_close(output.loss_sum / count, wanted, atol=1e-5, rtol=1e-5)
    # Shifted twice, or not at all, it would be another one.
    start = (
        2 if model.config.decoder_start_token_id is None else model.config.decoder_start_token_id
    )
    with torch.no_grad():
        for read in (labels.clamp(min=0), torch.nn.functional.pad(labels, (2, 0), value=start)):
            read = read[:, : labels.shape[1]].clamp(min=0)
            logits = model(**batch["inputs"], decoder_input_ids=read).logits
            other = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            assert abs(float(other - wanted)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batches_change_nothing(load: Any, kind: str) -> None:
    model, tokenizer = load(kind)
    task = build(tokenizer, generation=GenerationConfig(max_new_tokens=9))
    tokenizer.padding_side = "left"
    together, batch = run(task, model, rows())
    said = task.decode(together.outputs, batch)
    total = 0.0
    for number, one in enumerate(rows()):
        alone, own = run(task, model, [one])
        (wanted,) = task.decode(alone.outputs, own)
        found = said[number]
        assert (found.id, found.text, found.references) == (
            wanted.id,
            wanted.text,
            wanted.references,
        )
        assert found.score.loss_sum == pytest.approx(wanted.score.loss_sum, rel=1e-5)
        assert (found.score.hits, found.score.count) == (wanted.score.hits, wanted.score.count)
        total += float(alone.loss_sum)
    assert float(together.loss_sum) == pytest.approx(total, rel=1e-5)
    assert len({one.text for one in said}) > 1


def test_what_is_written_is_what_the_model_generates(load: Any) -> None:
    model, tokenizer = load("bart")
    task = build(tokenizer)
    output, batch = run(task, model, rows())
    for one, found in zip(rows(), task.decode(output.outputs, batch), strict=True):
        ids = tokenizer(one.values["source"], return_tensors="pt")
        wanted = model.generate(
            input_ids=ids["input_ids"], max_new_tokens=62, do_sample=False, num_beams=1
        )
        assert (
            found.text.split()[:62]
            == tokenizer.decode(wanted[0], skip_special_tokens=True).split()[:62]
        )


def test_outside_of_training_the_loss_is_plain(load: Any) -> None:
    model, tokenizer = load("t5")
    task = build(tokenizer, generate_in_eval=False, metric="loss")
    trained, _ = run(task, model, rows(), seed=1)
    evaluated, batch = run(task, model, rows())
    assert trained.outputs == {}
    assert float(evaluated.loss_sum) == pytest.approx(float(trained.loss_sum), rel=1e-5)
    assert set(evaluated.outputs) == {"log_probs"}
    assert all(one.text is None for one in task.decode(evaluated.outputs, batch))
    both, _ = run(build(tokenizer), model, rows(), generate=False)
    assert set(both.outputs) == {"log_probs"}


def test_label_smoothing_equals_its_formula(load: Any) -> None:
    model, tokenizer = load("t5")
    task = build(tokenizer)
    found, batch = run(task, model, rows(), seed=1, label_smoothing=0.2)
    labels = batch["labels"]
    with torch.no_grad():
        said = model(**batch["inputs"], labels=labels).logits.log_softmax(-1)[labels != -100]
    true = said.gather(1, labels[labels != -100].unsqueeze(1)).sum()
    wanted = -0.8 * true - 0.2 * said.mean(-1).sum()
    torch.testing.assert_close(found.loss_sum, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_sum(load: Any) -> None:
    model, tokenizer = load("t5")
    task, features = build(tokenizer), []
    features = [task.encode(one) for one in rows()]
    weight = model.get_parameter("decoder.block.0.layer.0.SelfAttention.q.weight")
    task.forward(model, {**task.collate(features), "seed": 1}).loss_sum.backward()
    together, weight.grad = weight.grad.clone(), None
    for one in features:
        task.forward(model, {**task.collate([one]), "seed": 1}).loss_sum.backward()
    assert float((together - weight.grad).norm()) < 1e-3 * float(together.norm()) > 0


def test_encoding(load: Any) -> None:
    _, tokenizer = load("t5")
    task = build(tokenizer, prefix="very ", max_length=5, max_target_length=4)
    features = task.encode(row(7, "the film was a long one", ["good and warm music", "x"]))
    json.dumps(features)
    whole = tokenizer("very the film was a long one")["input_ids"]
    assert features["source"] == [*whole[:4], tokenizer.eos_token_id]
    assert features["target"] == [*tokenizer("good and warm")["input_ids"]]
    assert (features["cut"], features["supervised"], features["length"]) == (4, 4, 9)
    assert features["references"] == ["good and warm music", "x"]
    assert features["id"] == "7"


def test_nested_columns() -> None:
    nested = {"translation": {"en": "the film", "de": "city"}, "id": "3"}
    state = {"columns": {"source": "translation.en", "target": "translation.de"}}
    told = Row("3", nested, "rows.jsonl", 1)
    assert FAMILY.check_rows([told], state["columns"]) == []
    FAMILY.check_row(told, state)
    bound = FAMILY.bind_columns(["id", "translation"], state, where="x")
    assert bound["columns"] == {"source": "translation.en", "target": None}
    flat = FAMILY.bind_columns(["translation.en"], state, where="x")
    assert flat["columns"]["source"] == "translation.en"
    with pytest.raises(UserError, match=r"translation\.en"):
        FAMILY.bind_columns(["id", "translations", "other"], state, where="x")
    (problem,) = FAMILY.check_rows(
        [Row("1", {"translation": {"de": "x"}}, "r", 1)], state["columns"]
    )
    assert "translation.en" in problem.message


def test_rows_to_predict_have_no_target(load: Any) -> None:
    model, tokenizer = load("bart")
    state = FAMILY.bind_columns(["text"], STATE, where="text")
    assert state["columns"] == {"source": "text", "target": None}
    task = build(tokenizer, state)
    told = Row("1", {"text": "the film was good"}, "text", 1)
    FAMILY.check_row(told, state)
    output, batch = run(task, model, [told])
    assert (output.count, set(output.outputs)) == (0, {"texts", "ended"})
    (found,) = task.decode(output.outputs, batch)
    assert task.to_json(found) == {"id": "1", "output": found.text, "ended": found.is_ended}
    assert found.text


def test_metrics_and_lines() -> None:
    task = Seq2Seq().build(Seq2SeqConfig(bleu_tokenizer="13a"), STATE, SimpleNamespace())
    said = [
        WrittenText("1", "a b c d", True, None, ("x", "a b c d")),
        WrittenText("2", None, None, None, ()),
    ]
    found = task.metrics(said)
    assert found["bleu"] == pytest.approx(100)
    assert set(found) == {
        *("perplexity", "token_accuracy", "bleu", "chrf"),
        *("rouge1", "rouge2", "rougeL", "exact_match", "ended"),
    }
    assert found["ended"] == 1
    assert task.to_json(said[0]) == {
        **{"id": "1", "output": "a b c d", "ended": True, "references": ["x", "a b c d"]}
    }
    assert task.to_json(said[1]) == {"id": "2"}


def test_a_metric_of_texts_needs_texts() -> None:
    with pytest.raises(UserError, match=r"`task\.metric` must be loss"):
        FAMILY.build(Seq2SeqConfig(generate_in_eval=False), STATE, None)


def test_rows_without_texts_are_refused() -> None:
    bad = [
        row(1, "x", ""),
        row(2, "x", []),
        row(3, "", "y"),
        row(4, "x", ["y", 3]),
        row(5, "x", "y"),
    ]
    problems = FAMILY.check_rows(bad, STATE["columns"])
    assert [problem.id for problem in problems] == ["data.bad-text", "data.bad-reference"]
    assert problems[1].where == (
        "rows.jsonl row 1 (empty), rows.jsonl row 2 (empty), "
        "rows.jsonl row 4 (a list with something else than texts)"
    )


def test_mbart_reads_the_language_first(load: Any) -> None:
    """Targets end with the end token and the language, which becomes the first token read."""
    model, _ = load("mbart")
    labels = torch.tensor([[7, 8, 3, 50], [9, 3, 50, -100]])
    read = shift_right(labels, model, start={"decoder_start_token_id": 50})
    assert read.tolist() == [[50, 7, 8, 3], [50, 9, 3, 50]]
    other, _ = load("bart")
    read = shift_right(labels, other, start={"decoder_start_token_id": 3})
    assert read.tolist() == [[3, 7, 8, 3], [3, 9, 3, 50]]
