import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_cli.config.tasks import DataConfig, MaskedLanguageModelingConfig
from lora_cli.data.masking import NEVER
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.masked_language_modeling import MaskedLanguageModeling

FAMILY = MaskedLanguageModeling()
STATE = {"columns": {"text": "text"}}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


@pytest.fixture
def byte_tokenizer() -> Any:
    """A tokenizer like RoBERTa's: a word has its space, and so has the mask token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["a good film and a bad film in new york"] * 5, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def row(number: int, text: str) -> Row:
    return Row(str(number), {"text": text}, "rows.jsonl", number)


def build(tokenizer: Any, **settings: Any) -> Any:
    return FAMILY.build(MaskedLanguageModelingConfig(**settings), STATE, tokenizer)


def logits_of(inputs: Any, size: int = 200) -> torch.Tensor:
    """Scores that depend on the tokens around, as those of a model do, and on nothing else."""
    ids = inputs["input_ids"]
    spread = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    real = inputs["attention_mask"].unsqueeze(-1)
    context = (spread[ids] * real).sum(1, keepdim=True) / 3
    return spread[ids] + context


def model(**inputs: Any) -> Any:
    return SimpleNamespace(logits=logits_of(inputs))


def test_a_text_is_cut_into_windows_and_nothing_is_lost(tokenizer: Any) -> None:
    text = "the long story zz of a man zzz in the old city was good " * 3
    task = build(tokenizer, max_length=16)
    features = task.encode(row(1, text))
    json.dumps(features)
    whole = tokenizer(text)["input_ids"]
    inner = [token for window in features["windows"] for token in window["input_ids"][1:-1]]
    assert inner == whole[1:-1]
    for window, units in zip(features["windows"], features["units"], strict=True):
        ids = window["input_ids"]
        assert len(ids) == len(units) == len(window["attention_mask"]) <= 16
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert (units[0], units[-1]) == (NEVER, NEVER)
    assert len(features["windows"]) > 3
    assert (features["cut"], features["supervised"]) == (0, len(inner))
    assert features["length"] == len(inner) + 2 * len(features["windows"])
    numbers = [unit for units in features["units"] for unit in units if unit != NEVER]
    words = tokenizer(text).word_ids()[1:-1]
    # The same units as the words of the tokenizer, numbered alike.
    assert numbers == words


def test_special_and_unknown_tokens_are_never_masked(tokenizer: Any) -> None:
    features = build(tokenizer).encode(row(1, "the [SEP] 好 film [MASK] was"))
    (ids,), (units,) = [w["input_ids"] for w in features["windows"]], features["units"]
    special = [n for n, token in enumerate(ids) if token in tokenizer.all_special_ids]
    assert [n for n, unit in enumerate(units) if unit == NEVER] == special
    assert features["supervised"] == 3
    nothing = build(tokenizer).encode(row(2, "好"))
    assert (nothing["supervised"], len(nothing["windows"])) == (0, 1)
    output = build(tokenizer).forward(model, build(tokenizer).collate([nothing]))
    assert (float(output.loss_sum), output.count) == (0, 0)


def test_the_loss_is_that_of_torch_at_the_masked_tokens(tokenizer: Any) -> None:
    task = build(tokenizer, max_length=16, mask_probability=0.4)
    texts = ["the good film and the story", "a zz " * 9, "of the city"]
    features = [task.encode(row(n, text)) for n, text in enumerate(texts)]
    batch = task.collate(features)
    seen: dict[str, Any] = {}

    def watch(**inputs: Any) -> Any:
        seen.update(inputs)
        return model(**inputs)

    output = task.forward(watch, batch)
    units = [units for one in features for units in one["units"]]
    ids = batch["inputs"]["input_ids"]
    assert seen["input_ids"].shape == ids.shape
    masked = output.outputs["log_probs"].abs().sum(-1) > 0
    assert masked.sum() == output.count
    assert (seen["input_ids"] == ids)[~masked].all()
    assert (seen["input_ids"] == tokenizer.mask_token_id).sum() > output.count / 2
    labels = ids.masked_fill(~masked, -100)
    logits = logits_of(seen)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    assert float(output.loss_sum) == pytest.approx(float(expected), rel=1e-5)
    hits = (logits.argmax(-1) == ids) & masked
    predictions = task.decode(output.outputs, batch)
    counts, sums = [one.count for one in predictions], [one.loss_sum for one in predictions]
    first = 0
    for one, prediction in zip(features, predictions, strict=True):
        last = first + len(one["windows"])
        own = {units[n][place] for n in range(first, last) for place in masked[n].nonzero()}
        words = 1 + max(max(line) for line in units[first:last])
        assert len(own) == max(1, round(0.4 * words))
        assert prediction.count == int(masked[first:last].sum())
        assert prediction.hits == int(hits[first:last].sum())
        first = last
    assert sum(counts) == output.count
    assert sum(sums) == pytest.approx(float(expected), rel=1e-5)
    found = task.metrics(predictions)
    assert found["perplexity"] == pytest.approx(float((expected / sum(counts)).exp()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(int(hits.sum()) / sum(counts))
    assert task.report(predictions) == {}


def test_masks_depend_on_seed_and_row_alone(tokenizer: Any) -> None:
    task = build(tokenizer, max_length=16)
    features = [task.encode(row(n, "the good film and the old city " * n)) for n in range(1, 5)]

    def run(rows: Any, **more: Any) -> list[tuple[float, float]]:
        batch = {**task.collate(rows), **more}
        output = task.forward(model, batch)
        return [(float(output.loss_sum), output.count)]

    for more in ({}, {"seed": 3}):
        alone = [run([one], **more)[0] for one in features]
        together = run(features, **more)[0]
        assert together[1] == sum(count for _, count in alone)
        assert together[0] == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
        assert run(features[::-1], **more)[0][0] == pytest.approx(together[0], rel=1e-5)
    assert len({run(features, seed=seed)[0][0] for seed in range(5)}) == 5
    twin = task.encode(row(9, "the good film and the old city " * 4))
    assert any(run([twin], seed=n) != run([features[3]], seed=n) for n in range(5))


def test_mask_tokens_of_a_text_are_filled(tokenizer: Any, byte_tokenizer: Any) -> None:
    for tokenizer_, mask in ((tokenizer, "[MASK]"), (byte_tokenizer, "<mask>")):
        task = build(tokenizer_, max_length=16)
        text = f"a {mask} film in the  {mask}, " + "new film " * 12 + mask
        texts = [text, "a film", f"{mask} film"]
        batch = task.collate([task.encode(row(n, text)) for n, text in enumerate(texts)])
        size = len(tokenizer_)
        run = lambda **inputs: SimpleNamespace(logits=logits_of(inputs, size))  # noqa: B023, E731
        output = task.forward(run, batch)
        first, second, third = task.decode(output.outputs, batch)
        assert [text[one.start : one.end] for one in first.guesses] == [mask] * 3
        assert (first.count, second.guesses, len(third.guesses)) == (0, (), 1)
        logits = logits_of(batch["inputs"], size)
        places = (batch["inputs"]["input_ids"] == tokenizer_.mask_token_id).nonzero().tolist()
        assert len(places) == 4
        for guess, (window, place) in zip([*first.guesses, *third.guesses], places, strict=True):
            values, numbers = logits[window, place].softmax(-1).topk(5)
            assert [p for _, p in guess.tokens] == pytest.approx(values.tolist(), rel=1e-5)
            shown = [tokenizer_.decode([n]).strip() for n in numbers.tolist()]
            assert [token for token, _ in guess.tokens] == shown
        line = json.loads(json.dumps(task.to_json(first)))
        assert set(line) == {"id", "text", "masks"}
        assert set(task.to_json(second)) == {"id", "text", "loss", "perplexity", "masked_tokens"}
        trained = task.forward(run, {**batch, "seed": 1})
        assert "asked" not in trained.outputs
        assert trained.count > output.count


def test_a_text_of_nothing_but_unknown_tokens_has_no_perplexity(tokenizer: Any) -> None:
    task = build(tokenizer)
    batch = task.collate([task.encode(row(1, "好"))])
    (found,) = task.decode(task.forward(model, batch).outputs, batch)
    line = task.to_json(found)
    assert (line["loss"], line["perplexity"], line["masked_tokens"]) == (None, None, 0)


def test_a_smaller_perplexity_is_better(tokenizer: Any) -> None:
    assert not build(tokenizer).greater_is_better
    assert build(tokenizer, metric="accuracy").greater_is_better


def test_tokenizers_that_cannot_mask_are_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.mask_token = None
    slow = SimpleNamespace(is_fast=False, mask_token_id=None)
    for tokenizer, ids in (
        (byte_tokenizer, ["task.no-mask-token"]),
        (slow, ["task.slow-tokenizer", "task.no-mask-token"]),
    ):
        with pytest.raises(UserError) as caught:
            build(tokenizer)
        assert [problem.id for problem in caught.value.problems] == ids


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_rows_are_read_from_plain_texts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    texts = ["one text", "", "  ", *(f"text {n}" for n in range(19))]
    if ending == "txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = MaskedLanguageModelingConfig(data=DataConfig(path=str(path)))
    splits = FAMILY.load(config, seed=0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {
        "train": 18,
        "validation": 2,
    }
    assert splits.state == STATE
    assert any("left out 2 of 22 rows" in note for note in splits.notes) == (ending == "jsonl")
    # Ids are numbers of lines, blank ones counted.
    ids = sorted(int(row.id) for rows in splits.rows.values() for row in rows)
    assert ids == [1, *range(4, 23)]
    more, state = FAMILY.load_more(config, STATE, seed=0)
    assert (list(more.rows), state) == (["test"], STATE)


def test_rows_without_a_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": 3}\n')
    with pytest.raises(UserError) as caught:
        FAMILY.load(MaskedLanguageModelingConfig(data=DataConfig(path=str(path))), seed=0)
    assert "a.jsonl row 2" in str(caught.value.problems[0].where)
    state = FAMILY.bind_columns(["sentence"], STATE, where="x")
    with pytest.raises(UserError):
        FAMILY.check_row(Row("1", {"sentence": " "}, "x", 1), state)
