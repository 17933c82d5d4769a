"""Plain text: windows, the tokens that are learned, continuing; the rest is in test_language."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.language import CausalLanguageModelingConfig
from lora_cli.data.types import Row
from lora_cli.tasks.causal_language_modeling import CausalLanguageModeling, TextPrediction
from lora_cli.tasks.language import Score

FAMILY = CausalLanguageModeling()
STATE = {"columns": {"text": "text"}}
WORDS = "the a an this that film movie story plot actor scene music ending script and but with it"


@pytest.fixture(scope="module")
def base(tiny_language_dir: Callable[..., Path]) -> Path:
    return tiny_language_dir("gpt2")


@pytest.fixture
def build(base: Path) -> Callable[..., Any]:
    def make(state: Any = None, **settings: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(base)
        return FAMILY.build(CausalLanguageModelingConfig(**settings), state or STATE, tokenizer)

    return make


def row(text: str, name: str = "1") -> Row:
    return Row(name, {"text": text}, "f.txt", 1)


def test_a_text_ends_with_the_end_token(build: Any) -> None:
    task = build()
    end = task._tokenizer.eos_token_id
    (one,) = task.encode(row("the film"))["sequences"]
    assert one == {"input_ids": [*task._tokenizer("the film")["input_ids"], end], "spans": [[1, 3]]}
    (one,) = build(end_of_text=False).encode(row("the film"))["sequences"]
    assert end not in one["input_ids"]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 30, 31, 32, 50])
def test_every_token_of_a_long_text_is_learned_once(build: Any, count: int) -> None:
    task = build(max_length=16, end_of_text=False)
    text = " ".join((WORDS.split() * 4)[:count])
    ids = task._tokenizer(text)["input_ids"]
    features = task.encode(row(text))
    windows = [one["input_ids"] for one in features["sequences"]]
    assert all(len(window) <= 16 for window in windows)
    assert [*windows[0], *(t for window in windows[1:] for t in window[1:])] == ids
    assert all(b[0] == a[-1] for a, b in pairwise(windows))
    assert features["supervised"] == count - 1
    assert features["length"] == sum(map(len, windows))
    batch = task.collate([features])
    assert int(batch["learned"].sum()) == count - 1


def test_rows_are_put_together_or_cut_apart(build: Any, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for packing, ids in ((True, {"1", "1+2"}), (False, {"1/0", "1/1", "2"})):
        config = CausalLanguageModelingConfig(max_length=16, packing=packing)
        task = FAMILY.build(config, STATE, AutoTokenizer.from_pretrained(base))
        features = [task.encode(row(WORDS)), task.encode(row("the film", "2"))]
        found, notes = FAMILY.arrange(config, features, model)
        assert {one["id"] for one in found} == ids
        assert len(notes) == packing
        assert sum(one["supervised"] for one in found) == sum(r["supervised"] for r in features)


def test_texts_are_rated_and_continued(build: Any, base: Path) -> None:
    state = FAMILY.bind_columns(["text"], STATE, where="f")
    task = build(state, max_length=16, generation=GenerationConfig(max_new_tokens=4))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    texts = ["the film is", WORDS]
    batch = task.collate([task.encode(row(text, str(n))) for n, text in enumerate(texts)])
    with torch.no_grad():
        found = task.forward(model, batch)
    predictions = task.decode(found.outputs, batch)
    for text, prediction in zip(texts, predictions, strict=True):
        ids = task._tokenizer(text, return_tensors="pt")["input_ids"]
        line = task.to_json(prediction)
        assert line["tokens"] == ids.shape[1] - 1
        with torch.no_grad():
            if ids.shape[1] <= 16:
                loss = float(model(input_ids=ids, labels=ids).loss)
                assert line["loss"] == pytest.approx(loss, rel=1e-5)
            kept = ids[:, -16:]
            written = model.generate(
                kept, attention_mask=torch.ones_like(kept), max_new_tokens=4, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        text = task._tokenizer.decode(written[0, kept.shape[1] :], skip_special_tokens=True)
        assert line["continuation"] == text


def test_blank_texts_are_left_out_and_others_checked() -> None:
    problems = FAMILY.check_rows([row("x"), row(" "), Row("2", {}, "f.txt", 2)], {"text": "text"})
    assert [p.id for p in problems] == ["data.bad-text"]


def test_the_json_of_a_text_of_one_token(build: Any) -> None:
    task = build()
    line = task.to_json(TextPrediction("1", Score(0.0, 0, 0), None))
    assert line == {"id": "1", "loss": None, "perplexity": None, "tokens": 0}
    both = [
        TextPrediction("1", Score(0.0, 0, 0), None),
        TextPrediction("2", Score(2.0, 1, 2), "x"),
    ]
    assert task.metrics(both) == {
        "perplexity": pytest.approx(2.718281828),
        "token_accuracy": 0.5,
    }
    assert task.report(both) == {}
