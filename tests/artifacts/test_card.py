"""Model cards, read back by a YAML parser and a Markdown parser."""

import ast
import dataclasses
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from lora_cli.artifacts.card import CardData, model_card, public_name

CARD = CardData(
    processor="tokenizer",
    name="movie-reviews",
    base="sentence-transformers/all-MiniLM-L6-v2",
    base_sha256="ab" * 32,
    task_type="SEQ_CLS",
    auto_class="AutoModelForSequenceClassification",
    labels=("negative", "positive"),
    num_labels=2,
    has_one_label=True,
    split="validation",
    rows=1061,
    before={"accuracy": 0.4986, "loss": 0.69},
    after={"accuracy": 0.8362, "loss": 0.37},
    lora={"lora.r": "8", "lora.targets": "query, value"},
    training={"optimizer.lr": "0.001"},
    versions={"lora-cli": "0.1.0", "torch": "2.13.0"},
)
HOSTILE = "</td><script>x</script> [a](http://e) ![i](http://e) `b` **c** | d \" ' \\ \n\n# e\n---"


def parts(text: str) -> tuple[dict[str, object], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def html_of(body: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def code_of(text: str) -> str:
    tokens = MarkdownIt().parse(parts(text)[1])
    (code,) = [token.content for token in tokens if token.info == "python"]
    return code


def test_front_matter_is_what_hubs_read() -> None:
    front, _ = parts(model_card(CARD))
    assert front == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "peft",
        "tags": ["lora", "lora-cli"],
        "pipeline_tag": "text-classification",
    }


def test_body_says_what_was_trained_and_how_well() -> None:
    html = html_of(parts(model_card(CARD))[1])
    assert "<td>accuracy</td>\n<td>0.4986</td>\n<td>0.8362</td>" in html
    assert "1061 rows of the validation split" in html
    assert "<code>negative</code>, <code>positive</code>" in html
    assert "<td><code>lora.targets</code></td>\n<td><code>query, value</code></td>" in html
    assert "torch 2.13.0" in html
    assert "ab" * 32 in html


def test_a_combination_says_what_it_is_from() -> None:
    sources = (("runs-a", "0.7", "cd" * 32), (HOSTILE, "-0.5", "ef" * 32))
    html = html_of(parts(model_card(dataclasses.replace(CARD, parts=sources, after={})))[1])
    assert "combined from 2 others with lora-cli" in html
    assert "<td><code>runs-a</code></td>\n<td>0.7</td>\n<td><code>cdcd" in html
    assert "<td>-0.5</td>\n<td><code>efef" in html
    assert "Metrics" not in html
    assert "trained with" not in html
    for tag in ("<script", "<a ", "<img"):
        assert tag not in html


def test_code_sample_is_python_with_the_labels_in_order() -> None:
    code = code_of(model_card(CARD))
    ast.parse(code)
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)" in code
    assert 'labels = ["negative", "positive"]' in code


def test_other_tasks_have_no_pipeline_tag() -> None:
    text = model_card(dataclasses.replace(CARD, task_type=None, labels=()))
    front, body = parts(text)
    assert "pipeline_tag" not in front
    assert "## Labels" not in body
    ast.parse(code_of(text))


@pytest.mark.parametrize(
    "field", ["name", "base", "base_sha256", "labels", "split", "after", "lora", "versions"]
)
def test_hostile_text_stays_text(field: str) -> None:
    value: object = HOSTILE
    if field == "labels":
        value = (HOSTILE, "``` x", "`", "")
    elif field == "after":
        value = {HOSTILE: 0.5}
    elif field in ("lora", "versions"):
        value = {HOSTILE: HOSTILE}
    clean, changed = model_card(CARD), model_card(dataclasses.replace(CARD, **{field: value}))
    front, body = parts(changed)
    assert set(front) == {"base_model", "library_name", "tags", "pipeline_tag"}
    html = html_of(body)
    for tag in ("<script", "<a ", "<img", "<strong", "<em"):
        assert tag not in html
    assert html.count("<h") == html_of(parts(clean)[1]).count("<h"), "a heading was injected"
    ast.parse(code_of(changed))
    table = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert {row.count("<td>") for row in table if "<td>" in row} == {2, 3}


@pytest.mark.parametrize("label", ["`", "``` x", "a`b", " a ", "a\\", "<b>", "ärger"])
def test_labels_are_shown_as_they_are(label: str) -> None:
    body = parts(model_card(dataclasses.replace(CARD, labels=(label, "other"))))[1]
    inline = [token for token in MarkdownIt().parse(body) if token.type == "inline"]
    spans = [child.content for token in inline for child in token.children or []]
    assert label in spans


def test_no_path_of_the_machine() -> None:
    text = model_card(
        dataclasses.replace(CARD, base="/home/me/models/tiny", name="/home/me/runs/first")
    )
    assert "/home" not in text
    assert parts(text)[0]["base_model"] == "tiny"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("a/b", "a/b"),
        ("../b", "b"),
        ("a/b/c", "c"),
        ("C:\\models\\x", "x"),
        ("/", "model"),
        ("~/x", "x"),
    ],
)
def test_public_name(name: str, public: str) -> None:
    assert public_name(name) == public


def test_what_peft_would_pass_over_is_said() -> None:
    card = dataclasses.replace(CARD, loads_in_peft=False, ignored_by_peft=True)
    assert "Not with peft" in html_of(parts(model_card(card))[1])
    for other in (CARD, dataclasses.replace(CARD, loads_in_peft=False)):
        assert "Not with peft" not in model_card(other)


def test_a_card_of_images_shows_how_they_are_read() -> None:
    auto_class = "AutoModelForImageClassification"
    card = model_card(
        dataclasses.replace(
            CARD, processor="image processor", auto_class=auto_class, task_type=None
        )
    )
    assert 'pipeline_tag: "image-classification"' in card
    assert "lora-cli predict ADAPTER_FOLDER input=FILE" in card
    assert f"from transformers import AutoImageProcessor, {auto_class}" in card
    assert "processor = AutoImageProcessor.from_pretrained(base)" in card
    assert 'logits = model(**processor(images=image, return_tensors="pt")).logits' in card


def test_a_card_of_images_and_texts_shows_how_labels_are_given() -> None:
    card = model_card(dataclasses.replace(CARD, processor="image and text processor"))
    assert "lora-cli predict ADAPTER_FOLDER input=FOLDER zero_shot.labels=[cat,dog]" in card
    assert "AutoProcessor" in card
