import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seqeval.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_cli.config.tasks import DataConfig, TokenClassificationConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.token_classification import TokenClassification

FAMILY = TokenClassification()
TAGS = ["B-LOC", "B-PER", "I-PER", "O"]
STATE = {
    "labels": TAGS,
    "columns": {"tokens": "tokens", "tags": "tags"},
    "numbered": False,
    "entities": True,
}


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer like RoBERTa's: the space before a word is part of its first token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["a good film and a bad film in new york"] * 5, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def row(number: int, **values: Any) -> Row:
    return Row(str(number), values, "rows.jsonl", number)


def write(folder: Path, *rows: Any, name: str = "train", **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in rows]
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    data = DataConfig(path=str(folder), **settings.pop("data", {}))
    return TokenClassificationConfig(data=data, **settings)


def test_a_word_is_learned_at_its_first_token(tokenizer: Any) -> None:
    task = FAMILY.build(TokenClassificationConfig(), STATE, tokenizer)
    features = task.encode(row(1, tokens=["a", "xyz", "film"], tags=["O", "B-PER", "B-LOC"]))
    pieces = tokenizer.convert_ids_to_tokens(features["inputs"]["input_ids"])
    assert pieces == ["[CLS]", "a", "x", "##y", "##z", "film", "[SEP]"]
    batch = task.collate([features, task.encode(row(2, tokens=["bad"], tags=["O"]))])
    assert batch["labels"].tolist() == [
        [-100, 3, 1, -100, -100, 0, -100],
        [-100, 3, -100, -100, -100, -100, -100],
    ]


def test_words_are_read_as_inside_a_text(byte_tokenizer: Any) -> None:
    task = FAMILY.build(TokenClassificationConfig(), STATE, byte_tokenizer)
    words = ["a", "good", "film", "in", "北", "京"]
    features = task.encode(row(1, tokens=words, tags=["O"] * 6))
    assert features["inputs"]["input_ids"] == byte_tokenizer("a good film in 北京")["input_ids"]
    plain = byte_tokenizer(words, is_split_into_words=True)["input_ids"]
    assert features["inputs"]["input_ids"] != plain


def test_words_behind_the_limit_are_not_learned_and_count_as_outside(tokenizer: Any) -> None:
    task = FAMILY.build(TokenClassificationConfig(max_length=4), STATE, tokenizer)
    words, tags = ["a", "film", "xyz", "bad"], ["O", "B-PER", "B-LOC", "B-PER"]
    features = task.encode(row(1, tokens=words, tags=tags))
    assert features["length"] == 4
    assert features["cut"] == 4
    assert features["firsts"] == [1, 2, None, None]
    batch = task.collate([features])
    assert batch["labels"].tolist() == [[-100, 3, 1, -100]]
    (found,) = task.decode({"logits": torch.eye(4)[[0, 3, 1, 0]].unsqueeze(0)}, batch)
    assert found.tags == (3, 1, None, None)
    assert task.metrics([found])["recall"] == pytest.approx(1 / 3)
    assert task.to_json(found)["tags"] == ["O", "B-PER", "O", "O"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_words_alone(tokenizer: Any, smoothing: float) -> None:
    task = FAMILY.build(TokenClassificationConfig(), STATE, tokenizer)
    features = [
        task.encode(row(1, tokens=["a", "xyz"], tags=["O", "B-PER"])),
        task.encode(row(2, tokens=["bad"], tags=["B-LOC"])),
    ]
    batch = task.collate(features)
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4)
    batch["label_smoothing"] = smoothing
    output = task.forward(lambda **_: SimpleNamespace(logits=logits), batch)
    scores = torch.stack([logits[0, 1], logits[0, 2], logits[1, 1]]).log_softmax(-1)
    own = -scores[[0, 1, 2], [3, 1, 0]]
    expected = (1 - smoothing) * own.sum() - smoothing * scores.mean(-1).sum()
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.count == 3


def test_scores_are_those_of_seqeval(tokenizer: Any) -> None:
    task = FAMILY.build(TokenClassificationConfig(), STATE, tokenizer)
    generator = torch.Generator().manual_seed(3)
    rows = [
        row(n, tokens=["a"] * 6, tags=[TAGS[i] for i in torch.randint(0, 4, (6,)).tolist()])
        for n in range(20)
    ]
    batch = task.collate([task.encode(item) for item in rows])
    logits = torch.randn(20, 8, 4, generator=generator)
    predictions = task.decode({"logits": logits}, batch)
    predicted = [[TAGS[tag or 0] for tag in prediction.tags] for prediction in predictions]
    assert predicted[0] == [TAGS[i] for i in logits[0, 1:7].argmax(-1).tolist()]
    actual = [list(item.values["tags"]) for item in rows]
    assert task.metrics(predictions)["f1"] == pytest.approx(f1_score(actual, predicted))
    assert task.report(predictions)["labels"] == ["LOC", "PER"]


def test_spans_are_in_characters_of_the_text(tokenizer: Any) -> None:
    state = FAMILY.bind_columns(["tokens"], STATE, where="x")
    task = FAMILY.build(TokenClassificationConfig(), state, tokenizer)
    batch = task.collate([task.encode(row(1, tokens=["李", "明", "in", "Rome"]))])
    logits = torch.full((1, 20, 4), -1.0)
    firsts = batch["rows"][0]["firsts"]
    for place, tag in zip(firsts, (1, 2, 3, 0), strict=True):
        logits[0, place, tag] = 1.0
    (found,) = task.decode({"logits": logits}, batch)
    line = task.to_json(found)
    assert line["text"] == "李明 in Rome"
    assert line["spans"] == [
        {"start": 0, "end": 2, "label": "PER", "text": "李明"},
        {"start": 6, "end": 10, "label": "LOC", "text": "Rome"},
    ]
    assert "reference" not in line


def test_a_text_to_predict_is_split(tokenizer: Any) -> None:
    state = FAMILY.bind_columns(["sentence"], STATE, where="new.jsonl")
    FAMILY.check_row(row(1, sentence="a film."), state)
    task = FAMILY.build(TokenClassificationConfig(), state, tokenizer)
    features = task.encode(row(1, sentence="a film."))
    assert features["spans"] == ((0, 1), (2, 6), (6, 7))
    assert features["tags"] is None
    with pytest.raises(UserError, match="must hold a text"):
        FAMILY.check_row(row(1, sentence=" "), state)
    with pytest.raises(UserError) as caught:
        FAMILY.bind_columns(["x"], STATE, where="new.jsonl")
    assert caught.value.problems[0].id == "data.missing-column"


def test_plain_tags_have_scores_of_words(tmp_path: Path, tokenizer: Any) -> None:
    rows = [(["a", "film"], ["DET", "NOUN"]), (["see"], ["VERB"])]
    write(tmp_path, *rows, name="validation")
    with pytest.raises(UserError, match=r"`task\.metric` must suit the tags"):
        FAMILY.load(write(tmp_path, *rows), seed=0)
    config = write(tmp_path, *rows, metric="accuracy")
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, tokenizer)
    batch = task.collate([task.encode(item) for item in splits.rows["train"]])
    predictions = task.decode({"logits": torch.eye(3)[[0, 0, 0, 1]].expand(2, 4, 3)}, batch)
    assert task.metrics(predictions)["accuracy"] == pytest.approx(1 / 3)
    assert task.report(predictions)["labels"] == ["DET", "NOUN", "VERB"]
    first = task.to_json(predictions[0])
    assert first["spans"][1] == {"start": 2, "end": 6, "label": "DET", "text": "film"}
    assert "3 tags, one for each word" in splits.notes[-1]


def test_integer_tags_are_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [(["a", "b"], [0, 1]), (["c"], [2])]
    write(tmp_path, *rows, name="validation")
    config = write(tmp_path, *rows, data={"label_names": ("O", "B-PER", "I-PER")})
    splits = FAMILY.load(config, seed=0)
    assert splits.state["entities"] is True
    task = FAMILY.build(config, splits.state, tokenizer)
    assert task.encode(splits.rows["train"][0])["tags"] == [0, 1]


@pytest.mark.parametrize(
    ("words", "tags", "why"),
    [
        (["a", "b"], ["O"], r"row 2 \(2 words, 1 tags\)"),
        ([], [], "row 2"),
        (["a"], ["B-ORG"], r'row 2 \("B-ORG"\)'),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, words: Any, tags: Any, why: str) -> None:
    good = (["a", "b"], ["B-PER", "O"])
    write(tmp_path, good, (words, tags), name="validation")
    with pytest.raises(UserError) as caught:
        FAMILY.load(write(tmp_path, good), seed=0)
    assert re.search(why, caught.value.problems[0].where or "")


def test_a_tokenizer_that_does_not_tell_words_is_refused() -> None:
    with pytest.raises(UserError, match="which word each token is of"):
        FAMILY.build(TokenClassificationConfig(), STATE, SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("ending", ["conll", "txt", "tsv"])
def test_folders_of_words_a_line(tmp_path: Path, ending: str) -> None:
    text = "-DOCSTART- -X- O\n\nNew NNP B-LOC\nYork NNP I-LOC\n\nyes UH O\n"
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.{ending}").write_text(text)
    (tmp_path / "notes.txt").write_text("a note of\nsome lines\n")
    data = DataConfig(path=str(tmp_path))
    splits = FAMILY.load(TokenClassificationConfig(data=data), seed=0)
    assert {split: len(rows) for split, rows in splits.rows.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }
    assert splits.state["labels"] == ["B-LOC", "I-LOC", "O"]
    other = TokenClassificationConfig(
        data=DataConfig(path=str(tmp_path), tags_column="2"), metric="accuracy"
    )
    assert FAMILY.load(other, seed=0).state["labels"] == ["NNP", "UH"]
